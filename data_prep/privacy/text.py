"""Finding and masking in a text, and `scrub`, which does it to a prepared dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_prep.engine import HERE, Engine
from data_prep.privacy.patterns import KINDS, PATTERNS
from data_prep.steps.step import (
    MAX_BAD_RECORDS,
    UNREADABLE_RECORDS,
    NoSamples,
    Slice,
    Step,
    counted,
    derived,
    make_dataset,
    slices,
    unreadable_report,
)
from infimed_jax.data.records import LIST_FIELDS
from infimed_jax.data.sample import Chat, Content, Document, Question, Sample, Turn
from infimed_jax.data.storage import open_samples, write_shard
from infimed_jax.errors import UserError
from infimed_jax.progress import Report

VERSION = 6
"""Version of the patterns; raise it when they change, so that datasets are scrubbed again."""
NO_PROMISE = (
    "Patterns find some identifiers and miss others (names without a title, places, text inside the images): "
    "this is no promise of anonymity."
)
Mode = Literal["flag", "mask"]


@dataclass(frozen=True)
class Finding:
    """`text[start:end]` looks like an identifier of this kind."""

    kind: str
    start: int
    end: int


def find(text: str) -> list[Finding]:
    """What the patterns find, in order and without overlaps: the earlier wins, then the longer."""
    found = [
        Finding(kind, match.start("x"), match.end("x"))
        for kind, pattern in PATTERNS
        for match in pattern.finditer(text)
    ]
    found.sort(key=lambda f: (f.start, -f.end, KINDS.index(f.kind)))
    kept: list[Finding] = []
    for finding in found:
        if not kept or finding.start >= kept[-1].end:
            kept.append(finding)
    return kept


def mask(text: str) -> tuple[str, Counter[str]]:
    """The text with each identifier replaced by its kind, as `[DATE]`, and how many of each kind.

    Masked again it stays as it is; all other text is left alone.
    """
    counts: Counter[str] = Counter()
    while found := find(text):  # again, for what only its masked neighbour had hidden
        pieces, start = [], 0
        for finding in found:
            pieces += [text[start : finding.start], f"[{finding.kind.upper()}]"]
            start = finding.end
            counts[finding.kind] += 1
        text = "".join(pieces) + text[start:]
    return text, counts


def scrub(
    folder: Path,
    output: Path,
    mode: Mode = "mask",
    *,
    engine: Engine = HERE,
    max_bad_records: float = MAX_BAD_RECORDS,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Write the dataset `output` with identifiers flagged or masked, and the report `output.json`, which is returned.

    Both modes count the findings of a sample in `meta["identifiers"]`; only `mask` changes its text. A question whose
    answer or options hold an identifier cannot be masked and asked: `mask` leaves it out, by name. Values of `meta`,
    which tie samples to images and sources, are counted by key and left alone. No text stands in the report.
    UserError: no prepared dataset, or no sample is left.
    """
    if mode not in ("flag", "mask"):
        raise UserError(f"mode must be flag or mask, not {mode!r}")
    dataset = open_samples(folder)
    try:
        return make_dataset(
            Step(
                output,
                name="scrubbed",
                recipe={"step": "scrub", "version": VERSION, "from": dataset.fingerprint, "mode": mode},
                info=derived(dataset),
                work=partial(_scrub_shard, mode),
                pieces=slices(dataset),
                report=partial(_report, str(folder), mode),
                records=len(dataset),
                max_bad_records=max_bad_records,
            ),
            engine,
            on_progress,
        )
    except NoSamples as error:
        report = _report(str(folder), mode, {}, list(error.facts))
        raise UserError(f"no sample of {folder} is left: {report['left_out']}") from error


def _scrub_shard(mode: Mode, piece: Slice, folder: Path, name: str) -> dict[str, Any]:
    """Write the clean shard; its facts are the findings by sample, and what was left out, without any text."""
    metadata: Counter[str] = Counter()
    findings: dict[str, dict[str, int]] = {}
    left_out: list[str] = []
    unreadable: list[str] = []

    def scrubbed() -> Iterator[Sample]:
        for sample in piece.read(unreadable):
            for key, value in sample.meta.items():
                metadata.update({f"{key}: {kind}": n for kind, n in mask(value)[1].items()})
            clean, counts = scrub_sample(sample)
            if counts:
                findings[sample.id] = dict(sorted(counts.items()))
            if mode == "mask" and isinstance(sample, Question) and _gold(clean) != _gold(sample):
                left_out.append(sample.id)
                continue
            kept = clean if mode == "mask" else sample
            marks = {"identifiers": ", ".join(f"{kind}: {n}" for kind, n in sorted(counts.items()))} if counts else {}
            yield replace(kept, meta=kept.meta | marks)

    write_shard(folder, name, scrubbed())
    return {"findings": findings, "left_out": left_out, "unreadable": unreadable, "metadata": dict(metadata)}


def _report(folder: str, mode: Mode, _: dict[str, Any], facts: list[dict[str, Any]]) -> dict[str, Any]:
    findings = {id: counts for piece in facts for id, counts in piece["findings"].items()}
    left_out = [id for piece in facts for id in piece["left_out"]]
    damaged = unreadable_report(facts)
    metadata: Counter[str] = Counter()
    for piece in facts:
        metadata.update(piece["metadata"])
    return {
        "note": NO_PROMISE,
        "from": folder,
        "mode": mode,
        "found": {kind: sum(counts.get(kind, 0) for counts in findings.values()) for kind in KINDS},
        "samples_with_findings": len(findings),
        "left_out": counted({"answer or option is an identifier": len(left_out)}, damaged[UNREADABLE_RECORDS]),
        "left_out_ids": left_out,
        **damaged,
        "metadata": dict(sorted(metadata.items())),
        "findings": findings,
    }


def _gold(question: Question) -> tuple[str, ...]:
    return (question.answer, *question.options, *question.alternatives)


def scrub_sample(sample: Sample) -> tuple[Sample, Counter[str]]:
    """The sample with its text masked, `meta` and images left alone, and what was found in it."""
    counts: Counter[str] = Counter()

    def masked(text: str) -> str:
        text, found = mask(text)
        counts.update(found)
        return text

    def pieces(content: Content) -> Content:
        return tuple(masked(piece) if isinstance(piece, str) else piece for piece in content)

    if isinstance(sample, Document):
        return replace(sample, chunks=tuple(map(pieces, sample.chunks))), counts
    if isinstance(sample, Chat):
        turns = tuple(Turn(turn.role, pieces(turn.content), masked(turn.reasoning)) for turn in sample.turns)
        return replace(sample, turns=turns), counts
    texts = {field: masked(getattr(sample, field)) for field in ("question", "answer", "reasoning", "system")}
    lists = {field: tuple(map(masked, getattr(sample, field))) for field in LIST_FIELDS}
    return replace(sample, **texts, **lists), counts
