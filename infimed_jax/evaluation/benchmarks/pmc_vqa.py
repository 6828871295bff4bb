"""PMC-VQA, version 2 (arXiv 2305.10415). MedEvalKit shows the cells of its table as they stand: ` A:text `."""

from __future__ import annotations

from collections.abc import Sequence

from infimed_jax.data.prompts import LETTERS
from infimed_jax.data.sample import Question
from infimed_jax.evaluation.benchmark import Benchmark, written


def usual_cells(options: Sequence[str]) -> list[str]:
    """The cells that most rows have; a sample carries its own where they differ."""
    return [f" {letter}:{option} " for letter, option in zip(LETTERS, options, strict=False)]


def _shown(sample: Question) -> Sequence[str]:
    return written(sample) or usual_cells(sample.options)


BENCHMARK = Benchmark(
    "pmc_vqa",
    adapters=("pmc_vqa",),
    questions=33_430,
    shown=_shown,
    published={"medevalkit-fixed": {"InfiMed-Foundation-1.7B": 0.481, "InfiMed-Foundation-4B": 0.566}},
)
