"""The key-value cache: one (k, v) pair a layer, each [slots, S, K, H], static shapes, written in place.

A slot's keys stand at the index of their position, so "causal by position" is the whole mask: what an earlier sequence
left behind a slot's last position is never seen, and is overwritten before the position is reached.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from infimed_jax import config
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.sharding import BATCH

ROWS = PartitionSpec(BATCH)
KEYS = PartitionSpec(BATCH, None, "tensor", None)
_EVERYWHERE = PartitionSpec(None, None, "tensor", None)

LayerCache = tuple[Float[Array, "slots S K H"], Float[Array, "slots S K H"]]
Cache = tuple[LayerCache, ...]


def empty_cache(slots: int, length: int, text: config.Text, dtype: str) -> Cache:
    """Zeros for `length` positions a slot; slots over data and fsdp, key heads over tensor."""
    shape = (slots, length, text.num_kv_heads, text.head_dim)
    return tuple(
        (jnp.zeros(shape, dtype, out_sharding=KEYS), jnp.zeros(shape, dtype, out_sharding=KEYS))
        for _ in range(text.num_layers)
    )


def attend_and_append(
    layer: LayerCache,
    lengths: Int[Array, " slots"],
    q: Float[Array, "slots 1 N H"],
    k: Float[Array, "slots 1 K H"],
    v: Float[Array, "slots 1 K H"],
) -> tuple[Float[Array, "slots 1 N H"], LayerCache]:
    """Put each slot's new key and value at position `lengths`, and attend from there: (out, the layer's cache)."""

    def append(old: Array, new: Array, lengths: Array) -> Array:
        return old.at[jnp.arange(len(lengths)), lengths].set(new[:, 0], unique_indices=True, mode="promise_in_bounds")

    # Each device writes its own slots and heads: left to the partitioner, a scatter may become a gather of the cache.
    write = jax.shard_map(append, in_specs=(KEYS, KEYS, ROWS), out_specs=KEYS)
    keys, values = write(layer[0], k, lengths), write(layer[1], v, lengths)
    index = jnp.broadcast_to(jnp.arange(keys.shape[1], dtype=jnp.int32), keys.shape[:2], out_sharding=ROWS)
    mask = Mask(causal=True, query_positions=lengths[:, None], key_positions=index)
    return attention(q, keys, values, mask, implementation="xla"), (keys, values)


def insert(layer: LayerCache, new: LayerCache, source: Int[Array, " slots"]) -> LayerCache:
    """The cache with row `source[b]` of `new` [R,T,K,H] as slot b's first T places; -1 leaves a slot as it is.

    One row may go to many slots: a group's prompt is computed once.
    """

    def place(old: Array, new: Array, source: Array) -> Array:
        slot = jnp.where(source >= 0, jnp.arange(len(source)), len(source))
        return old.at[slot, : new.shape[1]].set(new[jnp.maximum(source, 0)], mode="drop")

    write = jax.shard_map(place, in_specs=(KEYS, _EVERYWHERE, ROWS), out_specs=KEYS)
    return tuple(write(old, jax.sharding.reshard(x, _EVERYWHERE), source) for old, x in zip(layer, new, strict=True))
