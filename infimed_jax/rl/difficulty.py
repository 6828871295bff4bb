"""How often a policy answers each question right, and which questions are worth training on.

A group that is all right or all wrong teaches nothing. As in the authors' later report: eight answers a question, those
with 3 to 5 right are kept, those with none or all thinned out. What becomes of the rest is not published: a setting.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infimed_jax.data.sample import Sample
from infimed_jax.errors import UserError
from infimed_jax.files import to_json, write_json
from infimed_jax.progress import Report
from infimed_jax.rl.rewards import Attempt
from infimed_jax.rl.rewards.verifiable import score
from infimed_jax.rl.rollout import Questions
from infimed_jax.rl.step import rollout_sampling
from infimed_jax.sampling.policy import Policy

CHUNK = 256
"""Questions whose answers are drawn and kept together: what a stopped run loses at most."""


@dataclass(frozen=True)
class Plan:
    """Which questions are kept, by how many of their sampled answers are right."""

    draws: int = 8
    """Answers sampled for a question."""
    low: int = 3
    """Fewest right answers of a question that is always kept."""
    high: int = 5
    """Most right answers of a question that is always kept."""
    between: float = 0.5
    """Share kept of questions outside that range with some right and some wrong answers; our choice."""
    extreme: float = 0.1
    """Share kept of questions with no or only right answers; our choice."""
    seed: int = 0
    """Seed of sampling and selection."""

    def __post_init__(self) -> None:
        if self.draws < 2 or not 0 < self.low <= self.high < self.draws:
            raise UserError(
                f"of {self.draws} draws, {self.low} to {self.high} cannot be kept: 0 < low <= high < draws must hold"
            )
        if not (0 <= self.extreme <= 1 and 0 <= self.between <= 1):
            raise UserError("the shares kept must lie in [0, 1]")
        if self.seed < 0:
            raise UserError(f"the seed must not be negative, not {self.seed}")

    def share(self, right: int) -> float:
        """Share that is kept of the questions with so many right answers."""
        if self.low <= right <= self.high:
            return 1.0
        return self.extreme if right in (0, self.draws) else self.between


def count_right(
    samples: Sequence[Sample],
    pool: Questions,
    policy: Policy,
    plan: Plan,
    folder: Path,
    recipe: Mapping[str, Any],
    report: Report | None = None,
) -> np.ndarray:
    """i64[n]: right answers of each question of `pool`, whose numbers are places in `samples`.

    Questions are asked and rewarded as in GRPO, at `grpo.temperature`. Chunks are kept in `folder`, and those that an
    earlier run of the same `recipe` has measured are read back.
    """
    identity = hashlib.sha256(to_json([recipe, pool.fingerprint, CHUNK], sort_keys=True).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    total = len(pool.numbers)
    counts: list[int] = []
    for start in range(0, total, CHUNK):
        asked = [samples[number] for number in pool.numbers[start : start + CHUNK]]
        file = folder / f"{identity[:16]}-{start:09d}.json"
        chunk = _finished(file, asked)
        if chunk is None:

            def on_progress(done: int, _: int, note: str, start: int = start) -> None:
                if report is not None:
                    now = int(start + done / plan.draws)
                    report(now, total, f"{now:,}/{total:,} questions")

            chunk = _answer(asked, start, pool.longest, plan, policy, on_progress)
            if jax.process_index() == 0:
                write_json(file, {"right": {sample.id: n for sample, n in zip(asked, chunk, strict=True)}})
        counts += chunk
    return np.array(counts)


def _finished(file: Path, asked: Sequence[Sample]) -> list[int] | None:
    try:
        right = json.loads(file.read_text(encoding="utf-8"))["right"]
        return [int(right[sample.id]) for sample in asked]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answer(
    asked: Sequence[Sample],
    start: int,
    longest: int,
    plan: Plan,
    policy: Policy,
    on_progress: Report,
) -> list[int]:
    """Right answers of each question. What is drawn depends on the seed and the chunk's place alone."""
    cfg = policy.config
    prompts = [prompt for prompt in policy.prompts(asked, reasoning=True) for _ in range(plan.draws)]
    key = jax.random.fold_in(jax.random.key(plan.seed), start)
    completions = policy.answer(prompts, rollout_sampling(cfg), key, longest=longest, on_progress=on_progress)
    right = [0] * len(asked)
    for number, completion in enumerate(completions):
        place = number // plan.draws
        reply = policy.tokenizer.decode(completion.text_tokens)
        attempt = Attempt(asked[place], reply, completion.finish == "stop")
        right[place] += score(attempt, cfg.grpo).parts["accuracy"] == 1.0
    return right


def choose(right: np.ndarray, plan: Plan) -> np.ndarray:
    """i64: places of the questions that are kept, ascending; of each count its share, rounded, drawn by the seed."""
    kept = []
    for count in range(plan.draws + 1):
        places = np.flatnonzero(right == count)
        order = np.random.default_rng([plan.seed, count]).permutation(len(places))
        kept.append(places[order[: round(plan.share(count) * len(places))]])
    return np.sort(np.concatenate(kept))
