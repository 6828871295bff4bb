"""A data source: how a dataset is declared and read, and what the adapters share."""

from __future__ import annotations

import ast
import difflib
import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.reading.faults import (
    ANSWERS_DIFFER,
    DUPLICATE,
    LANGUAGE,
    NO_ANSWER,
    NO_QUESTION,
    NO_TEXT,
    NOT_AN_OPTION,
    Unusable,
)
from data_prep.reading.files import as_list
from data_prep.reading.rows import Row
from data_prep.reading.words import (
    MARK,
    number_marks,
    script_language,
    split_marks,
    split_thoughts,
    without_letters,
    without_marks,
)
from infimed_jax.data.prompts import LETTERS
from infimed_jax.data.sample import Content, Document, Question, QuestionKind, Sample, Skipped
from infimed_jax.errors import UserError
from infimed_jax.evaluation.benchmark import MARK as BENCHMARK_MARK
from infimed_jax.evaluation.benchmark import QUESTION_SHOWN, SHOWN
from infimed_jax.files import to_json

LANGUAGES = ("en", "zh")
"""Languages in which questions can be asked."""
EQUAL_OPTIONS, MISPLACED_MARKS, IMAGES_MISSING = "equal_options", "misplaced_marks", "images_missing"
ODDITIES = {EQUAL_OPTIONS, MISPLACED_MARKS, IMAGES_MISSING}
"""Metadata of samples that are kept, by which `data ingest` counts what is odd about them."""


@dataclass(frozen=True)
class Option:
    """A setting of one source, given as `--option name=value` and passed to `read` as a keyword."""

    name: str
    help: str
    parse: Callable[[str], Any] = str
    """Text to value. Raises ValueError or UserError."""
    choices: tuple[str, ...] = ()
    """The values that it can have, if they are few."""
    default: Any = None
    required: bool = False
    names_split: bool = False
    """Whether it says which data a split consists of: then only one split is read, since all would be the same."""


LANGUAGE_OPTION = Option(
    "language", "language of the text, en or zh [zh where most of it is in Chinese signs, else none is recorded]",
    choices=LANGUAGES,
)  # fmt: skip
"""For files of one's own."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset: where it is obtained, what it may be used for, and how its files become samples."""

    name: str
    title: str
    licence: str
    """SPDX name where there is one."""
    commercial_use: bool = False
    allow_external_api: bool = False
    """Whether its text and images may be sent to a third party's service; credentialed data never."""
    training_allowed: bool = True
    """False: for evaluation only."""
    splits: tuple[str, ...] = ("train", "validation", "test")
    layout: str
    """The files that `read` expects in the input folder."""
    obtain: str
    """Where a user obtains those files."""
    read: Callable[..., Iterator[Sample | Skipped]]
    """(input folder, split, **options) to samples in a fixed order; (input folder, split, shard, **options) to those of
    one of the `shards`. UserError: the folder or a file of annotations cannot be used."""
    size: str = ""
    """As published."""
    columns: tuple[str, ...] = ()
    """The fields that are read."""
    languages: tuple[str, ...] = ("en",)
    notes: str = ""
    """What a user should know, and what has not been verified on the published files."""
    benchmark: str = ""
    """The shipped benchmark (`infimed_jax/evaluation/benchmarks`) whose layout it reads; its samples are marked so."""
    options: tuple[Option, ...] = ()
    shards: Callable[..., list[Any]] | None = None
    """(input folder, split, **options) to what can be read in parallel, such as the `Part`s of the split's files
    (`parts_of`). One after the other they give the samples of the split, ids included. None: a split is one piece."""
    module: str = ""
    """The user's module or .py file that declares it; empty for a source of this project. Set by `find_source`."""
    code: str = ""
    """SHA-256 of that module: datasets are prepared again when it changes."""
    label: str = ""
    """What its samples name as their source, if not its own name. Set by `named`."""

    @property
    def address(self) -> str:
        """The name by which `find_source` finds it, in another process as well."""
        return f"{self.module}:{self.name}" if self.module else self.name

    def samples(self, folder: Path, split: str, *shard: Any) -> Iterator[Sample | Skipped]:
        """What `read` yields, marked by the benchmark and under the label."""
        for record in self.read(folder, split, *shard):
            if self.benchmark and isinstance(record, Sample):
                record = replace(record, meta=record.meta | {BENCHMARK_MARK: self.benchmark})
            yield self._labelled(record) if self.label else record

    def _labelled(self, record: Sample | Skipped) -> Sample | Skipped:
        id = f"{self.label}/{record.id.partition('/')[2]}"
        if isinstance(record, Skipped):
            return replace(record, id=id)
        meta = dict(record.meta)
        if (image := meta.get("image_id", "")).startswith(f"{self.name}/"):
            meta["image_id"] = self.label + image[len(self.name) :]
        return replace(record, id=id, source=self.label, meta=meta)


