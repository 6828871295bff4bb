"""Every attention backend against one written in NumPy, a query at a time; gradients against the XLA backend."""

import logging

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from infimed_jax import sharding
from infimed_jax.errors import UserError
from infimed_jax.ops import attention as attention_module
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.ops.attention.backends.splash import splash_attention
from infimed_jax.ops.attention.backends.xla import xla_attention


def numpy_attention(q, k, v, sees):
    """`sees(b, t, s)` says whether query t of row b sees key s."""
    out = np.zeros_like(q, np.float64)
    groups = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
        if not keys:
            continue
        scores = k[b, keys, n // groups].astype(np.float64) @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, keys, n // groups]
    return out


def random_qkv(rng, batch=2, queries=9, keys=9, heads=4, kv_heads=2, width=8):
    shapes = [(batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def random_segments(rng, batch, length):
    """Uneven runs 1, 2, …, then a tail of padding; the last row is padding alone."""
    segments = np.zeros((batch, length), np.int32)
    for row in segments[:-1]:
        cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), start=1):
            row[start:end] = number
    return segments


@pytest.mark.parametrize("name", ["xla", "rows"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_rows_match_numpy(name, causal):
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, batch=3)
    segments = random_segments(rng, 3, 9)
    out = attention(q, k, v, Mask(causal, jnp.asarray(segments), jnp.asarray(segments)), implementation=name)

    def sees(b, t, s):
        return segments[b, t] == segments[b, s] != 0 and (not causal or s <= t)

    np.testing.assert_allclose(out, numpy_attention(q, k, v, sees), atol=1e-5)
    assert not np.any(np.asarray(out)[-1])


@pytest.mark.parametrize("name", ["xla", "rows"])
def test_segments_see_the_prefix_that_they_share(name):
    rng = np.random.default_rng(7)
    q, k, v = random_qkv(rng, batch=2, queries=12, keys=12)
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0], [0, 0] + [1] * 5 + [0] * 5], np.int32)
    prefixes = np.array([[0, 0, 0, 1, 1, 1, 1, 0, 0, 4, 4, 0], [0] * 12], np.int32)
    mask = Mask(True, jnp.asarray(segments), jnp.asarray(segments), query_prefixes=jnp.asarray(prefixes))
    out = attention(q, k, v, mask, implementation=name)

    def sees(b, t, s):
        own = segments[b, t]
        return own != 0 and s <= t and segments[b, s] in {own, prefixes[b, t]} - {0}

    np.testing.assert_allclose(out, numpy_attention(q, k, v, sees), atol=1e-5)
    assert not np.any(np.asarray(out)[segments == 0])


@pytest.mark.parametrize("name", ["xla", "rows"])
def test_cached_keys_are_seen_by_position_and_segment(name):
    """Decoding: few queries, more keys, in any order, some slots still empty."""
    rng = np.random.default_rng(1)
    q, k, v = random_qkv(rng, queries=2, keys=7)
    query_positions = np.array([[3, 4], [0, 9]], np.int32)
    key_positions = np.array([rng.permutation(7), rng.permutation(7)], np.int32)
    key_segments = rng.integers(0, 2, (2, 7)).astype(np.int32)
    mask = Mask(True, jnp.ones((2, 2), jnp.int32), key_segments, query_positions, key_positions)
    out = attention(q, k, v, mask, implementation=name)

    def sees(b, t, s):
        return key_segments[b, s] == 1 and key_positions[b, s] <= query_positions[b, t]

    np.testing.assert_allclose(out, numpy_attention(q, k, v, sees), atol=1e-5)


@pytest.mark.parametrize("name", ["xla", "rows"])
def test_without_a_mask_everything_is_seen(name):
    q, k, v = random_qkv(np.random.default_rng(2), kv_heads=4)
    out = attention(q, k, v, Mask(), implementation=name)
    np.testing.assert_allclose(out, numpy_attention(q, k, v, lambda *_: True), atol=1e-5)


