"""Many calls: items streamed through an endpoint, as many at once as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from data_prep.llm.account import BudgetReached
from data_prep.llm.client import ChatClient, check_cleared
from data_prep.llm.settings import Endpoint

Item = TypeVar("Item")
Result = TypeVar("Result")
Job = Callable[[ChatClient, Item], Awaitable[Result]]


def check_sources(endpoint: Endpoint, sources: Iterable[str]) -> None:
    """UserError where data of one of them may not be sent to the endpoint: to be asked before the work begins."""
    for source in sorted(set(sources)):
        check_cleared(endpoint, source)


def run_jobs(
    endpoint: Endpoint, folder: Path, items: Iterable[Item], job: Job, on_done: Callable[[Item, Any], None]
) -> dict[str, Any]:
    """`on_done(item, await job(client, item))` for every item, in whatever order they end; returns the account.

    `folder` holds cache and account, and makes a stopped run cheap to repeat. Items are drawn as they are needed.
    Whatever a job raises ends the run; at BudgetReached the calls in flight are waited for first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # replies may speak of patients
    try:
        return asyncio.run(_run(endpoint, folder, items, job, on_done))
    except BaseExceptionGroup as group:
        raise _first(group) from None


async def _run(
    endpoint: Endpoint, folder: Path, items: Iterable[Item], job: Job, on_done: Callable[[Item, Any], None]
) -> dict[str, Any]:
    waiting = iter(items)
    reached: list[BudgetReached] = []

    async def worker(client: ChatClient) -> None:
        for item in waiting:
            if reached:
                return
            try:
                result = await job(client, item)
            except BudgetReached as error:
                reached.append(error)
                return
            on_done(item, result)

    async with ChatClient(endpoint, folder) as client:
        async with asyncio.TaskGroup() as group:
            for _ in range(endpoint.concurrency):
                group.create_task(worker(client))
        if reached:
            raise reached[0]
        return {
            "endpoint": endpoint.name,
            "reach": endpoint.reach,
            "model": endpoint.model,
            "images": client.sight or "none sent",
            "counts": dict(sorted(client.counts.items())),
            "spent": asdict(client.account.spent()),
            "budget": asdict(endpoint.budget),
        }


def _first(group: BaseExceptionGroup) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
