"""The sampler's three compiled programs: encode images, prefill prompts into slots, decode a burst of tokens.

All are jitted here, once, with settings as static arguments and weights as plain ones: another weight sync, another key
or another set of prompts of the same shapes compiles nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard
from jaxtyping import Array, Bool, Float, Int, UInt8

from infimed_jax import config
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.sampling.cache import ROWS, Cache, append_and_attend, empty_cache, insert
from infimed_jax.sampling.sampler import next_token
from infimed_jax.sharding import BATCH

WHOLE = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Sequences under way, on the device. A prompt's last token is fed again as the first decoded one, so that prefill
    needs neither logits nor a sampler."""

    cache: Cache
    token: Int[Array, " slots"]
    """To be fed next, at position `length`."""
    length: Int[Array, " slots"]
    """Positions whose keys the cache holds, from 0."""
    count: Int[Array, " slots"]
    """Tokens generated so far."""
    request: Int[Array, " slots"]
    """Number of the slot's request: with `count`, all that its randomness depends on."""
    active: Bool[Array, " slots"]
    seen: Bool[Array, "slots V"] | None
    """Tokens of prompt and reply; None without a repetition penalty."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Admission:
    """New requests for free slots, host side; slots with source -1 go on as they are."""

    source: np.ndarray
    """i32[slots]: which row of the prefill batch."""
    token: np.ndarray
    """i32[slots]: the prompt's last token."""
    length: np.ndarray
    """i32[slots]: the prompt's tokens but the last."""
    request: np.ndarray
    """i32[slots]"""
    seen: np.ndarray | None
    """bool[slots, V]: the prompt's tokens; None without a repetition penalty."""


@functools.partial(jax.jit, static_argnames=("slots", "length", "text", "dtype", "track_seen"))
def empty_slots(slots: int, length: int, text: config.Text, dtype: str, track_seen: bool) -> Slots:
    """No sequence yet, room for `length` positions each."""

    def zeros(dtype: Any, *shape: int) -> Array:
        return jnp.zeros((slots, *shape), dtype, out_sharding=ROWS)

    return Slots(
        cache=empty_cache(slots, length, text, dtype),
        token=zeros(jnp.int32),
        length=zeros(jnp.int32),
        count=zeros(jnp.int32),
        request=zeros(jnp.int32),
        active=zeros(bool),
        seen=zeros(bool, text.vocab_size) if track_seen else None,
    )


@functools.partial(jax.jit, static_argnames=("images", "model", "dtype"))
def empty_table(images: int, model: config.Model, dtype: str) -> Float[Array, "images P D"]:
    """Room for the visual tokens of a prefill batch's distinct images, whole on every device."""
    shape = (images, model.projector.visual_tokens, model.text.hidden_size)
    return jnp.zeros(shape, dtype, out_sharding=WHOLE)


@functools.partial(jax.jit, static_argnames=("model", "compute"), donate_argnames="table")
def encode(
    weights: dict[str, Any],
    table: Float[Array, "images P D"],
    pixels: UInt8[Array, "C S S 3"],
    first: Int[Array, ""],
    model: config.Model,
    compute: Compute,
) -> Float[Array, "images P D"]:
    """The table with the visual tokens of `pixels` at places first, first + 1, …"""
    visual = forward.encode_images(weights, reshard(pixels, ROWS)[:, None], model, compute)
    return jax.lax.dynamic_update_slice_in_dim(table, reshard(visual, WHOLE).astype(table.dtype), first, axis=0)


@functools.partial(jax.jit, static_argnames=("model", "compute"), donate_argnames="slots")
def prefill(
    weights: dict[str, Any],
    slots: Slots,
    tokens: Int[Array, "R T"],
    segment_ids: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    visual_index: Int[Array, "R T"],
    table: Float[Array, "images P D"],
    images: Int[Array, "R M"],
    admission: Admission,
    model: config.Model,
    compute: Compute,
) -> Slots:
    """`slots` with the prompts admitted: one prompt a row, `images[r, m]` the place in `table` of its m-th image."""
    tokens, segment_ids, positions, visual_index, images, admission = jax.tree.map(
        lambda x: reshard(x, ROWS), (tokens, segment_ids, positions, visual_index, images, admission)
    )
    visual = table.at[images].get(mode="clip", out_sharding=ROWS)
    visual = jnp.reshape(visual, (len(images), -1, table.shape[-1]), out_sharding=ROWS)
    mask = Mask(causal=True, query_segments=segment_ids, key_segments=segment_ids)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        return attention(q, k, v, mask, implementation=compute.implementation), (k, v)

    x = forward.embed(weights, tokens, visual_index, visual, model, compute)
    cache = []
    for layer, old in zip(weights["text"]["layers"], slots.cache, strict=True):
        x, new = forward.text_block(layer, x, positions, attend, model, compute)
        cache.append(insert(old, new, admission.source))
    admitted = admission.source >= 0
    return Slots(
        cache=tuple(cache),
        token=jnp.where(admitted, admission.token, slots.token),
        length=jnp.where(admitted, admission.length, slots.length),
        count=jnp.where(admitted, 0, slots.count),
        request=jnp.where(admitted, admission.request, slots.request),
        active=admitted | slots.active,
        seen=None if slots.seen is None else jnp.where(admitted[:, None], admission.seen, slots.seen),
    )


