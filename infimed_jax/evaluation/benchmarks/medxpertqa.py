"""MedXpertQA, multimodal part (arXiv 2501.18362). Its questions end with their options; the prompt lists them again."""

from __future__ import annotations

from infimed_jax.evaluation.benchmark import Benchmark

BENCHMARK = Benchmark(
    "medxpertqa",
    adapters=("medxpertqa_mm",),
    questions=2000,
    medevalkit_tags=True,
    groups=("question_type", "medical_task", "organ"),
    published={"medevalkit-fixed": {"InfiMed-Foundation-1.7B": 0.218, "InfiMed-Foundation-4B": 0.219}},
)
