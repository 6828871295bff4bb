"""Work for `test_engine.py`: in a module of its own, since worker processes import it by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from infimed_jax.data.sample import Document
from infimed_jax.data.storage import write_shard
from infimed_jax.errors import UserError


def sample(number: int) -> Document:
    return Document(f"toy/train/{number}", "toy", "train", (), ((f"text {number}",),))


def dying_work(marks: str, deaths: int, numbers: range, folder: Path, name: str) -> dict:
    """Writes its shard; the third piece's worker is killed in the middle of it, as often as `deaths` says."""
    with open(f"{marks}/{name}", "a") as tries:
        tries.write("x")

    def samples():
        for number in numbers:
            if number == 75 and Path(marks, name).stat().st_size <= deaths:
                os.kill(os.getpid(), signal.SIGKILL)
            yield sample(number)

    write_shard(folder, name, samples())
    return {"first": numbers[0]}


def failing_work(number: int, folder: Path, name: str) -> dict:
    if number == 1:
        raise UserError("piece 1 is bad")
    return {}
