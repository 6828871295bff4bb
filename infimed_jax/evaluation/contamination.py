"""Test questions that training data hold: accuracy on the others is what a score may claim."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from infimed_jax.data.sample import Sample
from infimed_jax.data.storage import Samples
from infimed_jax.errors import UserError

GROUPING = "contamination"
CLEAN, IMAGE, QUESTION, APART, SAME = "none", "image", "question", "image, question", "image with question"
WORDS = {
    CLEAN: "nothing of it",
    IMAGE: "its image",
    QUESTION: "its question",
    APART: "its image and its question, apart",
    SAME: "its image with its question",
}


def mark(samples: Iterable[Sample], dataset: Samples, reports: Sequence[Path]) -> list[Sample]:
    """The samples of `dataset` with `meta["contamination"]`: what of each the training data have, all reports together.

    "image with question" is the whole of it, "image, question" are the two in different samples. `reports` are those
    of `data decontaminate`, whose inputs the model was trained on. UserError: no such report, or one that looked at
    other test questions.
    """
    found: dict[str, set[str]] = {"image": set(), "question": set(), "both": set()}
    for report in reports:
        for how, ids in _affected(report, dataset).items():
            found[how] |= set(ids)
    return [replace(sample, meta=sample.meta | {GROUPING: _what(sample.id, found)}) for sample in samples]


def _what(id: str, found: dict[str, set[str]]) -> str:
    if id in found["both"]:
        return SAME
    image, question = id in found["image"], id in found["question"]
    return APART if image and question else IMAGE if image else QUESTION if question else CLEAN


def _affected(report: Path, dataset: Samples) -> dict[str, list[str]]:
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        affected = {how: list(content["affected"][how]) for how in ("image", "question", "both")}
        looked_at = content["test_fingerprints"]
    except OSError as error:
        raise UserError(f"cannot read the report {report}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report} is no report of `data decontaminate` (of this version): run that again") from error
    if dataset.fingerprint not in looked_at:
        raise UserError(
            f"{report} is about other test questions than {dataset.folder}: run `data decontaminate` with "
            f"--test {dataset.folder}"
        )
    return affected
