"""Replies that carry their own questions: graded row by row, without a model, images or a prepared dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from infimed_jax.data.prompts import LETTERS, QUESTION_KINDS
from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.benchmark import (
    GENERAL,
    MARK,
    SHOWN,
    Benchmark,
    benchmark_read_by,
    load_benchmark,
    load_marked,
)
from infimed_jax.evaluation.protocols import check_protocol, grade
from infimed_jax.files import to_json


class Row(NamedTuple):
    id: str | None
    question: Question
    benchmark: Benchmark
    reply: str
    finished: bool
    """False for a reply that the token limit cut (`"finish": "length"`)."""


def grade_rows(file: Path, protocol: str, benchmark: str = "") -> Iterator[dict[str, Any]]:
    """A score for each row of a JSON Lines file: `id` where the row has one, correct, status, parsed, rule.

    A row is graded by the rules of `benchmark`, else of its own `benchmark`, else of its `meta.benchmark`, else of the
    benchmark whose adapter its `source` names, else by the general ones. UserError names the line that cannot be read.
    """
    check_protocol(protocol, load_benchmark(benchmark) if benchmark else GENERAL)
    for line, text in _lines(file):
        try:
            row = read_row(text, benchmark)
        except UserError as error:
            raise UserError(f"{file}, line {line}: {error}") from error
        verdict = grade(row.question, row.reply, row.finished, protocol, row.benchmark)
        score = {"correct": verdict.correct, "status": verdict.status, "parsed": verdict.parsed, "rule": verdict.rule}
        yield score if row.id is None else {"id": row.id, **score}


def read_row(text: str, benchmark: str = "") -> Row:
    """A line of such a file. UserError: what is wrong with it."""
    row = _object(text)
    if not isinstance(meta := row.get("meta") or {}, dict):
        raise UserError(f"`meta` must be an object, not {_short(meta)}")
    meta = {key: value if isinstance(value, str) else to_json(value) for key, value in meta.items()}
    meta.pop(SHOWN, None)
    kind, options = row.get("kind"), _texts(row, "options")
    if kind not in QUESTION_KINDS:
        raise UserError(f"`kind` must be one of {', '.join(QUESTION_KINDS)}, not {_short(kind)}")
    if shown := _texts(row, SHOWN):
        if len(shown) < len(options):
            raise UserError(f"`{SHOWN}` has {len(shown)} texts for {len(options)} options")
        meta[SHOWN] = to_json(shown)
    answer, reply, source = _text(row, "answer"), _text(row, "reply"), _text(row, "source", "")
    if kind == "choice" and (not 2 <= len(options) <= len(LETTERS)):
        raise UserError(f"a choice needs 2 to {len(LETTERS)} options, not {len(options)}")
    if kind == "choice" and (len(answer) != 1 or answer not in LETTERS[: len(options)]):
        letters = ", ".join(LETTERS[: len(options)])
        raise UserError(f"`answer` must be the letter of an option ({letters}), not {_short(answer)}")
    if kind != "choice" and options:
        raise UserError(f"a question of kind {kind} takes no options, but has {len(options)}")
    if kind == "yes_no" and (answer := answer.lower()) not in ("yes", "no"):
        raise UserError(f"`answer` must be yes or no, not {_short(answer)}")
    if (finish := row.get("finish", "stop")) not in ("stop", "length"):
        raise UserError(f"`finish` must be stop or length, not {_short(finish)}")
    id = row.get("id")
    if not isinstance(id, str | int | None):
        raise UserError(f"`id` must be text or a whole number, not {_short(id)}")
    question = Question(
        "" if id is None else str(id),
        source,
        "",
        (),
        kind,
        _text(row, "question", ""),
        answer,
        tuple(options),
        alternatives=tuple(_texts(row, "alternatives")),
        meta=meta,
    )
    if benchmark:
        found = load_benchmark(benchmark)
    elif mark := _text(row, MARK, "") or meta.get(MARK, ""):
        found = load_marked(mark)
    else:
        found = benchmark_read_by(source)
    return Row(id, question, found, reply, finish == "stop")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, by number. UserError: there is none, or one is not UTF-8."""
    number, read = 0, 0
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    read += 1
                    yield number, text
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, line {number}: not UTF-8, but another encoding: convert it") from error
    if not read:
        raise UserError(f"{file} has no row: it must be JSON Lines, an object a line")


def _object(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"no JSON object, as each line must be: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"no JSON object, as each line must be, but {_short(row)}")
    return row


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    if row.get(key) is None and default is not None:
        return default
    if key not in row:
        raise UserError(f"`{key}` is missing: the row has {', '.join(row) or 'no key'}")
    if not isinstance(row[key], str):
        raise UserError(f"`{key}` must be text, not {_short(row[key])}")
    return row[key]


def _texts(row: dict[str, Any], key: str) -> list[str]:
    texts = row.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise UserError(f"`{key}` must be a list of texts, not {_short(texts)}")
    return texts


def _short(value: Any) -> str:
    shown = to_json(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
