"""Splash attention: the TPU kernel, aware of segments, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from infimed_jax.arrays import Array
from infimed_jax.ops.attention.backend import Backend
from infimed_jax.ops.attention.mask import Mask
from infimed_jax.sharding import spec_of

_LANES = 128
_BLOCKS = (512, 256, 128)
"""Sides of the square blocks that the kernel computes or skips, the largest that divides a row first."""


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Self-attention of packed rows; the multi-query kernel mapped over K heads, so that no key is repeated.

    `interpret` runs the kernel's logic on any platform, for tests.
    """
    _, tokens, heads, width = q.shape
    groups = heads // k.shape[2]

    def shard(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        # The kernel's tables are arrays, so they are made here, where no axis is explicit.
        kernel = _kernel(tokens, groups, mask.causal, interpret)
        grouped = (q * width**-0.5).reshape(*q.shape[:2], k.shape[2], groups, width)
        return jax.vmap(functools.partial(_row, kernel))(grouped, k, v, segments).reshape(q.shape)

    placed = PartitionSpec(*spec_of(q))
    rows = None if mask.query_segments is None else PartitionSpec(placed[0])
    return jax.shard_map(shard, in_specs=(placed, placed, placed, rows), out_specs=placed, check_vma=False)(
        q, k, v, mask.query_segments
    )


def _kernel(tokens: int, groups: int, causal: bool, interpret: bool) -> Callable[..., Array]:
    """The multi-query kernel for the `groups` queries of one key head."""
    block = next(size for size in _BLOCKS if tokens % size == 0)
    blocks = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    shape = (tokens, tokens)
    head = splash_attention_mask.CausalMask(shape) if causal else splash_attention_mask.FullMask(shape)
    return splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([head] * groups),
        block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(blocks, block)),
        interpret=interpret,
    )


def _row(
    kernel: Callable[..., Array],
    q: Float[Array, "T K G H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    segments: Int[Array, " T"] | None,
) -> Float[Array, "T K G H"]:
    ids = None if segments is None else splash_attention_kernel.SegmentIds(segments, segments)
    heads = q.transpose(1, 2, 0, 3), k.swapaxes(0, 1), v.swapaxes(0, 1)
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(*heads).transpose(2, 0, 1, 3)
    # The kernel lets padding see padding; here padding sees nothing.
    return out if segments is None else jnp.where(segments[:, None, None, None] != 0, out, 0)


def _refuses(q: tuple[int, ...], k: tuple[int, ...], mask: Mask) -> str:
    tokens, width = q[1], q[3]
    if mask.query_positions is not None:
        return "splash attention is causal by index: rows with explicit positions need train.attention=xla"
    if k[1] != tokens:
        return f"splash attention wants as many keys as queries, not {k[1]} for {tokens}: use train.attention=xla"
    if mask.query_segments is not mask.key_segments:
        return "splash attention wants one array of segments for queries and keys: use train.attention=xla"
    if tokens % _LANES or width % _LANES:
        return f"splash attention tiles by {_LANES}: rows of {tokens} tokens, heads of {width} need train.attention=xla"
    return ""


def _causal_keys(length: int) -> int:
    """Blocks above the diagonal are skipped; segments skip no block."""
    block = next((size for size in _BLOCKS if length % size == 0), length)
    return (length + block) // 2


BACKEND = Backend(
    run=splash_attention,
    platforms=("tpu",),
    only="tpu",
    refuses=_refuses,
    fused=True,
    causal_keys=_causal_keys,
    backward_products=7,  # scores again in each of two kernels
)
