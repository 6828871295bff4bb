"""The GRPO objective and its gradient against a float64 reference written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from infimed_jax.config import Grpo
from infimed_jax.rl.loss import k3, policy_loss

LOGPROBS = arrays(np.float32, 12, elements=st.floats(-30, 0, width=32))


def reference_loss(new, old, advantage, low, high, dual):
    """One token, case by case instead of by minima: a float64 loss and its derivative by `new`."""
    ratio = np.exp(np.float64(new) - np.float64(old))
    if advantage >= 0:
        return (-advantage * ratio, -advantage * ratio) if ratio <= 1 + high else (-advantage * (1 + high), 0.0)
    if ratio < 1 - low:
        return -advantage * (1 - low), 0.0
    if dual > 0 and ratio > dual:
        return -advantage * dual, 0.0
    return -advantage * ratio, -advantage * ratio


@pytest.mark.parametrize("dual", [3.0, 0.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.3), (0.2, 0.2), (0.1, 0.5)])
def test_loss_and_gradient_equal_the_reference(low, high, dual):
    rng = np.random.default_rng(0)
    old = rng.uniform(-5, 0, 400).astype(np.float32)
    new = (old + rng.uniform(-2, 2, 400)).astype(np.float32)
    advantages = rng.normal(size=400).astype(np.float32)
    grpo = Grpo(clip_low=low, clip_high=high, dual_clip=dual)
    loss, ratio, clipped = policy_loss(jnp.array(new), jnp.array(old), jnp.array(advantages), grpo)
    grad = jax.grad(lambda x: policy_loss(x, jnp.array(old), jnp.array(advantages), grpo)[0].sum())(jnp.array(new))
    expected = np.array([reference_loss(*args, low, high, dual) for args in zip(new, old, advantages, strict=True)])
    np.testing.assert_allclose(loss, expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[:, 1], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(clipped), expected[:, 1] == 0)
    np.testing.assert_allclose(ratio, np.exp(new.astype(np.float64) - old), rtol=1e-5)
    # every branch was visited
    r = np.exp(new - old)
    assert ((r > 1 + high) & (advantages > 0)).any() and ((r < 1 - low) & (advantages < 0)).any()
    assert ((r > 3) & (advantages < 0)).any()


def test_the_gradient_is_the_finite_difference():
    """Against float64 central differences of the papers' formula with minima and maxima."""
    rng = np.random.default_rng(1)
    old, advantages = rng.uniform(-3, 0, 200), rng.normal(size=200)
    new = old + rng.uniform(-1.5, 1.5, 200)
    reference = rng.uniform(-3, 0, 200)

    def objective(x):
        r = np.exp(x - old)
        loss = np.maximum(-advantages * r, -advantages * np.clip(r, 0.8, 1.3))
        loss = np.where(advantages < 0, np.minimum(loss, -advantages * 3.0), loss)
        return loss + 0.01 * (np.exp(reference - x) - (reference - x) - 1)

    h = 1e-6
    expected = (objective(new + h) - objective(new - h)) / (2 * h)
    f32 = [jnp.array(a, jnp.float32) for a in (old, advantages, reference)]

    def ours(x):
        return (policy_loss(x, f32[0], f32[1], Grpo())[0] + 0.01 * k3(x, f32[2])).sum()

    edges = [0.8, 1.3, 3.0]
    smooth = np.min([np.abs(np.exp(new - old) - e) for e in edges], axis=0) > 1e-4
    grad = np.asarray(jax.grad(ours)(jnp.array(new, jnp.float32)))
    np.testing.assert_allclose(grad[smooth], expected[smooth], rtol=1e-4, atol=1e-6)


def test_on_policy_the_gradient_is_reinforce():
    new = jnp.array([-0.5, -1.0, -3.0])
    advantages = jnp.array([1.0, -2.0, 0.0])
    grad = jax.grad(lambda x: policy_loss(x, jax.lax.stop_gradient(x), advantages, Grpo())[0].sum())(new)
    np.testing.assert_allclose(grad, -advantages)


@settings(max_examples=100, deadline=None)
@given(LOGPROBS, LOGPROBS)
def test_k3_is_never_negative_and_zero_only_where_equal(new, reference):
    value = np.asarray(k3(jnp.array(new), jnp.array(reference)))
    assert (value >= 0).all() and np.isfinite(value).all()
    assert (value[new == reference] == 0).all()
    apart = np.abs(new - reference) > 1e-3
    assert (value[apart] > 0).all()


def test_k3_estimates_the_divergence():
    """Its mean under the policy is KL(policy || reference)."""
    rng = np.random.default_rng(2)
    p, q = (jax.nn.log_softmax(jnp.array(rng.normal(size=20), jnp.float32)) for _ in range(2))
    np.testing.assert_allclose(jnp.sum(jnp.exp(p) * k3(p, q)), jnp.sum(jnp.exp(p) * (p - q)), rtol=1e-5)


def test_k3_keeps_tiny_divergences():
    """Log-probabilities 2e-4 apart diverge by 2e-8, which exp(x) - x - 1 rounds away in float32."""
    x = np.float32(2e-4)
    np.testing.assert_allclose(k3(jnp.float32(-x), jnp.float32(0.0)), np.float64(x) ** 2 / 2, rtol=2e-3)


@settings(max_examples=100, deadline=None)
@given(LOGPROBS, LOGPROBS, arrays(np.float32, 12, elements=st.floats(-5, 5, width=32)))
def test_extreme_ratios_stay_finite(new, old, advantages):
    args = jnp.array(old * 10), jnp.array(advantages)
    loss = policy_loss(jnp.array(new), *args, Grpo())[0]
    grad = jax.grad(lambda x: policy_loss(x, *args, Grpo())[0].sum())(jnp.array(new))
    assert np.isfinite(loss).all() and np.isfinite(grad).all()
