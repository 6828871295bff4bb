"""From a reply to a verdict, under one of three named protocols whose scores are never mixed.

`strict` is the project's own. The other two repeat MedEvalKit's rules (`medevalkit.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation import medevalkit
from infimed_jax.evaluation.answers import answer_of, matches
from infimed_jax.evaluation.benchmark import QUESTION_SHOWN, Benchmark, Verdict


def grade_strict(sample: Question, reply: str, finished: bool, _: Benchmark) -> Verdict:
    """The project's own answer grammar (`answers.py`)."""
    parsed = answer_of(sample, reply, finished)
    return Verdict(matches(parsed, sample), parsed.status, parsed.value, f"grammar, {sample.kind}")


PROTOCOLS: dict[str, Callable[[Question, str, bool, Benchmark], Verdict]] = {
    "strict": grade_strict,
    "medevalkit-fixed": medevalkit.grade_fixed,
    "medevalkit-2025-06": medevalkit.grade_first,
}


def check_protocol(protocol: str, benchmark: Benchmark) -> None:
    """UserError for a protocol that neither this module nor the benchmark has."""
    if protocol not in (known := {**PROTOCOLS, **benchmark.grades}):
        raise UserError(f"unknown protocol {protocol!r}; there are {', '.join(known)}")


def ask(sample: Question, protocol: str, benchmark: Benchmark, all_images: bool = False) -> Question:
    """The question as its file, the benchmark and the protocol's harness put it.

    It has the images that the harness sends, or all of them.
    """
    shown = sample.meta.get(QUESTION_SHOWN) if benchmark.adapters else None  # other data have no published prompt
    asked = benchmark.ask(replace(sample, question=shown) if shown else sample)
    if not protocol.startswith("medevalkit"):
        return asked
    images = asked.images if all_images else asked.images[: benchmark.medevalkit_images]
    return replace(asked, kind=benchmark.medevalkit_kind(asked), images=images)


def grade(sample: Question, reply: str, finished: bool, protocol: str, benchmark: Benchmark) -> Verdict:
    """By the benchmark's own rule for the protocol, otherwise by the protocol's general one."""
    if own := benchmark.grades.get(protocol):
        return own(sample, reply, finished)
    return PROTOCOLS[protocol](sample, reply, finished, benchmark)
