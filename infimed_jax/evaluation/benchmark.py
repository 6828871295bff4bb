"""What a benchmark is: how its questions are asked and graded where that differs from the protocols' general rules.

Its modules are `benchmarks/`; one from outside is named by its module or file. Each has a `BENCHMARK`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infimed_jax import plugins
from infimed_jax.data.prompts import Wording, question_text
from infimed_jax.data.sample import Question, QuestionKind
from infimed_jax.errors import UserError
from infimed_jax.evaluation.answers import Status

ROOM = "infimed_jax.evaluation.benchmarks"


@dataclass(frozen=True)
class Verdict:
    correct: bool
    status: Status
    """`unparsed` and `truncated` are counted apart; a compatibility protocol may call a truncated reply correct."""
    parsed: str | None
    """The answer as the protocol read it."""
    rule: str
    """How the question was scored."""


Grade = Callable[[Question, str, bool], Verdict]
"""`(sample, reply, finished) -> verdict`."""


def _unchanged(sample: Question) -> Question:
    return sample


def _own_kind(sample: Question) -> QuestionKind:
    return sample.kind


@dataclass(frozen=True)
class Benchmark:
    name: str
    owns: Callable[[str], bool] = lambda source: False
    """Whether a source's questions are this benchmark's; asked where no benchmark is named."""
    ask: Callable[[Question], Question] = _unchanged
    """The question as this benchmark asks it, before it is worded."""
    wording: Wording = question_text
    """The words around the question."""
    medevalkit_kind: Callable[[Question], QuestionKind] = _own_kind
    """The kind as which MedEvalKit asks and grades a question."""
    medevalkit_strips: bool = True
    """Whether MedEvalKit takes the blanks off a reply that is no choice."""
    grades: Mapping[str, Grade] = field(default_factory=dict)
    """Rules of its own by protocol, which may be a new one; other protocols grade by their general rules."""
    groups: tuple[str, ...] = ()
    """Further entries of `meta` by which accuracy is broken down."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Published accuracy by protocol, to be shown beside the measured one."""


GENERAL = Benchmark("general")
"""The rules of questions that no benchmark owns."""


@functools.cache
def load_benchmark(name: str) -> Benchmark:
    """The benchmark that a module of the room, a dotted module or a .py file defines; UserError where there is none."""
    found: Any = getattr(plugins.load(ROOM, name, "--benchmark"), "BENCHMARK", None)
    if not isinstance(found, Benchmark):
        raise UserError(f"--benchmark {name}: the module has no BENCHMARK of type {__name__}.Benchmark")
    return found


@functools.cache
def benchmark_of(source: str, name: str = "") -> Benchmark:
    """The benchmark of that name; without one, the shipped benchmark that owns the source, or GENERAL."""
    if name:
        return load_benchmark(name)
    shipped = (load_benchmark(name) for name in plugins.names(ROOM))
    return next((benchmark for benchmark in shipped if benchmark.owns(source)), GENERAL)
