"""Splash attention: the TPU kernel, aware of segments, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from infimed_jax.sharding import spec_of

if TYPE_CHECKING:
    from infimed_jax.ops.attention import Mask

_LANES = 128
_BLOCKS = (512, 256, 128)


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Self-attention of packed rows; the multi-query kernel mapped over K heads, so that no key is repeated.

    Raises ValueError for explicit positions, other keys than queries, and sizes that the kernel cannot tile.
    `interpret` runs the kernel's logic on any platform, for tests.
    """
    _, tokens, heads, width = q.shape
    groups = heads // k.shape[2]
    if mask.query_positions is not None:
        raise ValueError("splash attention is causal by index: rows with explicit positions need attention='xla'")
    if k.shape[1] != tokens:
        raise ValueError(f"splash attention wants as many keys as queries, not {k.shape[1]} for {tokens}: use 'xla'")
    if mask.query_segments is not mask.key_segments:
        raise ValueError("splash attention wants one array of segments for queries and keys: use 'xla'")
    if tokens % _LANES or width % _LANES:
        raise ValueError(
            f"splash attention tiles by {_LANES}: rows of {tokens} tokens with heads of {width} need attention='xla'"
        )
    block = next(size for size in _BLOCKS if tokens % size == 0)
    shape = (tokens, tokens)
    head_mask = splash_attention_mask.CausalMask(shape) if mask.causal else splash_attention_mask.FullMask(shape)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([head_mask] * groups),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )

    def row(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        """[T,K,G,H], [T,K,H], [T,K,H], [T] → [T,K,G,H]."""
        ids = None if segments is None else splash_attention_kernel.SegmentIds(segments, segments)
        out = jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(
            q.transpose(1, 2, 0, 3), k.transpose(1, 0, 2), v.transpose(1, 0, 2)
        )
        out = out.transpose(2, 0, 1, 3)
        # The kernel lets padding see padding; here padding sees nothing.
        return out if segments is None else jnp.where(segments[:, None, None, None] != 0, out, 0)

    def shard(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        grouped = (q * width**-0.5).reshape(*q.shape[:2], k.shape[2], -1, width)
        return jax.vmap(row)(grouped, k, v, segments).reshape(q.shape)

    placed = PartitionSpec(*spec_of(q))
    rows = None if mask.query_segments is None else PartitionSpec(placed[0])
    return jax.shard_map(shard, in_specs=(placed, placed, placed, rows), out_specs=placed, check_vma=False)(
        q, k, v, mask.query_segments
    )
