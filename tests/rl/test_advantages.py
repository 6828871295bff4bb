"""Group-relative advantages against torch, and the groups that teach nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from infimed_jax.rl.advantages import group_advantages, without_variance

GROUPS = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(2, 9)),
    elements=st.sampled_from([0.0, 0.1, 0.9, 1.0, 0.3]),
)


def test_equals_torch():
    torch = pytest.importorskip("torch")
    rewards = np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)
    tensor = torch.tensor(rewards, dtype=torch.float64)
    centred = tensor - tensor.mean(1, keepdim=True)
    expected = centred / (tensor.std(1, keepdim=True) + 1e-6)  # torch's std is the sample's
    np.testing.assert_allclose(group_advantages(rewards, True), expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, False), centred.numpy(), rtol=1e-6)
    assert group_advantages(rewards, True).dtype == np.float32


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.9, 1.0, 1 / 3])
def test_a_group_without_variance_gets_exactly_zero(value, normalize):
    rewards = np.full((3, 7), value)  # float64, whose mean of seven equal values may be another number
    assert (group_advantages(rewards, normalize) == 0).all()
    assert without_variance(rewards).all()


@settings(max_examples=100, deadline=None)
@given(GROUPS, st.booleans())
def test_zero_mean_order_kept_and_groups_apart(rewards, normalize):
    advantages = group_advantages(rewards, normalize)
    np.testing.assert_allclose(advantages.mean(1), 0, atol=1e-6)
    # a better completion never has the smaller advantage, an equal one has the equal
    order = np.sign(rewards[:, :, None] - rewards[:, None, :])
    assert (np.sign(advantages[:, :, None] - advantages[:, None, :]) == order).all()
    alone = np.concatenate([group_advantages(rewards[i : i + 1], normalize) for i in range(len(rewards))])
    np.testing.assert_array_equal(advantages, alone)


@settings(max_examples=50, deadline=None)
@given(GROUPS)
def test_normalised_advantages_ignore_the_scale_of_rewards(rewards):
    np.testing.assert_allclose(group_advantages(rewards * 4, True), group_advantages(rewards, True), atol=1e-4)
