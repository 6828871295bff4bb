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


def _settings(rows: int, *each: Sampling) -> sampler.Settings:
    """The same settings in every row, or one row's each."""
    values = each if len(each) > 1 else each * rows
    return sampler.Settings.filled(
        lambda name: jnp.array([getattr(value, name) for value in values], sampler.Settings.dtype(name))
    )


def _not_asked() -> jax.Array:
    return jnp.full(1, jnp.nan)  # no comparison with it holds


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
    options = _settings(5, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty))
    banned_out = jnp.where(mask, -jnp.inf, logits)
    history = sampler.History(jnp.asarray(seen), jnp.zeros((5, VOCAB), jnp.int32))
    ours = sampler.warp(sampler.penalize(banned_out, history, options), options, jnp.ones(5, bool))
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


def test_greedy_takes_the_largest_that_is_not_banned():
    logits = jnp.array([[0.0, 5.0, 9.0, 1.0]])
    token, logprob = sampler.next_token(
        logits, jnp.array([False, False, True, False]), None, _settings(1, Sampling()), jnp.ones(1, bool), _not_asked
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
    tokens, logprobs = sampler.next_token(
        jnp.tile(jnp.asarray(logits), (rows, 1)),
        jnp.asarray(banned),
        None,
        _settings(rows, options),
        jnp.ones(rows, bool),
        lambda: jax.random.uniform(jax.random.key(11), rows),
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


def _reference(logits, prompt, reply, sampling):
    """One row in NumPy: Hugging Face's repetition penalty over prompt and reply, vLLM's other two over the reply."""
    scores = logits.astype(np.float64).copy()
    for token in {*prompt, *reply}:
        scores[token] *= sampling.repetition_penalty if scores[token] < 0 else 1 / sampling.repetition_penalty
    for token in set(reply):
        scores[token] -= sampling.frequency_penalty * reply.count(token) + sampling.presence_penalty
    return scores


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    repetition=st.sampled_from([1.0, 1.1, 0.7]),
    presence=st.sampled_from([0.0, 2.0, -1.5]),
    frequency=st.sampled_from([0.0, 0.4, -0.3]),
)
def test_penalties_equal_a_reference(seed, repetition, presence, frequency):
    """Published evaluation: presence 2.0, repetition 1.1. Half of the rows are without penalties."""
    rng = np.random.default_rng(seed)
    logits = _logits(seed, rows=4)
    prompts, replies = (rng.integers(0, VOCAB, size=(4, 7)).tolist() for _ in range(2))
    some = Sampling(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    each = [some, Sampling(), some, Sampling()]
    history = sampler.History(
        jnp.array([np.bincount(row, minlength=VOCAB) > 0 for row in prompts]),
        jnp.array([np.bincount(row, minlength=VOCAB) for row in replies]),
    )
    ours = sampler.penalize(jnp.asarray(logits), history, _settings(4, *each))
    expected = [_reference(*row) for row in zip(logits, prompts, replies, each, strict=True)]
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)  # float32 against float64


def test_each_row_has_its_own_settings():
    """A batch of mixed rows draws what each row draws alone."""
    each = [
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=0.6, top_k=3),
        Sampling(temperature=1.3, top_p=0.4),
        Sampling(temperature=0.9, top_k=9, top_p=0.7),
    ]
    logits, banned = jnp.asarray(_logits(2)), jnp.zeros(VOCAB, bool)
    uniform = jax.random.uniform(jax.random.key(3), 5)
    active = jnp.ones(5, bool)
    mixed = sampler.next_token(logits, banned, None, _settings(5, *each), active, lambda: uniform)
    for row, sampling in enumerate(each):
        one = slice(row, row + 1)
        alone = sampler.next_token(
            logits[one], banned, None, _settings(1, sampling), active[one], lambda one=one: uniform[one]
        )
        assert (mixed[0][row], mixed[1][row]) == (alone[0][0], alone[1][0])


def _primitives(jaxpr, inside=False):
    """(name, whether it stands inside a cond) of every equation."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, inside
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner, inside or equation.primitive.name == "cond")


def test_greedy_rows_neither_sort_nor_draw():
    """Everything that only sampling needs stands inside a branch; the log-probability needs no sort."""
    settings, active = _settings(5, Sampling()), jnp.ones(5, bool)

    def choose(key):
        return sampler.next_token(
            jnp.asarray(_logits(0)), jnp.zeros(VOCAB, bool), None, settings, active, lambda: jax.random.uniform(key, 5)
        )

    found = set(_primitives(jax.make_jaxpr(choose)(jax.random.key(0)).jaxpr))
    for name in ("sort", "cumsum", "random_bits"):
        assert (name, True) in found and (name, False) not in found
