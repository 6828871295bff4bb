"""Of a hundred test sets, about 95 have an interval that holds the truth: for few questions and many, any share."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from infimed_jax.evaluation.statistics import accuracy
from tests.evaluation.test_statistics import rows

TRIALS = 1000
NOISE = 0.02
"""Three standard errors of 1,000 trials."""


@pytest.mark.parametrize("questions", [8, 20, 100, 1000])
def test_one_question_an_image(questions):
    """Exact: the sum over all counts of right answers, for every share in steps of half a percent."""
    right = np.arange(questions + 1)
    intervals = [accuracy(rows(np.arange(questions) < k)) for k in right]
    low, high = np.array([(each.low, each.high) for each in intervals]).T
    for share in np.arange(0.05, 0.951, 0.005):
        covered = stats.binom.pmf(right, questions, share)[(low <= share) & (share <= high)].sum()
        assert 0.92 <= covered <= (0.97 if questions >= 100 else 1), share


@pytest.mark.parametrize("correlation", [0.0, 0.3])
@pytest.mark.parametrize(("images", "questions"), [(4, 2), (10, 2), (50, 2), (25, 4), (200, 5), (83, 12)])
def test_several_questions_an_image(images, questions, correlation):
    """An image's own chance is Beta with the share as its mean. Equal outcomes are computed once."""
    rng = np.random.default_rng(images)
    index = np.repeat(np.arange(images), questions)
    for share in (0.05, 0.3, 0.9):
        chance = np.full((TRIALS, images), share)
        if correlation:
            scale = (1 - correlation) / correlation
            chance = rng.beta(share * scale, (1 - share) * scale, chance.shape)
        outcomes, counts = np.unique(np.sort(rng.binomial(questions, chance)), axis=0, return_counts=True)
        covered = 0
        for outcome, count in zip(outcomes, counts, strict=True):
            result = accuracy(rows((np.arange(questions) < outcome[:, None]).reshape(-1), index))
            covered += count * (result.low <= share <= result.high)
        assert 0.92 - NOISE <= covered / TRIALS <= (0.97 + NOISE if len(index) >= 100 else 1), share
