"""Attention over the cache against the model's own attention, and where prompts land in it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from infimed_jax.models.infimed.config import Model, Text
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.sampling import cache
from infimed_jax.sharding import BATCH
from tests.tiny import one_device

MODEL = Model(text=Text(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=4))


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _place(x, *axes):
    return jax.sharding.reshard(jnp.asarray(x), PartitionSpec(BATCH, *axes))


def test_each_appended_token_attends_like_the_last_row_of_full_attention():
    lengths = np.array([0, 3, 8, 5], np.int32)
    keys, values, q = _normal(0, 4, 9, 2, 4), _normal(1, 4, 9, 2, 4), _normal(2, 4, 1, 6, 4)
    # Garbage where nothing has been written yet must not be seen.
    written = (np.arange(9) < lengths[:, None])[:, None, :, None]
    old = tuple(np.where(written, np.swapaxes(x, 1, 2), np.float32(1e4)) for x in (keys, values))
    k, v = (x[np.arange(4), lengths][:, None] for x in (keys, values))
    with one_device():
        out, new = cache.append_and_attend(
            tuple(_place(x, "tensor") for x in old),
            _place(lengths),
            *(_place(x, None, "tensor") for x in (q, k, v)),
        )
        mask = Mask(
            causal=True,
            query_positions=jnp.asarray(lengths)[:, None],
            key_positions=jnp.tile(jnp.arange(9), (4, 1)),
        )
        expected = attention(*map(jnp.asarray, (q, keys, values)), mask, implementation="xla")
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for b, n in enumerate(lengths):
        np.testing.assert_array_equal(np.swapaxes(new[0][b], 0, 1)[: n + 1], keys[b, : n + 1])
        assert (np.asarray(new[1])[b, :, n + 1 :] == 1e4).all()


def test_prompts_go_to_the_slots_that_ask_for_them():
    with one_device():
        old = cache.empty_cache(5, 7, MODEL, "float32")[0]
        new = _normal(0, 3, 4, 2, 4), _normal(1, 3, 4, 2, 4)
        source = _place(np.array([2, -1, 0, 0, -1], np.int32))
        filled = cache.insert(old, tuple(map(jnp.asarray, new)), source)
    for layer, rows in zip(filled, new, strict=True):
        expected = np.zeros((5, 7, 2, 4), np.float32)
        expected[[0, 2, 3], :4] = np.asarray(rows)[[2, 0, 0]]
        np.testing.assert_array_equal(np.swapaxes(layer, 1, 2), expected)
