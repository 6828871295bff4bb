"""VQA-RAD (Lau et al. 2018). MedEvalKit knows its questions by their answers alone: what is not yes or no is open,
closed ones too."""

from __future__ import annotations

from infimed_jax.data.sample import Question, QuestionKind
from infimed_jax.evaluation.benchmark import Benchmark


def by_answer(sample: Question) -> QuestionKind:
    """Yes or no, otherwise open; a choice stays one."""
    return "open" if sample.kind == "closed" else sample.kind


BENCHMARK = Benchmark(
    "vqa_rad",
    adapters=("vqa_rad_hf", "vqa_rad"),
    questions=451,
    medevalkit_kind=by_answer,
    groups=("answer_type", "question_type", "organ"),
    published={"medevalkit-fixed": {"InfiMed-Foundation-1.7B": 0.563, "InfiMed-Foundation-4B": 0.579}},
)
