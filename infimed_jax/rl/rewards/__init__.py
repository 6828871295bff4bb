"""What a reward is: a function of a batch of attempts, so that a judge may be asked about all of them at once.

Rewards are the modules of this folder, or a module or file from outside, named by `grpo.reward`; each has a `reward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from infimed_jax import config, plugins
from infimed_jax.data.sample import Sample
from infimed_jax.errors import UserError

ROOM = __name__


@dataclass(frozen=True)
class Attempt:
    """A reply to a question."""

    sample: Sample
    reply: str
    """The text after the generation prompt, without the stop token."""
    finished: bool
    """Whether the model stopped by itself."""


class Reward(NamedTuple):
    total: float
    """What the completion is credited with."""
    parts: dict[str, float]
    """What it is made of, under the same names for every attempt: metrics show the mean of each."""


RewardFn = Callable[[Sequence[Attempt], config.Grpo], Sequence[Reward]]
"""The attempts' rewards, in order."""


def load_reward(name: str) -> RewardFn:
    """The function `reward` of the module that `grpo.reward` names; UserError where there is none."""
    found = getattr(plugins.load(ROOM, name, "grpo.reward"), "reward", None)
    if not callable(found):
        raise UserError(f"grpo.reward={name}: the module has no function reward(attempts, grpo)")
    return found


def rewards_of(reward: RewardFn, attempts: Sequence[Attempt], grpo: config.Grpo) -> list[Reward]:
    """The attempts' rewards; UserError where there is not one for each, or they differ in their parts."""
    earned = list(reward(attempts, grpo))
    if len(earned) != len(attempts):
        raise UserError(f"grpo.reward gave {len(earned)} rewards for {len(attempts)} attempts: give one for each")
    if len(names := {tuple(sorted(one.parts)) for one in earned}) > 1:
        shown = " and ".join(f"({', '.join(parts)})" for parts in sorted(names))
        raise UserError(f"grpo.reward gave rewards of different parts: {shown}; give every attempt the same ones")
    return earned