@functools.partial(jax.jit, static_argnames=("model", "compute", "sampling"), donate_argnames="slots")
def burst(
    weights: dict[str, Any],
    slots: Slots,
    banned: Bool[Array, " V"],
    stops: Int[Array, " stops"],
    key: jax.Array,
    enough: Int[Array, ""],
    model: config.Model,
    compute: Compute,
    sampling: config.Sampling,
) -> tuple[Slots, tuple[Array, Array, Array, Array]]:
    """Decode until `sampling.burst` tokens a slot, or until at most `enough` slots are active.

    Returns the slots and, whole on every device, tokens i32[burst, slots], their log-probabilities f32[burst, slots],
    how many of them each slot generated (from the first on), and which slots are still active.
    """
    before = slots.count

    def unfinished(carry: tuple[Array, Slots, Array, Array]) -> Array:
        step, slots, _, _ = carry
        return (step < sampling.burst) & (slots.active.sum() > enough)

    def advance(carry: tuple[Array, Slots, Array, Array]) -> tuple[Array, Slots, Array, Array]:
        step, slots, tokens, logprobs = carry
        slots, token, logprob = _decode(weights, slots, banned, stops, key, model, compute, sampling)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, axis=0)
        logprobs = jax.lax.dynamic_update_index_in_dim(logprobs, logprob, step, axis=0)
        return step + 1, slots, tokens, logprobs

    shape, columns = (sampling.burst, len(before)), PartitionSpec(None, BATCH)
    _, slots, tokens, logprobs = jax.lax.while_loop(
        unfinished,
        advance,
        (
            jnp.int32(0),
            slots,
            jnp.zeros(shape, jnp.int32, out_sharding=columns),
            jnp.zeros(shape, jnp.float32, out_sharding=columns),
        ),
    )
    reports = (tokens, logprobs, slots.count - before, slots.active)
    return slots, jax.tree.map(lambda x: reshard(x, WHOLE), reports)


def _decode(
    weights: dict[str, Any],
    slots: Slots,
    banned: Array,
    stops: Array,
    key: jax.Array,
    model: config.Model,
    compute: Compute,
    sampling: config.Sampling,
) -> tuple[Slots, Array, Array]:
    """One token for every slot: (slots, token i32[slots], log-probability f32[slots]); inactive slots stand still."""
    logits, cache = decode_logits(weights, slots, model, compute)

    def choose(
        key: jax.Array, banned: Array, logits: Array, seen: Array | None, request: Array, count: Array
    ) -> tuple[Array, Array]:
        keys = jax.vmap(lambda r, n: jax.random.fold_in(jax.random.fold_in(key, r), n))(request, count)
        return next_token(logits, banned, seen, keys, sampling)

    # Every device draws for its own slots, over the whole vocabulary.
    token, logprob = jax.shard_map(choose, in_specs=(WHOLE, WHOLE, ROWS, ROWS, ROWS, ROWS), out_specs=ROWS)(
        key, banned, reshard(logits, ROWS), slots.seen, slots.request, slots.count
    )
    step = slots.active.astype(jnp.int32)
    count = slots.count + step
    stopped = (token[:, None] == stops).any(-1) | (count >= sampling.max_tokens)
    seen = slots.seen
    if seen is not None:
        seen = seen | (token[:, None] == jnp.arange(seen.shape[1]))
    return (
        replace(
            slots,
            cache=cache,
            token=jnp.where(slots.active, token, slots.token),
            length=slots.length + step,
            count=count,
            active=slots.active & ~stopped,
            seen=seen,
        ),
        token,
        logprob,
    )


def decode_logits(
    weights: dict[str, Any], slots: Slots, model: config.Model, compute: Compute
) -> tuple[Float[Array, "slots V"], Cache]:
    """Raw float32 logits after `slots.token`, and the cache that holds its keys and values."""
    no_image = jnp.full_like(slots.token, -1)[:, None]
    nothing = jnp.zeros((len(slots.token), 0, model.text.hidden_size), compute.dtype, out_sharding=ROWS)
    x = forward.embed(weights, slots.token[:, None], no_image, nothing, model, compute)
    cache = []
    for layer, old in zip(weights["text"]["layers"], slots.cache, strict=True):
        attend = functools.partial(append_and_attend, old, slots.length)
        x, new = forward.text_block(layer, x, slots.length[:, None], attend, model, compute)
        cache.append(new)
    return forward.logits(weights, forward.final_norm(weights, x[:, 0], model), model, compute), tuple(cache)
