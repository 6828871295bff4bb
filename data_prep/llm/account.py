"""What calls have cost, and the bound that they must not pass, over all processes that share a cache folder."""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.llm.settings import Budget
from infimed_jax.errors import UserError
from infimed_jax.files import write_json

FILE = "account.json"


class BudgetReached(UserError):
    """The next call's worst case does not fit into what is left."""


@dataclass
class Spent:
    """Totals since the cache folder was made."""

    calls: int = 0
    """Sent, whatever came of them."""
    prompt_tokens: int = 0
    reply_tokens: int = 0
    cost: float = 0.0
    at_worst: int = 0
    """Calls counted at their worst case: in flight, of unknown outcome, or without a usable account of their own."""

    def add(self, budget: Budget, calls: int, prompt: int, reply: int, at_worst: int) -> None:
        self.calls += calls
        self.prompt_tokens += prompt
        self.reply_tokens += reply
        self.cost += budget.price(prompt, reply)
        self.at_worst += at_worst


@dataclass
class Booking:
    """A call that is under way."""

    used: tuple[int, int] | None = None
    """Prompt and reply tokens as the endpoint has counted them; None leaves the call booked at its worst case."""


class Account:
    """Each call is booked at its worst case before it is sent and corrected afterwards, so a killed run stays booked.

    UserError: the file is damaged, for then nobody knows what was spent.
    """

    def __init__(self, folder: Path, budget: Budget) -> None:
        self.file, self.budget = folder / FILE, budget
        self._in_flight = 0  # of this process
        self._settled = asyncio.Condition()
        self.spent()

    def spent(self) -> Spent:
        with self._locked() as spent:
            return spent

    @asynccontextmanager
    async def booked(self, prompt: int, reply: int) -> AsyncIterator[Booking]:
        """Book a call at its worst case for as long as it takes, then as the `used` that it is given.

        Calls in flight are booked at far more than most will cost, so where they fill the budget they are waited for.
        BudgetReached where none is left to wait for.
        """
        async with self._settled:
            while not self._fits(prompt, reply):
                await self._settled.wait()
            self._in_flight += 1
        booking = Booking()
        try:
            yield booking
        finally:
            async with self._settled:
                self._in_flight -= 1
                if booking.used is not None:
                    self.settle(prompt, reply, booking.used)
                self._settled.notify_all()

    def _fits(self, prompt: int, reply: int) -> bool:
        try:
            self.reserve(prompt, reply)
        except BudgetReached:
            if self._in_flight:
                return False
            raise
        return True

    def reserve(self, prompt: int, reply: int) -> None:
        """Book a call at its worst case. BudgetReached, with nothing booked, where that is too much."""
        budget = self.budget
        with self._locked() as spent:
            tokens = spent.prompt_tokens + spent.reply_tokens + prompt + reply
            if budget.tokens and tokens > budget.tokens:
                raise BudgetReached(
                    f"the budget of {budget.tokens:,} tokens is reached: the next call may take {prompt + reply:,}, "
                    f"and {tokens - prompt - reply:,} are spent or in flight; raise it and run the same command: "
                    "replies are kept, nothing is sent twice"
                )
            price = budget.price(prompt, reply)
            if budget.cost and spent.cost + price > budget.cost:
                raise BudgetReached(
                    f"the budget of {budget.cost:.2f} is reached: the next call may cost {price:.4f}, and "
                    f"{spent.cost:.4f} are spent or in flight; raise it and run the same command: replies are kept, "
                    "nothing is sent twice"
                )
            spent.add(budget, 1, prompt, reply, 1)
            write_json(self.file, asdict(spent))

    def settle(self, prompt: int, reply: int, used: tuple[int, int]) -> None:
        """Correct a booking of `prompt` and `reply` tokens to what the endpoint has counted."""
        with self._locked() as spent:
            spent.add(self.budget, 0, used[0] - prompt, used[1] - reply, -1)
            write_json(self.file, asdict(spent))

    @contextmanager
    def _locked(self) -> Iterator[Spent]:
        with self.file.with_name(f".{FILE}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also by a kill
            yield self._read()

    def _read(self) -> Spent:
        try:
            values = json.loads(self.file.read_text(encoding="utf-8"))
            return Spent(**{name: type(default)(values[name]) for name, default in asdict(Spent()).items()})
        except FileNotFoundError:
            return Spent()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} is damaged: what was spent is unknown; remove it to begin at 0") from error
