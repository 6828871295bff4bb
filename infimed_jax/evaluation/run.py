"""Have every question of a test set answered and grade the replies: respondent → verdicts → one summary.

No question is ever left out: an image that cannot be decoded ends the run by name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax

from infimed_jax import config
from infimed_jax.data.sample import Kind, Question, Sample
from infimed_jax.errors import UserError
from infimed_jax.evaluation.answers import Status
from infimed_jax.evaluation.benchmark import GENERAL, MARK, benchmark_of, load_benchmark
from infimed_jax.evaluation.contamination import GROUPING
from infimed_jax.evaluation.journal import REPLIES, Journal
from infimed_jax.evaluation.protocols import ask, check_protocol, grade
from infimed_jax.evaluation.respondents import Reply, Respondent, Terms
from infimed_jax.evaluation.statistics import Accuracy, Comparison, accuracy, compare
from infimed_jax.files import to_json, write_json, write_text

GROUPS = ("kind", "source", "modality", "organ", "template", "question_type", "answer_type", "language", GROUPING)
"""What accuracy is broken down by, where the questions have it."""
NO_GROUP = "(none)"
SCORES = "scores.jsonl"
SCORE = ("id", "kind", "correct", "status", "parsed", "rule", "prompt_sha256")
"""What `scores.jsonl` takes of a record."""
_HOW_ONLY = ("slots", "burst", "share_images")
"""Settings of decoding that change how a reply is computed, not the reply."""
CHUNK = 2048
"""Questions in memory at once, with their decoded images: 0.9 GB at 384 pixels."""
Outcome = Status | Literal["unread", "unanswered"]
"""How a reply was read; `unanswered`: there is none."""


@dataclass(frozen=True)
class Record:
    """One graded question."""

    id: str
    image_id: str
    """`source/image`: questions with the same one are one cluster."""
    source: str
    kind: Kind
    question: str
    options: tuple[str, ...]
    answer: str
    """Gold."""
    alternatives: tuple[str, ...]
    """Further answers that are right."""
    correct: bool
    status: Outcome
    parsed: str | None
    rule: str
    """How it was scored, in the protocol's words."""
    reply: str
    finish: Literal["stop", "length"]
    tokens: int
    """Generated, without the stop token."""
    prompt_sha256: str
    """Of the text of the user's turn, without blanks around it."""
    meta: dict[str, str] = field(default_factory=dict)

    def asked(self) -> Question:
        """The question, without its images."""
        return Question(
            self.id, self.source, "", (), self.kind, self.question, self.answer, self.options,
            alternatives=self.alternatives, meta=self.meta,
        )  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    name: str
    terms: Terms
    fingerprint: str
    """Digest of the questions, answers and images; runs with another one cannot be compared."""
    seconds: float
    records: tuple[Record, ...]
    """In the order of the samples."""
    groupings: tuple[str, ...] = GROUPS
    """What accuracy is broken down by, where the questions have it."""

    @cached_property
    def accuracy(self) -> Accuracy:
        return accuracy(self.records)

    def groups(self) -> dict[str, dict[str, Accuracy]]:
        """`{grouping: {value: accuracy}}` for each grouping that any question has."""
        tables: dict[str, dict[str, Accuracy]] = {}
        for grouping in self.groupings:
            members: dict[str, list[Record]] = defaultdict(list)
            for record in self.records:
                members[_group(record, grouping)].append(record)
            if set(members) != {NO_GROUP}:
                tables[grouping] = {value: accuracy(members[value]) for value in sorted(members)}
        return tables

    def rate(self, status: Outcome) -> float:
        """Share of the questions whose reply has this status."""
        return sum(record.status == status for record in self.records) / len(self.records)

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds: plain values, NaN as null."""
        return {
            "name": self.name,
            "benchmark": self.terms.benchmark,
            "protocol": self.terms.protocol,
            "reasoning": self.terms.reasoning,
            "image": self.terms.image,
            "all_images": self.terms.all_images,
            **_plain(self.accuracy),
            "unparsed_rate": self.rate("unparsed"),
            "truncated_rate": self.rate("truncated"),
            "unread_rate": self.rate("unread"),
            "unanswered_rate": self.rate("unanswered"),
            "empty_rate": sum(not record.reply.strip() for record in self.records) / len(self.records),
            "length_limit_rate": sum(record.finish == "length" for record in self.records) / len(self.records),
            "max_tokens": self.terms.sampling.max_tokens,
            "mean_tokens": sum(record.tokens for record in self.records) / len(self.records),
            "sampling": asdict(self.terms.sampling),
            "rules": sorted({record.rule for record in self.records}),
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "groups": {
                grouping: {value: _plain(share) for value, share in table.items()}
                for grouping, table in self.groups().items()
            },
        }

    def write(self, folder: Path) -> None:
        """`replies.jsonl`, a record a line, `scores.jsonl`, its verdicts alone, and `summary.json`, in an existing
        folder; each whole or not at all."""
        rows = [asdict(record) for record in self.records]
        scores = [{"benchmark": row["meta"].get(MARK, "")} | {name: row[name] for name in SCORE} for row in rows]
        for file, values in ((REPLIES, rows), (SCORES, scores)):
            write_text(folder / file, "".join(to_json(row, ensure_ascii=False) + "\n" for row in values))
        write_json(folder / "summary.json", self.summary())


def evaluate(
    samples: Iterable[Sample],
    respondent: Respondent,
    terms: Terms,
    *,
    folder: str | Path | None = None,
    name: str = "",
) -> Evaluation:
    """Have every sample answered, as `terms` says, and grade the replies.

    `samples` is iterated twice, and CHUNK of them are in memory at once. With a `folder`, replies are kept there as
    they come, the same call goes on after a stop, and at the end it has `replies.jsonl`, `scores.jsonl` and
    `summary.json`. `name` says in it who answers. Raises UserError for an unknown protocol, samples
    without a gold answer, equal ids, and a folder that holds another evaluation or cannot be written.
    """
    check_protocol(terms.protocol, load_benchmark(terms.benchmark) if terms.benchmark else GENERAL)
    began = time.monotonic()
    survey = _survey(samples, respondent, terms)
    asked = {"model": respondent.identity, **asdict(terms), "questions": survey.fingerprint}
    asked["sampling"] = {name: value for name, value in asked["sampling"].items() if name not in _HOW_ONLY}
    records: list[Record] = []
    with Journal(Path(folder) if folder is not None else None, asked) as journal:
        for chunk in _chunks(samples):
            first = len(records)
            todo = [place for place in range(len(chunk)) if first + place not in journal.replies]
            if todo:
                questions = [_asked(sample, terms) for sample in chunk]
                respondent.answer(questions, first, todo, journal.put)
            for place, sample in enumerate(chunk):
                records.append(_grade(sample, journal.replies[first + place], terms))
        groupings = (*GROUPS, *sorted(survey.groups - {*GROUPS}))
        result = Evaluation(name, terms, survey.fingerprint, time.monotonic() - began, tuple(records), groupings)
        if folder is not None and jax.process_index() == 0:
            result.write(Path(folder))
        journal.finish()
    return result


def _asked(sample: Question, terms: Terms) -> Question:
    return ask(sample, terms.protocol, benchmark_of(sample, terms.benchmark), terms.all_images)


def _chunks(samples: Iterable[Sample]) -> Iterator[list[Any]]:
    rest = iter(samples)
    while chunk := list(itertools.islice(rest, CHUNK)):
        yield chunk


@dataclass(frozen=True)
class _Survey:
    """What is known of the questions before any is asked."""

    fingerprint: str
    groups: frozenset[str]
    """Entries of `meta` by which their benchmarks break accuracy down."""


def _survey(samples: Iterable[Sample], respondent: Respondent, terms: Terms) -> _Survey:
    """The first pass. UserError as `evaluate`."""
    rows: list[Any] = []
    groups: set[str] = set()
    for chunk in _chunks(samples):
        for sample in chunk:
            if not isinstance(sample, Question):
                raise UserError(f"sample {sample.id} is a {sample.kind} without a gold answer: evaluate questions only")
            rows.append(_row(sample))
            groups.update(benchmark_of(sample, terms.benchmark).groups)
        respondent.survey([_asked(sample, terms) for sample in chunk])
    if not rows:
        raise UserError("the test set is empty: there is nothing to evaluate")
    if repeated := len(rows) - len({id for id, *_ in rows}):
        raise UserError(f"{repeated} of {len(rows)} questions repeat an id: each must be its own")
    return _Survey(_digest_rows(rows), frozenset(groups))


def read_evaluation(folder: Path) -> Evaluation:
    """What `Evaluation.write` left in a folder."""
    values = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / REPLIES).read_text(encoding="utf-8").splitlines()
    asked = {name: values[name] for name in ("protocol", "reasoning", "image", "benchmark", "all_images")}
    return Evaluation(
        name=values["name"],
        terms=Terms(config.Sampling(**values["sampling"]), **asked),
        fingerprint=values["fingerprint"],
        seconds=values["seconds"],
        records=tuple(map(_record, lines)),
        groupings=tuple(values["groups"]),
    )


def _record(line: str) -> Record:
    row = json.loads(line)
    return Record(**row | {name: tuple(row[name]) for name in ("options", "alternatives")})


def compare_runs(a: Evaluation, b: Evaluation) -> Comparison:
    """a minus b, paired by question. Raises UserError for other questions, another protocol or another benchmark."""
    if a.fingerprint != b.fingerprint:
        raise UserError(f"{a.name or 'a'} and {b.name or 'b'} answered different questions: evaluate both on one set")
    if (a.terms.protocol, a.terms.benchmark) != (b.terms.protocol, b.terms.benchmark):
        rules = " and ".join(f"{x.terms.benchmark or 'by mark'}/{x.terms.protocol}" for x in (a, b))
        raise UserError(f"scores of protocols {rules} are not comparable: grade both by one")
    return compare(a.records, b.records)


def image_gain(seeing: Evaluation, blind: Evaluation) -> Comparison:
    """What the images are worth: a run that sees them against the blind control."""
    if not seeing.terms.image or blind.terms.image:
        raise UserError("the gain of the images needs a run with them and the blind control, in this order")
    return compare_runs(seeing, blind)


def fingerprint(samples: Iterable[Question]) -> str:
    """16 hexadecimal digits of what is asked, whatever the order of the samples."""
    return _digest_rows([_row(sample) for sample in samples])


def _row(sample: Question) -> tuple[Any, ...]:
    images, golds = [_digest(image) for image in sample.images], [sample.answer, *sample.alternatives]
    return sample.id, sample.kind, sample.question, list(sample.options), golds, images


def _digest_rows(rows: list[Any]) -> str:
    return hashlib.sha256(to_json(sorted(rows)).encode()).hexdigest()[:16]


def image_id(sample: Sample) -> str:
    """The cluster of a question: its source's image id, else its images' digest, else (no image) its own id."""
    own = sample.meta.get("image_id") or "".join(_digest(image)[:16] for image in sample.images)
    return f"{sample.source}/{own}" if own else sample.id


def _grade(sample: Question, reply: Reply, terms: Terms) -> Record:
    benchmark = benchmark_of(sample, terms.benchmark)
    if reply.given:
        verdict = grade(sample, reply.text, reply.finish == "stop", terms.protocol, benchmark)
        status, parsed, rule = verdict.status, verdict.parsed, verdict.rule
    else:
        verdict, status, parsed, rule = None, "unanswered", None, "no reply"
    prompt = terms.wording(_asked(sample, terms), terms.reasoning)
    return Record(
        id=sample.id,
        image_id=image_id(sample),
        source=sample.source,
        kind=sample.kind,
        question=sample.question,
        options=sample.options,
        answer=sample.answer,
        alternatives=sample.alternatives,
        correct=verdict is not None and verdict.correct,
        status=status,
        parsed=parsed,
        rule=rule,
        reply=reply.text,
        finish=reply.finish,
        tokens=reply.tokens,
        prompt_sha256=hashlib.sha256(prompt.strip().encode()).hexdigest(),
        meta=dict(sample.meta),
    )


def _group(record: Record, grouping: str) -> str:
    if grouping == "kind":
        return record.kind
    if grouping == "source":
        return record.source
    return record.meta.get(grouping) or NO_GROUP


def _plain(share: Accuracy) -> dict[str, Any]:
    error = share.standard_error
    return {
        "accuracy": share.accuracy,
        "correct": share.correct,
        "n": share.n,
        "images": share.images,
        "interval": [share.low, share.high],
        "standard_error": None if math.isnan(error) else error,
    }


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()
