"""VQA-RAD. MedEvalKit knows its questions by their answers alone: what is not yes or no is open, closed ones too."""

from __future__ import annotations

from infimed_jax.data.sample import Question, QuestionKind
from infimed_jax.evaluation.benchmark import Benchmark


def _kind(sample: Question) -> QuestionKind:
    return "open" if sample.kind == "closed" else sample.kind


BENCHMARK = Benchmark("vqa_rad", owns=lambda source: source.startswith("vqa_rad"), medevalkit_kind=_kind)
