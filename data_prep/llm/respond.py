"""An OpenAI-compatible endpoint that answers the questions of an evaluation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from data_prep.llm import CallFailed, ChatClient, Endpoint, Message, check_sources, parts, run_jobs, speech
from infimed_jax.config import Sampling
from infimed_jax.data.images import ImageError
from infimed_jax.data.prompts import exchange
from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.respondents import Put, Reply, Terms
from infimed_jax.progress import Report

_SENT = ("temperature", "max_tokens")
"""Settings of decoding that a chat call carries."""
_LOCAL = ("slots", "burst", "share_images")


@dataclass
class EndpointRespondent:
    """`folder` holds the cache of replies and the account. UserError: settings that no call carries."""

    endpoint: Endpoint
    folder: Path
    terms: Terms
    report: Report = lambda done, total, note: None
    total: int = 0
    _failed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        usual = Sampling()
        for each in fields(Sampling):
            own = getattr(self.terms.sampling, each.name)
            if each.name not in (*_SENT, *_LOCAL) and own != getattr(usual, each.name):
                raise UserError(
                    f"sampling.{each.name}={own}: an endpoint is asked with {' and '.join(_SENT)} alone: set the "
                    "others in the server"
                )

    @property
    def identity(self) -> str:
        return hashlib.sha256(f"{self.endpoint.chat_url} {self.endpoint.model}".encode()).hexdigest()

    def survey(self, questions: Sequence[Question]) -> None:
        """UserError: a source that may not be sent there."""
        check_sources(self.endpoint, (question.source for question in questions))
        self.total += len(questions)

    def answer(self, questions: Sequence[Question], first: int, asked: Sequence[int], put: Put) -> None:
        """UserError, after all others are answered, where calls failed: nothing is put for their questions."""
        done = first + len(questions) - len(asked)

        async def job(client: ChatClient, place: int) -> Reply | str:
            sampling = self.terms.sampling
            try:
                reply = await client.chat(
                    questions[place].source,
                    self._messages(questions[place]),
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    seed=first + place,
                )
            except CallFailed as failure:
                return failure.kind
            return Reply(reply.whole, "length" if reply.finish == "length" else "stop")

        def on_done(place: int, outcome: Reply | str) -> None:
            nonlocal done
            if isinstance(outcome, str):
                self._failed[outcome] += 1
                return
            put(first + place, outcome)
            done += 1
            self.report(done, self.total, f"{done}/{self.total} questions")

        run_jobs(self.endpoint, self.folder, asked, job, on_done)
        if self._failed:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self._failed.most_common())
            raise UserError(
                f"endpoint {self.endpoint.name} did not answer {self._failed.total()} questions ({kinds}); the other "
                "replies are kept: the same command asks these again"
            )

    def _messages(self, question: Question) -> list[Message]:
        turns = exchange(question, self.terms.reasoning, self.terms.image, self.terms.wording)[:-1]
        try:
            return [speech(turn.role, parts(turn.content, question.images, self.endpoint.image_side)) for turn in turns]
        except ImageError as error:
            raise UserError(f"sample {question.id}: an image is unreadable ({error.reason}): replace it") from error
