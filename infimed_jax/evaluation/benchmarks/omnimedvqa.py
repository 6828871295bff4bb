"""OmniMedVQA, open-access part (arXiv 2402.09181)."""

from __future__ import annotations

from infimed_jax.evaluation.benchmark import Benchmark

BENCHMARK = Benchmark(
    "omnimedvqa",
    adapters=("omnimedvqa",),
    questions=88_996,
    medevalkit_tags=True,
    groups=("question_type", "modality"),
    published={"medevalkit-fixed": {"InfiMed-Foundation-1.7B": 0.589, "InfiMed-Foundation-4B": 0.768}},
)
