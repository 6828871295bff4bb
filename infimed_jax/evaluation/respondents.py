"""Who answers the questions of an evaluation: anything that takes samples and gives their replies in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax

from infimed_jax import config
from infimed_jax.data.sample import Question
from infimed_jax.evaluation.benchmark import benchmark_of
from infimed_jax.progress import Report
from infimed_jax.sampling.policy import Policy

CHUNK = 2048
"""Questions whose decoded images are in memory at once: 0.9 GB at 384 pixels."""


@dataclass(frozen=True)
class Reply:
    text: str
    finish: Literal["stop", "length"]
    """Whether the model stopped by itself or at the limit."""
    tokens: int
    """Generated, without the stop token."""


Respondent = Callable[[Sequence[Question]], Iterator[Reply]]
"""Answers questions, which come in the protocol's kind; the replies come in the questions' order."""


@dataclass(frozen=True)
class Terms:
    """What a score depends on beside the model and the questions."""

    sampling: config.Sampling
    protocol: str = "strict"
    reasoning: bool = False
    """Thoughts and a boxed answer were asked for."""
    image: bool = True
    """False: the blind control."""
    benchmark: str = ""
    """A name in `benchmarks/`, a module or a file; empty: the one whose adapter made each sample."""
    all_images: bool = False
    """All images of a question are sent, also where the protocol's harness sends fewer."""


def ask_policy(
    policy: Policy, terms: Terms, key: jax.Array, report: Report = lambda done, total, note: None
) -> Respondent:
    """The policy as a Respondent; `report` is called after each burst."""

    def wording(question: Question, reasoning: bool) -> str:
        return benchmark_of(question, terms.benchmark).words(question, reasoning)

    def respond(samples: Sequence[Question]) -> Iterator[Reply]:
        asked = {"reasoning": terms.reasoning, "image": terms.image, "wording": wording}
        longest = max(map(len, policy.prompts(samples, **asked, pixels=False)), default=0)
        for start in range(0, len(samples), CHUNK):

            def on_progress(answered: int, _: int, note: str, start: int = start) -> None:
                done = start + answered
                report(done, len(samples), f"{done}/{len(samples)} questions")

            prompts = policy.prompts(samples[start : start + CHUNK], **asked)
            completions = policy.answer(
                prompts, terms.sampling, jax.random.fold_in(key, start), longest=longest, on_progress=on_progress
            )
            for completion in completions:
                tokens = completion.text_tokens
                yield Reply(policy.tokenizer.decode(tokens), completion.finish, len(tokens))

    return respond
