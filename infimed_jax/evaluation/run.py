"""Have every question of a test set answered and grade the replies: respondent → verdicts → one summary.

No question is ever left out: an image that cannot be decoded ends the run by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax

from infimed_jax import config
from infimed_jax.data.sample import Kind, Question, Sample
from infimed_jax.errors import UserError
from infimed_jax.evaluation.answers import Status
from infimed_jax.evaluation.benchmark import GENERAL, Benchmark, benchmark_of, load_benchmark
from infimed_jax.evaluation.contamination import GROUPING
from infimed_jax.evaluation.protocols import ask, check_protocol, grade
from infimed_jax.evaluation.respondents import Reply, Respondent, Terms
from infimed_jax.evaluation.statistics import Accuracy, Comparison, accuracy, compare
from infimed_jax.files import make_folder, to_json, write_json, write_text

GROUPS = ("kind", "source", "modality", "organ", "template", "question_type", "answer_type", "language", GROUPING)
"""What accuracy is broken down by, where the questions have it."""
NO_GROUP = "(none)"


@dataclass(frozen=True)
class Record:
    """One graded question."""

    id: str
    image_id: str
    """`source/image`: questions with the same one are one cluster."""
    source: str
    kind: Kind
    question: str
    answer: str
    """Gold."""
    correct: bool
    status: Status | Literal["unread"]
    parsed: str | None
    rule: str
    """How it was scored, in the protocol's words."""
    reply: str
    finish: Literal["stop", "length"]
    tokens: int
    """Generated, without the stop token."""
    meta: dict[str, str] = field(default_factory=dict)


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

    def rate(self, status: Status | Literal["unread"]) -> float:
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
        """`replies.jsonl`, a record a line, and `summary.json` in an existing folder; each whole or not at all."""
        lines = [to_json(asdict(record), ensure_ascii=False) for record in self.records]
        write_text(folder / "replies.jsonl", "\n".join(lines) + "\n")
        write_json(folder / "summary.json", self.summary())


def evaluate(
    samples: Sequence[Sample], respond: Respondent, terms: Terms, *, folder: str | Path | None = None, name: str = ""
) -> Evaluation:
    """Have every sample answered and grade the replies; `respond` asks as `terms` says.

    With a `folder`, `replies.jsonl` and `summary.json` are written there. Raises UserError for an unknown protocol,
    samples without a gold answer, equal ids, and a folder that cannot be written.
    """
    check_protocol(terms.protocol, load_benchmark(terms.benchmark) if terms.benchmark else GENERAL)
    _check(samples)
    if folder is not None and jax.process_index() == 0:
        make_folder(Path(folder))
    began = time.monotonic()
    benchmarks = [benchmark_of(sample, terms.benchmark) for sample in samples]
    pairs = zip(samples, benchmarks, strict=True)
    replies = respond([ask(sample, terms.protocol, of, terms.all_images) for sample, of in pairs])
    records = tuple(_grade(*each, terms.protocol) for each in zip(samples, replies, benchmarks, strict=True))
    groupings = (*GROUPS, *sorted({name for benchmark in benchmarks for name in benchmark.groups} - {*GROUPS}))
    result = Evaluation(name, terms, fingerprint(samples), time.monotonic() - began, records, groupings)
    if folder is not None and jax.process_index() == 0:
        result.write(Path(folder))
    return result


def read_evaluation(folder: Path) -> Evaluation:
    """What `Evaluation.write` left in a folder."""
    values = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {name: values[name] for name in ("protocol", "reasoning", "image", "benchmark", "all_images")}
    return Evaluation(
        name=values["name"],
        terms=Terms(config.Sampling(**values["sampling"]), **asked),
        fingerprint=values["fingerprint"],
        seconds=values["seconds"],
        records=tuple(Record(**json.loads(line)) for line in lines),
        groupings=tuple(values["groups"]),
    )


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


def fingerprint(samples: Sequence[Question]) -> str:
    """16 hexadecimal digits of what is asked, whatever the order of the samples."""
    rows = sorted(
        (s.id, s.kind, s.question, list(s.options), [s.answer, *s.alternatives], [_digest(image) for image in s.images])
        for s in samples
    )
    return hashlib.sha256(to_json(rows).encode()).hexdigest()[:16]


def image_id(sample: Sample) -> str:
    """The cluster of a question: its source's image id, else its images' digest, else (no image) its own id."""
    own = sample.meta.get("image_id") or "".join(_digest(image)[:16] for image in sample.images)
    return f"{sample.source}/{own}" if own else sample.id


def _check(samples: Sequence[Sample]) -> None:
    if not samples:
        raise UserError("the test set is empty: there is nothing to evaluate")
    for sample in samples:
        if not isinstance(sample, Question):
            raise UserError(f"sample {sample.id} is a {sample.kind} without a gold answer: evaluate questions only")
    ids = {sample.id for sample in samples}
    if len(ids) < len(samples):
        raise UserError(f"{len(samples) - len(ids)} of {len(samples)} questions repeat an id: each must be its own")


def _grade(sample: Question, reply: Reply, benchmark: Benchmark, protocol: str) -> Record:
    verdict = grade(sample, reply.text, reply.finish == "stop", protocol, benchmark)
    return Record(
        id=sample.id,
        image_id=image_id(sample),
        source=sample.source,
        kind=sample.kind,
        question=sample.question,
        answer=sample.answer,
        correct=verdict.correct,
        status=verdict.status,
        parsed=verdict.parsed,
        rule=verdict.rule,
        reply=reply.text,
        finish=reply.finish,
        tokens=reply.tokens,
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
