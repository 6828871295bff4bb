"""Which questions are worth training on: the shares that a plan names, and plans that are none."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax.errors import UserError
from infimed_jax.rl.difficulty import Plan, choose


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 8), max_size=80), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_of_each_count_its_share_is_kept(right, between, extreme, seed):
    plan = Plan(between=between, extreme=extreme, seed=seed)
    kept = choose(np.array(right, np.int64), plan)
    assert list(kept) == sorted(set(kept)) and list(kept) == list(choose(np.array(right, np.int64), plan))
    before, after = Counter(right), Counter(right[i] for i in kept)
    for count, n in before.items():
        share = 1.0 if 3 <= count <= 5 else extreme if count in (0, 8) else between
        assert after[count] == round(share * n)


@pytest.mark.parametrize(
    "options", [{"draws": 1}, {"low": 0}, {"low": 6}, {"high": 8}, {"between": 1.5}, {"extreme": -0.1}]
)
def test_impossible_plans_are_refused(options):
    with pytest.raises(UserError):
        Plan(**options)


def test_a_seed_below_0_is_a_mistake():
    with pytest.raises(UserError, match="seed must not be negative, not -1"):
        Plan(seed=-1)