def gradients(function, q, k, v, mask):
    """Of a loss that weighs every output differently."""
    cotangent = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), jnp.float32)
    return jax.jit(jax.grad(lambda q, k, v: (function(q, k, v, mask) * cotangent).sum(), (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_gradient_is_that_of_xla(causal):
    rng = np.random.default_rng(3)
    q, k, v = random_qkv(rng, batch=3)
    segments = jnp.asarray(random_segments(rng, 3, 9))
    mask = Mask(causal, segments, segments)
    actual = gradients(lambda *a: attention(*a, implementation="rows"), q, k, v, mask)
    for a, b in zip(actual, gradients(xla_attention, q, k, v, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert not np.any(np.asarray(a)[-1])  # the row of padding


def test_xla_gradient_matches_finite_differences():
    rng = np.random.default_rng(4)
    q, k, v = random_qkv(rng, batch=2, queries=5, keys=5, heads=2, kv_heads=1, width=4)
    segments = jnp.asarray(random_segments(rng, 2, 5))
    mask = Mask(True, segments, segments)
    jax.test_util.check_grads(lambda *x: xla_attention(*x, mask), (q, k, v), 1, ["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_splash_interpreted_matches_xla(causal):
    """Uneven segments and a padding tail, several blocks, grouped heads: forward and gradient."""
    rng = np.random.default_rng(5)
    q, k, v = random_qkv(rng, batch=2, queries=256, keys=256, heads=4, kv_heads=2, width=128)
    segments = np.zeros((2, 256), np.int32)
    segments[0, :37], segments[0, 37:165], segments[0, 165:240] = 1, 2, 3
    segments[1, :256] = 1
    segments = jnp.asarray(segments)
    mask = Mask(causal, segments, segments)
    interpreted = lambda *a: splash_attention(*a, interpret=True)  # noqa: E731
    # Masked scores of unused tiles make the kernel's sums differ in order only.
    np.testing.assert_allclose(interpreted(q, k, v, mask), xla_attention(q, k, v, mask), atol=2e-5)
    for a, b in zip(gradients(interpreted, q, k, v, mask), gradients(xla_attention, q, k, v, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "positions", "message"),
    [
        (dict(queries=192, keys=192, width=128), False, "tiles by 128"),  # 64 (mod 128)
        (dict(queries=128, keys=128, width=72), False, "tiles by 128"),
        (dict(queries=128, keys=256, width=128), False, "as many keys as queries"),
        (dict(queries=128, keys=128, width=128), True, "explicit positions"),
    ],
)
def test_splash_refuses_what_it_cannot_do(shape, positions, message):
    q, k, v = random_qkv(np.random.default_rng(6), **shape)
    index = [jnp.zeros((2, x.shape[1]), jnp.int32) for x in (q, k)] if positions else [None, None]
    with pytest.raises(UserError, match=message):
        attention(q, k, v, Mask(True, None, None, *index), implementation="splash")


def test_splash_refuses_other_devices_than_tpus():
    """Shapes that it tiles: here the kernel's own refusal would be a traceback. A mesh without devices may trace it."""
    q, k, v = random_qkv(np.random.default_rng(6), queries=128, keys=128, width=128)
    refused = r"splash is a kernel for TPUs, and this runs on cpu: set train.attention=auto"
    for call in (attention, jax.jit(attention, static_argnames="implementation")):
        with pytest.raises(UserError, match=refused):
            call(q, k, v, Mask(True), implementation="splash")
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh()):
        out = jax.eval_shape(lambda *x: attention(*x, Mask(True), implementation="splash"), *abstract)
    assert out.shape == q.shape


def test_splash_refuses_two_different_segment_arrays():
    q, k, v = random_qkv(np.random.default_rng(6), queries=128, keys=128, width=128)
    ones, twos = jnp.ones((2, 128), jnp.int32), jnp.full((2, 128), 2)
    with pytest.raises(ValueError, match="one array of segments"):
        attention(q, k, v, Mask(True, ones, twos), implementation="splash")


def test_an_unknown_name_raises():
    q, k, v = random_qkv(np.random.default_rng(7))
    with pytest.raises(
        UserError, match=r"train.attention must be one of rows, splash, xla, not 'flash'; did you mean 'splash'"
    ):
        attention(q, k, v, Mask(), implementation="flash")


def test_half_a_mask_raises():
    ones = jnp.ones((1, 4), jnp.int32)
    for arguments in ((True, ones, None), (True, None, None, ones, None), (False, None, None, ones, ones)):
        with pytest.raises(ValueError, match="Mask"):
            Mask(*arguments)


def test_the_platforms_choice_is_logged_once(caplog):
    attention_module._choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=attention_module.log.name):
        choices = {name: attention_module._choice(name) for name in ("cpu", "tpu", "gpu", "cpu", "tpu")}
    assert choices == {"cpu": "rows", "tpu": "splash", "gpu": "xla"}
    assert len(caplog.records) == 3