def with_options(source: Source, given: Mapping[str, str]) -> tuple[Source, dict[str, str]]:
    """The source with its options bound, and what to record of them: secrets by a fingerprint.

    UserError: an option that the source does not have, a value that it cannot have, or a required one that is absent.
    """
    known = {option.name: option for option in source.options}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]}?" if near else f": it has {', '.join(known) or 'none'}"
            raise UserError(f"source {source.name} has no option {name!r}{hint}")
    values = {}
    for option in source.options:
        if option.name in given:
            try:
                if option.choices and given[option.name] not in option.choices:
                    raise UserError(f"it must be {' or '.join(option.choices)}, not {given[option.name]!r}")
                values[option.name] = option.parse(given[option.name])
            except (ValueError, OSError) as error:  # UserError is a ValueError
                raise UserError(f"option {option.name} of {source.name}: {error}") from error
        elif option.required:
            raise UserError(f"source {source.name} needs --option {option.name}=…: {option.help}")
        else:
            values[option.name] = option.default
    recorded = {name: str(value) for name, value in values.items() if value is not None}
    if not values:
        return source, recorded
    shards = source.shards and partial(source.shards, **values)
    return replace(source, read=partial(source.read, **values), shards=shards), recorded


class Secret(bytes):
    """Bytes that reports, recipes and tracebacks show only as a fingerprint."""

    def fingerprint(self) -> str:
        """Computed as the hashed identifiers are, so that it reveals no more than any of them."""
        return hmac.digest(self, b"fingerprint", hashlib.sha256).hex()[:16]

    __str__ = __repr__ = fingerprint


def secret_file(name: str) -> Secret:
    """The content of a file, without the newline at its end. UserError: fewer than 16 bytes."""
    secret = Secret(Path(name).read_bytes().rstrip(b"\r\n"))
    if len(secret) < 16:
        raise UserError(f"{name} must hold at least 16 bytes: openssl rand -hex 32 > {name}")
    return secret


def check_split(source: Source, split: str) -> None:
    """UserError: the source has no such split, or it may not be trained on."""
    if split in source.splits:
        return
    have = ", ".join(source.splits)
    if not source.training_allowed:
        raise UserError(f"source {source.name} is for evaluation only, never for training: it has {have}, not {split}")
    raise UserError(f"source {source.name} has no split {split!r}: its splits are {have}")


def records(
    prefix: str, rows: Iterable[Any], make: Callable[[str, Any], Sample | Iterable[Sample | Skipped]], first: int = 0
) -> Iterator[Sample | Skipped]:
    """What `make(id, row)` returns for each row, or why there is nothing: it may raise Unusable.

    Rows are numbered from `first` on; after a fault of several records, their numbers are passed over.
    """
    number = first
    for row in rows:
        id = f"{prefix}/{number:05d}"
        number += row.records if isinstance(row, Unusable) else 1
        try:
            if isinstance(row, Unusable):
                raise row
            made = make(id, row)
            yield from (made,) if isinstance(made, Sample) else made
        except Unusable as fault:
            yield Skipped(id, fault.reason, fault.detail, fault.records)


