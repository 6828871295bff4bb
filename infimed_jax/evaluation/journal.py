"""Replies kept as they come, so that an evaluation which was stopped goes on where it was.

A folder holds `asked.json`, which says what was asked of whom, and `replies.part.jsonl`, a line for each reply, until
the evaluation is finished. A kill costs the replies that had not been finished; a line cut by it is asked again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from infimed_jax.errors import UserError, one_line
from infimed_jax.evaluation.respondents import Reply
from infimed_jax.files import lock, make_folder, to_json, write_json, write_text
from infimed_jax.processes import gather

ASKED, PART, REPLIES = "asked.json", "replies.part.jsonl", "replies.jsonl"
UNANSWERED = "unanswered"
"""The status of a question to which there is no reply."""


class Journal:
    """The replies in a folder, by question number; without a folder, in memory alone. Process 0 writes.

    Raises UserError where another process writes there, or the folder holds replies of another evaluation.
    """

    def __init__(self, folder: Path | None, asked: Mapping[str, Any]) -> None:
        self.replies: dict[int, Reply] = {}
        self._folder, self._asked = folder, json.loads(to_json(asked))
        self._stack, self._file = ExitStack(), None

    def __enter__(self) -> Journal:
        if self._folder is None:
            return self
        kept: list[Any] = []
        with ExitStack() as stack:
            if jax.process_index() == 0:
                make_folder(self._folder)
                stack.callback(os.close, lock(self._folder, self._folder))
                kept = self._kept(self._folder)
                write_text(self._folder / PART, "".join(map(_line, kept)))  # without a line that was cut
                self._file = stack.enter_context((self._folder / PART).open("a", encoding="utf-8"))
            self._stack = stack.pop_all()
        self.replies = {number: Reply(**reply) for number, reply in gather(kept)[0]}
        return self

    def put(self, number: int, reply: Reply) -> None:
        self.replies[number] = reply
        if self._file is not None:
            self._file.write(_line([number, asdict(reply)]))
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def finish(self) -> None:
        """The folder holds the records now, from which the replies are read again."""
        if self._folder is not None and jax.process_index() == 0:
            (self._folder / PART).unlink()

    def _kept(self, folder: Path) -> list[Any]:
        """The replies of the same evaluation that the folder holds, `[number, reply]`."""
        file = folder / ASKED
        if not file.exists():
            if any(folder.iterdir()):
                raise UserError(f"{folder} holds other files: choose another --output, which is made or empty")
            write_json(file, self._asked)
            return []
        try:
            before, asked = json.loads(file.read_text(encoding="utf-8")), self._asked
            changed = [f"{name} was {before[name]!r}, is {now!r}" for name, now in asked.items() if before[name] != now]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({one_line(error)}): choose another --output") from error
        if changed:
            raise UserError(f"{folder} holds another evaluation ({'; '.join(changed)}): choose another --output")
        return _lines(folder / PART) if (folder / PART).exists() else _finished(folder / REPLIES)


def _line(entry: Sequence[Any]) -> str:
    return to_json(entry, ensure_ascii=False) + "\n"


def _finished(file: Path) -> list[Any]:
    """The replies among the records of a finished evaluation."""
    if not file.exists():
        return []
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [
        [number, asdict(Reply(row["reply"], row["finish"], row["tokens"], row["status"] != UNANSWERED))]
        for number, row in enumerate(rows)
    ]


def _lines(file: Path) -> list[Any]:
    """The whole lines of a journal; the last one may have been cut."""
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            number, reply = json.loads(line)
            kept.append([int(number), asdict(Reply(**reply))])
        except (ValueError, TypeError):  # a damaged line is asked again
            continue
    return kept
