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
    owns=lambda source: source.lower().startswith("slake"),
    medevalkit_kind=_kind,
    medevalkit_strips=False,
)
