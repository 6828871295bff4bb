"""What a benchmark is: how its questions are asked and graded where that differs from the protocols' general rules.

Its modules are `benchmarks/`; one from outside is named by its module or file. Each has a `BENCHMARK`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from infimed_jax import plugins
from infimed_jax.data.prompts import Wording, lettered, question_text
from infimed_jax.data.sample import Question, QuestionKind
from infimed_jax.errors import UserError
from infimed_jax.evaluation.answers import Status

ROOM = "infimed_jax.evaluation.benchmarks"
MARK = "benchmark"
"""The entry of `meta` that names the benchmark whose adapter made a sample."""
SHOWN = "options_shown"
"""The entry of `meta` with a choice's options as the published file writes them, a JSON list of texts."""
QUESTION_SHOWN = "question_shown"
"""The entry of `meta` with a question's text as the published file writes it, blanks around it included."""


@dataclass(frozen=True)
class Verdict:
    correct: bool
    status: Status | Literal["unread"]
    """`unparsed` and `truncated` are counted apart; a compatibility protocol may call a truncated reply correct.
    `unread`: the harness would draw an answer at random; nothing is drawn here, and the reply is not correct."""
    parsed: str | None
    """The answer as the protocol read it."""
    rule: str
    """How the question was scored."""


Grade = Callable[[Question, str, bool], Verdict]
"""`(sample, reply, finished) -> verdict`."""


def options_shown(sample: Question) -> Sequence[str]:
    """A choice's options as its published file writes them, otherwise `A. text`."""
    return written(sample) or lettered(sample.options)


def written(sample: Question) -> Sequence[str]:
    """The options that the sample carries in `meta["options_shown"]`; none where it carries none.

    They may be more than its own: an empty cell at the end of a table's row is shown, and is no option.
    """
    given = json.loads(sample.meta.get(SHOWN, "[]"))
    if given and len(given) < len(sample.options):
        raise UserError(f"sample {sample.id}: {SHOWN} has {len(given)} texts for {len(sample.options)} options")
    return given


def _unchanged(sample: Question) -> Question:
    return sample


def _own_kind(sample: Question) -> QuestionKind:
    return sample.kind


@dataclass(frozen=True)
class Benchmark:
    name: str
    adapters: tuple[str, ...] = ()
    """The data sources (`data_prep/sources`) that read its published layouts, the usual one first."""
    split: str = "test"
    """The adapters' split that is scored."""
    questions: int = 0
    """How many that split has as published; 0: not known."""
    ask: Callable[[Question], Question] = _unchanged
    """The question as this benchmark asks it, before it is worded."""
    shown: Callable[[Question], Sequence[str]] = options_shown
    """A choice's options, a line each, as they are asked and as MedEvalKit compares a reply with them."""
    wording: Wording | None = None
    """The words around the question; None: the general ones, around the options as shown."""
    medevalkit_kind: Callable[[Question], QuestionKind] = _own_kind
    """The kind as which MedEvalKit asks and grades a question."""
    medevalkit_strips: bool = True
    """Whether MedEvalKit takes the blanks off a reply that is no choice."""
    medevalkit_tags: bool = False
    """Whether MedEvalKit reads an answer tag of a reply to a choice before anything else of it."""
    medevalkit_images: int | None = None
    """How many of a question's images MedEvalKit sends; None: all."""
    grades: Mapping[str, Grade] = field(default_factory=dict)
    """Rules of its own by protocol, which may be a new one; other protocols grade by their general rules."""
    groups: tuple[str, ...] = ()
    """Further entries of `meta` by which accuracy is broken down."""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Published accuracy by protocol and model, to be shown beside the measured one."""

    def words(self, question: Question, reasoning: bool) -> str:
        """The text of the user's turn."""
        if self.wording is not None:
            return self.wording(question, reasoning)
        return question_text(question, reasoning, self.shown(question) if question.options else ())


GENERAL = Benchmark("general")
"""The rules of questions of no benchmark."""


@functools.cache
def load_benchmark(name: str) -> Benchmark:
    """The benchmark that a module of the room, a dotted module or a .py file defines; UserError where there is none."""
    found: Any = getattr(plugins.load(ROOM, name, "--benchmark"), "BENCHMARK", None)
    if not isinstance(found, Benchmark):
        raise UserError(f"--benchmark {name}: the module has no BENCHMARK of type {__name__}.Benchmark")
    return found


def benchmark_of(sample: Question, name: str = "") -> Benchmark:
    """The benchmark of that name; without one, the benchmark whose adapter made the sample, otherwise GENERAL."""
    if name:
        return load_benchmark(name)
    return load_marked(sample.meta[MARK]) if MARK in sample.meta else GENERAL


@functools.cache
def load_marked(mark: str) -> Benchmark:
    """The shipped benchmark that data name. UserError for another name: data never make code of others run."""
    if mark not in (shipped := plugins.names(ROOM)):
        raise UserError(
            f"the data name the benchmark {mark!r}, not one of {', '.join(shipped)}: name it by --benchmark"
        )
    return load_benchmark(mark)


@functools.cache
def benchmark_read_by(adapter: str) -> Benchmark:
    """The shipped benchmark that declares this adapter, otherwise GENERAL."""
    shipped = (load_benchmark(name) for name in plugins.names(ROOM))
    return next((benchmark for benchmark in shipped if adapter in benchmark.adapters), GENERAL)
