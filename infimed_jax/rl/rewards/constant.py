"""The control: every completion earns 1, so nothing can be learned; the verifiable parts are still measured."""

from __future__ import annotations

from collections.abc import Sequence

from infimed_jax import config
from infimed_jax.rl.rewards import Attempt, Reward
from infimed_jax.rl.rewards.verifiable import score


def reward(attempts: Sequence[Attempt], grpo: config.Grpo) -> list[Reward]:
    return [score(attempt, grpo)._replace(total=1.0) for attempt in attempts]