def once(rows: Iterable[Row | Unusable], field: str) -> Iterator[Row | Unusable]:
    """The rows; an Unusable that names the field's text replaces a row whose text has occurred before."""
    seen: set[str] = set()
    for row in rows:
        key = None if isinstance(row, Unusable) else text(row[field])
        yield Unusable(DUPLICATE, key) if key in seen else row
        if key is not None:
            seen.add(key)


def text(value: Any) -> str:
    """An annotation's value as stripped text: numbers become text, absent and nested values the empty string.

    NaN is how tables exported by pandas write an absent value, and 3.0 how they write 3 in a column with such a hole.
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, np.generic):  # of a TFDS set; float32 2.3 is 2.3, not the next double
        value = float(str(value)) if isinstance(value, np.floating) else value.item()
    if isinstance(value, int):
        return "" if isinstance(value, bool) else str(value)
    number = Decimal(repr(value)) if isinstance(value, float) else value
    if not isinstance(number, Decimal) or not number.is_finite():
        return ""
    return f"{number.normalize():f}" if number else "0"


def answers(value: Any) -> tuple[str, ...]:
    """The gold answers that an annotation gives, none twice: a list's values are alternatives, true is yes.

    A list may be written as text, as MMMU has it: `['8.4', '8.40']`.
    """
    if isinstance(value, str) and _LIST.fullmatch(value.strip()):
        value = _literal_list(value) or value
    texts = [_YES_NO[bool(each)] if isinstance(each, bool | np.bool_) else text(each) for each in as_list(value)]
    return tuple(dict.fromkeys(filter(None, texts)))


_YES_NO = ("no", "yes")
_LIST = re.compile(r"\[\s*['\"].*\]|\(\s*['\"].*\)", re.DOTALL)
_NO_COMMA = re.compile(r"(?<=['\"])\s+(?=['\"])")
"""Between the texts of an array as NumPy prints it, which Python would join."""


def _literal_list(literal: str) -> list[str]:
    """A Python list or tuple of strings: parsed as a literal, never evaluated. Empty for anything else."""
    try:
        value = ast.literal_eval(_NO_COMMA.sub(", ", literal.strip())) if len(literal) < 20_000 else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return list(value) if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value) else []


def need(row: Row, field: str, reason: str) -> str:
    """The field's text. Raises Unusable with `reason` if it is empty."""
    value = text(row.get(field))
    if not value:
        raise Unusable(reason)
    return value


def question_and_answers(row: Row, question: str = "question", answer: str = "answer") -> tuple[str, tuple[str, ...]]:
    """The question, and the answers that are right. Raises Unusable."""
    asked, gold = need(row, question, NO_QUESTION), answers(row.get(answer))
    if not gold:
        raise Unusable(NO_ANSWER)
    return asked, gold


def qa_sample(
    id: str,
    images: tuple[bytes, ...],
    question: str,
    gold: Sequence[str],
    meta: Mapping[str, str],
    answer_type: str = "",
) -> Sample:
    """A question with its gold answers in text, any of which is right. `id` is `source/split/…`.

    It is yes/no by its answer, otherwise closed or open by its type; a think block before the first answer is its
    reasoning. Raises Unusable: yes and no are both right, or what `split_thoughts` and `without_marks` refuse.
    """
    source, split = id.split("/")[:2]
    reasoning, first = split_thoughts(gold[0])
    if reasoning and (final := _FINAL.fullmatch(first)):
        first = final[1] or final[2]
    gold = tuple(dict.fromkeys((first.strip(), *(split_thoughts(answer)[1].strip() for answer in gold[1:]))))
    if not all(gold):
        raise Unusable(NO_ANSWER)
    verdicts = {answer.lower() for answer in gold} & {*_YES_NO}
    if len(verdicts) == 2:
        raise Unusable(ANSWERS_DIFFER)
    kind: QuestionKind = "closed" if answer_type == "CLOSED" else "open"
    if verdicts and len({answer.lower() for answer in gold}) == 1:
        kind, gold = "yes_no", tuple(verdicts)
    asked = without_marks(question, len(images), _known_language(meta))
    return Question(
        id, source, split, images, kind, asked, gold[0], reasoning=reasoning, alternatives=gold[1:], meta=dict(meta)
    )


