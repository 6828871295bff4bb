"""Chunked log-probabilities against the plain log-softmax, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax.ops.cross_entropy import target_logprobs

B, T, D, V = 3, 13, 8, 29


def problem(seed: int, share: float):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    unembedding = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = np.where(rng.random((B, T)) < share, rng.uniform(0.5, 2, (B, T)), 0).astype(np.float32)
    return hidden, unembedding, targets, weights


def plain(hidden, unembedding, targets, weights):
    logits = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, unembedding), axis=-1)
    logprobs = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    entropy = -(jnp.exp(logits) * logits).sum(-1)
    return jnp.where(weights != 0, logprobs, 0), jnp.where(weights != 0, entropy, 0)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, 13, 512])
def test_values_and_gradients_match_the_plain_formula(chunk, share):
    hidden, unembedding, targets, weights = problem(0, share)

    def loss(function, hidden, unembedding):
        logprobs, entropy = function(hidden, unembedding, targets, weights)
        return (logprobs * weights).sum(), (logprobs, entropy)

    def chunked(*arguments):
        return target_logprobs(*arguments, chunk)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(1, 2), has_aux=True), static_argnums=0)
    expected, actual = grad(plain, hidden, unembedding), grad(chunked, hidden, unembedding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), actual, expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_any_choice_of_weights_selects_without_multiplying(seed, share):
    arguments = problem(seed, share)
    for actual, expected in zip(chunks_of_four(*arguments), plain(*arguments), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


chunks_of_four = jax.jit(lambda *arguments: target_logprobs(*arguments, 4))


def test_chunks_without_weight_are_not_computed():
    """What stands where no weight is cannot matter, not even as NaN in a chunk that would be multiplied by 0."""
    hidden, unembedding, targets, weights = problem(1, 1.0)
    weights[:, 4:] = 0
    hidden[:, 4:] = np.nan

    def loss(hidden, unembedding):
        return target_logprobs(hidden, unembedding, targets, weights, 4)[0].sum()

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, unembedding)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in grads)
    assert not np.any(np.asarray(grads[0])[:, 4:])


def test_the_entropy_carries_no_gradient():
    hidden, unembedding, targets, weights = problem(2, 1.0)
    grads = jax.grad(lambda h: target_logprobs(h, unembedding, targets, weights, 4)[1].sum())(hidden)
    assert not np.any(grads)


def test_large_logits_stay_finite():
    hidden, unembedding, targets, weights = problem(3, 1.0)
    logprobs, entropy = target_logprobs(hidden * 1e4, unembedding, targets, weights, 4)
    assert np.isfinite(logprobs).all() and np.isfinite(entropy).all()
    assert (np.asarray(entropy) >= -1e-3).all()


def test_no_row_of_logits_ever_exists():
    """The largest array of the compiled gradient is smaller than one row's logits over all rows."""
    rows, tokens, width, vocab, chunk = 2, 64, 4, 4096, 8
    shapes = [((rows, tokens, width), "float32"), ((width, vocab), "float32"), ((rows, tokens), "int32")]
    hidden, unembedding, targets = (jax.ShapeDtypeStruct(*shape) for shape in shapes)

    def loss(hidden, unembedding, targets):
        return target_logprobs(hidden, unembedding, targets, jnp.ones((rows, tokens)), chunk)[0].sum()

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, unembedding, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * tokens * vocab * 4
