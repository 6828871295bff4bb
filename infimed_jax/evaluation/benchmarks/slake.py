"""SLAKE (arXiv 2102.09542). MedEvalKit goes by its type of answer, and does not strip replies."""

from __future__ import annotations

from infimed_jax.data.sample import Question, QuestionKind
from infimed_jax.evaluation.benchmark import Benchmark


def _kind(sample: Question) -> QuestionKind:
    """Yes and no are closed answers like any other: the answer is "Yes" there."""
    if sample.kind == "choice":
        return "choice"
    return "open" if sample.meta.get("answer_type", sample.kind).upper() == "OPEN" else "closed"


BENCHMARK = Benchmark(
    "slake",
    adapters=("slake",),
    questions=2094,
    medevalkit_kind=_kind,
    medevalkit_strips=False,
    groups=("language", "answer_type", "question_type", "modality", "organ"),
    published={"medevalkit-fixed": {"InfiMed-Foundation-1.7B": 0.753, "InfiMed-Foundation-4B": 0.777}},
)
