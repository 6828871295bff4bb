"""Attention in plain XLA with a dense mask: the oracle of every other backend, and the backend of GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float

from infimed_jax.arrays import Array
from infimed_jax.ops.attention.backend import Backend
from infimed_jax.ops.attention.mask import Mask
from infimed_jax.sharding import spec_of


def xla_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Scores and softmax in float32, one [B, N, T, S] array at a time."""
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    rows, _, split, _ = spec_of(q)
    grouped = (batch, queries, kv_heads, heads // kv_heads, width)
    q = jnp.reshape(q * width**-0.5, grouped, out_sharding=PartitionSpec(rows, None, split))
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    weights = _masked_softmax(scores, dense_mask(mask, queries, keys)).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    return jnp.reshape(out, (batch, queries, heads, width), out_sharding=PartitionSpec(rows, None, split))


def _masked_softmax(
    scores: Float[Array, "B K G T S"], visible: Bool[Array, "#B 1 1 T S"] | None
) -> Float[Array, "B K G T S"]:
    if visible is None:
        return jax.nn.softmax(scores, axis=-1)
    # A finite number, and zeros after exp: rows that see nothing sum to 0, and no NaN reaches a gradient.
    scores = jnp.where(visible, scores, -1e30)
    weights = jnp.where(visible, jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))), 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


def dense_mask(mask: Mask, queries: int, keys: int) -> Bool[Array, "#B 1 1 T S"] | None:
    """True where a query sees a key, broadcastable over heads; None where everything is seen."""
    visible = None
    if mask.causal:
        if mask.query_positions is not None:
            visible = mask.query_positions[:, :, None] >= mask.key_positions[:, None, :]
        else:
            visible = (jnp.arange(queries)[:, None] >= jnp.arange(keys))[None]
    if mask.query_segments is not None:
        same = mask.query_segments[:, :, None] == mask.key_segments[:, None, :]
        if mask.query_prefixes is not None:
            same |= mask.query_prefixes[:, :, None] == mask.key_segments[:, None, :]
        same &= (mask.query_segments[:, :, None] != 0) & (mask.key_segments[:, None, :] != 0)
        visible = same if visible is None else visible & same
    return None if visible is None else visible[:, None, None]


BACKEND = Backend(run=xla_attention, prefixes=True, dense=True)
