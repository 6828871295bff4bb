"""Advantages of a group of completions: each against its own group's mean (DeepSeekMath, arXiv 2402.03300, 4.1)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

STD_FLOOR = 1e-6
"""Added to the standard deviation, as in the published framework."""


def without_variance(rewards: Float[np.ndarray, "prompts group"]) -> Bool[np.ndarray, " prompts"]:
    """Groups whose completions all earned the same: they teach nothing."""
    return rewards.max(axis=1) == rewards.min(axis=1)


def group_advantages(
    rewards: Float[np.ndarray, "prompts group"], normalize_std: bool
) -> Float[np.ndarray, "prompts group"]:
    """Reward minus the group's mean, divided by the group's sample standard deviation if `normalize_std`; float32.

    A group without variance gets exactly 0: the mean of eight times 0.1 is not 0.1 in floating point, and dividing
    that crumb by `STD_FLOOR` would turn it into a gradient.
    """
    rewards = np.asarray(rewards, np.float64)
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    if normalize_std:
        advantages /= rewards.std(axis=1, ddof=1, keepdims=True) + STD_FLOOR
    advantages[without_variance(rewards)] = 0.0
    return advantages.astype(np.float32)
