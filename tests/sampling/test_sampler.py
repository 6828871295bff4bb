"""The sampler against Hugging Face's logits processors, and its draws against the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infimed_jax.config import Sampling
from infimed_jax.sampling import sampler

VOCAB = 37


def _logits(seed: int, rows: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 3


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, VOCAB, 100]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
def test_adjusted_logits_equal_hugging_face(seed, temperature, top_k, top_p, penalty):
    logits = _logits(seed)
    history = np.random.default_rng(seed + 1).integers(0, VOCAB, size=(5, 9))
    banned = [0, 7, 36]

    expected = torch.from_numpy(logits.copy())
    ids = torch.from_numpy(history)
    expected = SuppressTokensLogitsProcessor(banned)(ids, expected)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, expected)
    expected = TemperatureLogitsWarper(temperature)(ids, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(ids, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(ids, expected)

    seen = np.zeros((5, VOCAB), bool)
    np.put_along_axis(seen, history, True, axis=1)
    mask = np.zeros(VOCAB, bool)
    mask[banned] = True
    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    ours = sampler.adjust(jnp.asarray(logits), jnp.asarray(mask), jnp.asarray(seen), options)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


def test_greedy_takes_the_largest_that_is_not_banned():
    logits = jnp.array([[0.0, 5.0, 9.0, 1.0]])
    token, logprob = sampler.next_token(
        logits, jnp.array([False, False, True, False]), None, jax.random.split(jax.random.key(0), 1), Sampling()
    )
    assert token.tolist() == [1]
    # The model's own probability: the banned token keeps its share.
    np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[:, 1], rtol=1e-6)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 6)])
def test_draws_follow_the_softmax(temperature, top_k):
    rows = 20_000
    logits = _logits(3, rows=1) / 2
    banned = np.zeros(VOCAB, bool)
    banned[[0, 36]] = True
    options = Sampling(temperature=temperature, top_k=top_k)
    keys = jax.random.split(jax.random.key(11), rows)
    tokens, logprobs = sampler.next_token(
        jnp.tile(jnp.asarray(logits), (rows, 1)), jnp.asarray(banned), None, keys, options
    )
    scores = np.where(banned, -np.inf, logits[0].astype(np.float64)) / temperature
    if top_k:
        scores[scores < np.sort(scores)[-top_k]] = -np.inf
    expected = np.exp(scores - scores.max())
    expected /= expected.sum()
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    common = expected * rows >= 5  # the chi-square approximation wants five expected draws a cell
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * rows
    kept = wanted > 0
    assert chisquare(observed[kept], wanted[kept]).pvalue > 1e-3
    plain = jax.nn.log_softmax(jnp.asarray(logits))[0]
    np.testing.assert_allclose(logprobs, plain[np.asarray(tokens)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, np.float32(1) - np.float32(2**-24)])
def test_draw_never_takes_a_token_without_probability(uniform):
    logits = np.full((3, 4096), -np.inf, np.float32)
    logits[:, 100:3000:7] = _logits(5, rows=1)[0, 0]
    tokens = sampler.draw(jnp.asarray(logits), jnp.full(3, uniform, jnp.float32))
    assert np.isfinite(logits[np.arange(3), tokens]).all()
    expected = 100 if uniform == 0 else np.flatnonzero(np.isfinite(logits[0]))[-1]
    assert (np.asarray(tokens) == expected).all()