_FINAL = re.compile(r"\\boxed\{(.+)\}|<answer>(.+)</answer>", re.DOTALL)
"""An answer alone, as it stands behind thoughts."""


def _known_language(meta: Mapping[str, str]) -> str:
    """The language of a question. Raises Unusable if there is no wording for it."""
    language = meta.get("language", "en")
    if language not in LANGUAGES:
        raise Unusable(LANGUAGE, language[:20])
    return language


def choice_sample(
    id: str, images: tuple[bytes, ...], question: str, options: Iterable[str], letter: str, meta: Mapping[str, str]
) -> Sample:
    """A multiple choice. Letters before the options go, the prompt writes them; empty ones at the end fall away.

    Raises Unusable if no option has the letter, or as `without_marks`.
    """
    source, split = id.split("/")[:2]
    options = without_letters(tuple(options))
    if not 2 <= len(options) <= len(LETTERS) or len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise Unusable(NOT_AN_OPTION)
    if not options[LETTERS.index(letter)]:
        raise Unusable(NOT_AN_OPTION, "its option is empty")
    meta = dict(meta)
    if len({option.casefold() for option in options}) < len(options):
        meta[EQUAL_OPTIONS] = "true"
    question = without_marks(question, len(images), _known_language(meta))
    return Question(id, source, split, images, "choice", question, letter, options, meta=meta)


def caption_sample(id: str, images: tuple[bytes, ...], caption: str, meta: Mapping[str, str]) -> Sample:
    """A pretraining document: the images, a newline, the caption; images stand where the caption has their marks.

    Raises Unusable if there is no caption, or another number of marks than of images.
    """
    pieces = split_marks(caption)
    words = [piece for piece in pieces if piece != MARK]
    if not "".join(words).strip():
        raise Unusable(NO_TEXT)
    source, split = id.split("/")[:2]
    if len(words) == len(pieces):
        content: Content = (*range(len(images)), f"\n{caption}")
    else:
        content = number_marks(pieces, range(len(images)))
    return Document(id, source, split, images, (content,), meta=dict(meta))


def language_of(given: str | None, words: str) -> str:
    """The language that was given, else `zh` where most of the words are in Chinese signs, else none."""
    return given or ("zh" if script_language(words) == "zh" else "")


def as_published(row: Row, question: str, lines: Sequence[str] = (), usual: Sequence[str] = ()) -> dict[str, str]:
    """Entries of `meta` for what a benchmark's prompt shows otherwise than the sample has it.

    They are the blanks around the question, and a choice's `lines` where they are not the `usual` ones.
    """
    asked = row[question]
    kept = {QUESTION_SHOWN: asked} if isinstance(asked, str) and asked != asked.strip() else {}
    return kept | ({SHOWN: to_json(list(lines), ensure_ascii=False)} if list(lines) != list(usual) else {})


def image_name(cell: Any) -> str:
    """The name of the one image of a cell as `Images.cells` takes it; empty for several, and for one without a name."""
    cells = as_list(cell)
    name = cells[0] if len(cells) == 1 else ""
    name = name.get("path") if isinstance(name, dict) and not name.get("bytes") else name
    return name if isinstance(name, str) and len(name) < 1000 and not re.match(r"[\w+.-]+:", name) else ""


def filled(**meta: Any) -> dict[str, str]:
    """The metadata values that are not empty, as text."""
    return {key: value for key, value in ((key, text(value)) for key, value in meta.items()) if value}
