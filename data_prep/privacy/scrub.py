"""Finding and masking in a text, and `scrub`, which does it to a prepared dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_prep.pipeline import NoSamples, prepared_by, replace_dataset
from data_prep.privacy.patterns import KINDS, PATTERNS
from data_prep.sources.source import read_json
from infimed_jax.data.sample import Sample, Turn
from infimed_jax.data.storage import CorruptRecord, open_samples
from infimed_jax.errors import UserError
from infimed_jax.files import write_json

VERSION = 1
"""Of the patterns; raise it when they change, so that datasets are scrubbed again."""
NO_PROMISE = (
    "Patterns find some identifiers and miss others (names without a title, places, text inside the images): "
    "this is no promise of anonymity."
)
Mode = Literal["flag", "mask"]
Progress = Callable[[int, int, str], None]
"""(samples done, samples, a note)."""


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


def scrub(folder: Path, output: Path, mode: Mode = "mask", *, on_progress: Progress | None = None) -> dict[str, Any]:
    """Write the dataset `output` with identifiers flagged or masked, and the report `output.json`, which is returned.

    Both modes count the findings of a sample in `meta["identifiers"]`; only `mask` changes its text. A question whose
    answer or options hold an identifier cannot be masked and asked: `mask` leaves it out, by name. Values of `meta`,
    which tie samples to images and sources, are counted by key and left alone. No text stands in the report.
    UserError: no prepared dataset, or no sample is left.
    """
    if mode not in ("flag", "mask"):
        raise UserError(f"mode must be flag or mask, not {mode!r}")
    dataset = open_samples(folder)
    recipe = {"version": VERSION, "from": dataset.fingerprint, "mode": mode}
    report_file = output.with_name(f"{output.name}.json")
    if prepared_by(output, recipe) and report_file.is_file():
        return read_json(report_file, dict)
    totals, metadata, left_out = Counter(), Counter(), Counter()
    affected: dict[str, dict[str, int]] = {}
    ids: list[str] = []

    def scrubbed() -> Iterator[Sample]:
        for number in range(len(dataset)):
            if on_progress is not None:
                on_progress(
                    number, len(dataset), f"{number:,}/{len(dataset):,} samples, {len(affected):,} with findings"
                )
            try:
                sample = dataset[number]
            except CorruptRecord:
                left_out["unreadable record"] += 1
                continue
            metadata.update(
                f"{key}: {kind}" for key, value in sample.meta.items() for kind in mask(value)[1].elements()
            )
            clean, counts = scrub_sample(sample)
            if counts:
                affected[sample.id] = dict(sorted(counts.items()))
                totals.update(counts)
            if mode == "mask" and (clean.answer, clean.options) != (sample.answer, sample.options):
                left_out["answer or option is an identifier"] += 1
                ids.append(sample.id)
                continue
            kept = clean if mode == "mask" else sample
            marks = {"identifiers": ", ".join(f"{kind}: {n}" for kind, n in sorted(counts.items()))} if counts else {}
            yield replace(kept, meta=kept.meta | marks)

    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        manifest = replace_dataset(output, scrubbed(), "scrubbed", recipe | {"derived_from": dataset.manifest["info"]})
    except NoSamples as error:
        raise UserError(f"no sample of {folder} is left: {dict(left_out)}") from error
    report = {
        "note": NO_PROMISE,
        "from": str(folder),
        "mode": mode,
        "samples": manifest["samples"],
        "fingerprint": manifest["fingerprint"],
        "found": {kind: totals[kind] for kind in KINDS},
        "samples_with_findings": len(affected),
        "left_out": dict(sorted(left_out.items())),
        "left_out_ids": ids,
        "metadata": dict(sorted(metadata.items())),
        "findings": affected,
    }
    write_json(report_file, report)
    return report


def scrub_sample(sample: Sample) -> tuple[Sample, Counter[str]]:
    """The sample with its text masked, `meta` and images left alone, and what was found in its turns.

    Question, options and answer stand in the turns as well, so they are masked and not counted again.
    """
    counts: Counter[str] = Counter()

    def masked(text: str) -> str:
        text, found = mask(text)
        counts.update(found)
        return text

    turns = tuple(
        Turn(turn.role, tuple(masked(p) if isinstance(p, str) else p for p in turn.content), masked(turn.reasoning))
        for turn in sample.turns
    )
    clean = replace(
        sample,
        turns=turns,
        question=mask(sample.question)[0],
        options=tuple(mask(option)[0] for option in sample.options),
        answer=mask(sample.answer)[0],
    )
    return clean, counts
