"""Who answers the questions of an evaluation: a model on the mesh, a file of replies, or what a caller brings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.data.batch import Segment
from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.benchmark import benchmark_of
from infimed_jax.progress import Report
from infimed_jax.sampling.engine import Delta
from infimed_jax.sampling.policy import Policy


@dataclass(frozen=True)
class Reply:
    text: str
    finish: Literal["stop", "length"] = "stop"
    """Whether the model stopped by itself or at the limit."""
    tokens: int = 0
    """Generated, without the stop token; 0 where that is not known."""
    given: bool = True
    """False: there is none."""


Put = Callable[[int, Reply], None]
"""Takes the reply to the question of that number."""


class Respondent(Protocol):
    """Answers questions, which come in the protocol's kind, in chunks of which one is in memory at a time."""

    @property
    def identity(self) -> str:
        """Digest of what the replies come from: a stopped evaluation goes on with the same one only."""

    def survey(self, questions: Sequence[Question]) -> None:
        """See a chunk of the questions before any is asked."""

    def answer(self, questions: Sequence[Question], first: int, asked: Sequence[int], put: Put) -> None:
        """Answer the questions at the places `asked` of a chunk, whose first one has the number `first`.

        `put` is called once for each, as replies are finished. A reply may depend on its question's number, but not on
        which others are asked.
        """


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

    def wording(self, question: Question, reasoning: bool) -> str:
        return benchmark_of(question, self.benchmark).words(question, reasoning)


@dataclass
class PolicyRespondent:
    """A policy; `report` is called after each burst."""

    policy: Policy
    terms: Terms
    key: jax.Array
    report: Report = lambda done, total, note: None
    longest: int = 0
    """Tokens of the longest prompt, so that all chunks share one compilation."""
    total: int = 0

    @property
    def identity(self) -> str:
        return self.policy.fingerprint

    def survey(self, questions: Sequence[Question]) -> None:
        self.longest = max(self.longest, *map(len, self._prompts(questions, pixels=False)))
        self.total += len(questions)

    def answer(self, questions: Sequence[Question], first: int, asked: Sequence[int], put: Put) -> None:
        tokens: dict[int, list[np.ndarray]] = {place: [] for place in asked}
        stops = self.policy.tokenizer.stop_tokens

        def collect(delta: Delta) -> None:
            tokens[delta.request].append(delta.tokens)
            if delta.finish is not None:
                reply = np.concatenate(tokens.pop(delta.request))
                reply = reply[:-1] if delta.finish == "stop" and reply[-1] in stops else reply
                text = self.policy.tokenizer.decode(reply)
                put(first + delta.request, Reply(text, delta.finish, len(reply)))

        def on_progress(answered: int, _: int, note: str) -> None:
            done = first + len(questions) - len(asked) + answered
            self.report(done, self.total, f"{done}/{self.total} questions")

        self.policy.answer(
            self._prompts([questions[place] for place in asked], pixels=True),
            self.terms.sampling,
            jax.random.fold_in(self.key, first),
            longest=self.longest,
            numbers=asked,
            on_progress=on_progress,
            on_delta=collect,
        )

    def _prompts(self, questions: Sequence[Question], pixels: bool) -> list[Segment]:
        terms = self.terms
        return self.policy.prompts(
            questions, reasoning=terms.reasoning, image=terms.image, pixels=pixels, wording=terms.wording
        )


@dataclass
class Predictions:
    """Replies that a file holds, `{"id": …, "response": …}` a line, and optionally `"finish": "length"`."""

    file: Path
    lenient: bool = False
    """Pass over unknown ids, null responses and all but the first of an id, with a count of each."""
    replies: dict[str, Reply] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    identity: str = ""
    _unseen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """UserError names the line that cannot be used."""
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the predictions {self.file}: {error.strerror or error}") from error
        self.identity = hashlib.sha256(content).hexdigest()
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                self._read(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"{self.file}, line {number}")
        self._unseen = set(self.replies)

    def _read(self, line: bytes, where: str) -> None:
        try:
            row = json.loads(line.decode("utf-8"))
            id, response, finish = row["id"], row["response"], row.get("finish", "stop")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8, but another encoding: convert it") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{where}: each line must be an object {{"id": …, "response": …}}') from error
        if not isinstance(id, str) or not isinstance(response, str | None) or finish not in ("stop", "length"):
            raise UserError(f"{where}: `id` and `response` must be texts, and `finish` stop or length")
        if response is None:
            self._pass_over("null responses", f"{where}: the response to {id} is null")
        elif id in self.replies:
            self._pass_over("repeated ids", f"{where}: {id} has a response already")
        else:
            self.replies[id] = Reply(response, finish)

    def _pass_over(self, what: str, words: str) -> None:
        if not self.lenient:
            raise UserError(f"{words}: repair the file, or pass it over with --lenient")
        self.passed_over[what] = self.passed_over.get(what, 0) + 1

    def survey(self, questions: Sequence[Question]) -> None:
        self._unseen -= {question.id for question in questions}

    def answer(self, questions: Sequence[Question], first: int, asked: Sequence[int], put: Put) -> None:
        """UserError: the file has replies to other questions. A question without one is not answered."""
        if self._unseen and "unknown ids" not in self.passed_over:
            one = min(self._unseen)
            self._pass_over("unknown ids", f"{self.file} has {len(self._unseen)} ids of no question, such as {one}")
            self.passed_over["unknown ids"] = len(self._unseen)
        for place in asked:
            put(first + place, self.replies.get(questions[place].id, Reply("", given=False)))
