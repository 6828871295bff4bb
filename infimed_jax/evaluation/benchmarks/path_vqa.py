"""PathVQA (He et al. 2020). As VQA-RAD's, its questions are known by their answers alone."""

from __future__ import annotations

from infimed_jax.evaluation.benchmark import Benchmark
from infimed_jax.evaluation.benchmarks.vqa_rad import by_answer

BENCHMARK = Benchmark(
    "path_vqa",
    adapters=("pathvqa",),
    questions=6719,
    medevalkit_kind=by_answer,
    published={"medevalkit-fixed": {"InfiMed-Foundation-1.7B": 0.607, "InfiMed-Foundation-4B": 0.634}},
)
