"""The sampler's three compiled programs: encode images, prefill prompts into slots, decode a burst of tokens.

All are jitted here, once. Weights, keys and sampling settings are plain arguments: another weight sync, another key,
another temperature or another set of prompts of the same shapes compiles nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard
from jaxtyping import Bool, Float, Int

from infimed_jax import config
from infimed_jax.arrays import Array
from infimed_jax.data.batch import Batch
from infimed_jax.models import forward
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.sampling.cache import ROWS, Cache, append_and_attend, empty_cache, insert
from infimed_jax.sampling.sampler import History, Settings, next_token
from infimed_jax.sampling.weights import Decoder
from infimed_jax.sharding import BATCH

WHOLE = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Sequences under way, on the device. A prompt's last token is fed again as the first decoded one, so that prefill
    needs neither logits nor a sampler."""

    cache: Cache
    token: Int[Array, " slots"]
    """To be fed next, at place `length`."""
    length: Int[Array, " slots"]
    """Places whose keys the cache holds, from 0."""
    position: Int[Array, "slots A"]
    """The next token's position on each axis; every later token's is one more."""
    count: Int[Array, " slots"]
    """Tokens generated so far."""
    limit: Int[Array, " slots"]
    """Tokens to be generated at most."""
    request: Int[Array, " slots"]
    """Number of the slot's request: with `count`, all that its randomness depends on."""
    active: Bool[Array, " slots"]
    settings: Settings
    history: History | None
    """None in an engine without penalties."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Admission:
    """New requests for free slots, host side; slots with source -1 go on as they are."""

    source: np.ndarray
    """i32[slots]: which row of the prefill batch."""
    place: np.ndarray | None
    """i32[slots, S]: where in that row the tokens of positions 0, 1, … stand; None where they are its first ones."""
    token: np.ndarray
    """i32[slots]: the prompt's last token."""
    length: np.ndarray
    """i32[slots]: the prompt's tokens but the last."""
    position: np.ndarray
    """i32[slots, A]: the last token's."""
    limit: np.ndarray
    """i32[slots]"""
    request: np.ndarray
    """i32[slots]"""
    settings: Settings
    prompt: np.ndarray | None
    """bool[slots, V]: the prompt's tokens; None in an engine without penalties."""


@functools.partial(jax.jit, static_argnames=("slots", "length", "model", "dtype", "penalties"))
def empty_slots(slots: int, length: int, model: config.Model, dtype: str, penalties: bool) -> Slots:
    """No sequence yet, room for `length` positions each; `penalties` makes room for a History."""

    def zeros(dtype: Any, *shape: int) -> Array:
        return jnp.zeros((slots, *shape), dtype, out_sharding=ROWS)

    return Slots(
        cache=empty_cache(slots, length, model, dtype),
        token=zeros(jnp.int32),
        length=zeros(jnp.int32),
        position=zeros(jnp.int32, model.position_axes),
        count=zeros(jnp.int32),
        limit=zeros(jnp.int32),
        request=zeros(jnp.int32),
        active=zeros(bool),
        settings=Settings.filled(lambda name: zeros(Settings.dtype(name))),
        history=History(zeros(bool, model.vocab_size), zeros(jnp.int32, model.vocab_size)) if penalties else None,
    )


@functools.partial(jax.jit, static_argnames=("images", "model", "dtype"))
def empty_table(images: int, model: config.Model, dtype: str) -> Float[Array, "images P D"]:
    """Room for the visual tokens of a prefill batch's distinct images, whole on every device."""
    shape = (images, model.visual_tokens, model.hidden_size)
    return jnp.zeros(shape, dtype, out_sharding=WHOLE)


@functools.partial(jax.jit, donate_argnames="table")
def encode(
    decoder: Decoder, table: Float[Array, "images P D"], pixels: Any, first: Int[Array, ""]
) -> Float[Array, "images P D"]:
    """The table with the visual tokens of C images, a tree with [C] in front, at places first, first + 1, …"""
    alone = jax.tree.map(lambda x: reshard(x, ROWS)[:, None], pixels)
    visual = forward.encode_images(decoder.weights, alone, decoder.model, decoder.compute)
    return jax.lax.dynamic_update_slice_in_dim(table, reshard(visual, WHOLE).astype(table.dtype), first, axis=0)


@functools.partial(jax.jit, donate_argnames="slots")
def prefill(
    decoder: Decoder,
    slots: Slots,
    batch: Batch,
    table: Float[Array, "images P D"],
    images: Int[Array, "R M"],
    admission: Admission,
) -> Slots:
    """`slots` with the prompts of `batch` (R rows of T tokens, without pixels) admitted.

    `images[r, m]` is the place in `table` of row r's m-th image.
    """
    batch, images, admission = jax.tree.map(lambda x: reshard(x, ROWS), (batch, images, admission))
    weights, model, compute = decoder.weights, decoder.model, decoder.compute
    visual = table.at[images].get(mode="clip", out_sharding=ROWS)
    visual = jnp.reshape(visual, (len(images), -1, table.shape[-1]), out_sharding=ROWS)
    segments = batch.segment_ids
    mask = Mask(causal=True, query_segments=segments, key_segments=segments, query_prefixes=batch.prefix_ids)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        return attention(q, k, v, mask, implementation=compute.implementation), (k, v)

    x = forward.embed(weights, batch.tokens, batch.visual_index, visual, model, compute)
    cache = []
    for layer, old in zip(decoder.layers, slots.cache, strict=True):
        x, new = forward.text_block(layer, x, batch.positions, attend, model, compute)
        cache.append(insert(old, new, admission.source, admission.place))
    return _admitted(replace(slots, cache=tuple(cache)), admission)


def _admitted(slots: Slots, admission: Admission) -> Slots:
    """All but the cache of the admitted slots as their requests begin."""
    new = admission.source >= 0

    def pick(value: Array | int, old: Array) -> Array:
        return jnp.where(jnp.expand_dims(new, range(1, old.ndim)), value, old)

    history = slots.history
    if history is not None:
        history = History(pick(admission.prompt, history.prompt), pick(0, history.reply))
    return replace(
        slots,
        token=pick(admission.token, slots.token),
        length=pick(admission.length, slots.length),
        position=pick(admission.position, slots.position),
        count=pick(0, slots.count),
        limit=pick(admission.limit, slots.limit),
        request=pick(admission.request, slots.request),
        active=new | slots.active,
        settings=jax.tree.map(pick, admission.settings, slots.settings),
        history=history,
    )


@functools.partial(jax.jit, static_argnames="tokens", donate_argnames="slots")
def burst(
    decoder: Decoder,
    slots: Slots,
    banned: Bool[Array, " V"],
    stops: Int[Array, " stops"],
    key: jax.Array,
    enough: Int[Array, ""],
    tokens: int,
) -> tuple[Slots, tuple[Array, Array, Array, Array]]:
    """Decode until `tokens` tokens a slot, or until at most `enough` slots are active.

    Returns the slots and, whole on every device, tokens i32[tokens, slots], their log-probabilities f32[tokens, slots],
    how many of them each slot generated (from the first on), and which slots are still active.
    """
    before = slots.count

    def unfinished(carry: tuple[Array, Slots, Array, Array]) -> Array:
        step, slots, _, _ = carry
        return (step < tokens) & (slots.active.sum() > enough)

    def advance(carry: tuple[Array, Slots, Array, Array]) -> tuple[Array, Slots, Array, Array]:
        step, slots, drawn, logprobs = carry
        slots, token, logprob = _decode(decoder, slots, banned, stops, key)
        drawn = jax.lax.dynamic_update_index_in_dim(drawn, token, step, axis=0)
        logprobs = jax.lax.dynamic_update_index_in_dim(logprobs, logprob, step, axis=0)
        return step + 1, slots, drawn, logprobs

    shape, columns = (tokens, len(before)), PartitionSpec(None, BATCH)
    _, slots, drawn, logprobs = jax.lax.while_loop(
        unfinished,
        advance,
        (
            jnp.int32(0),
            slots,
            jnp.zeros(shape, jnp.int32, out_sharding=columns),
            jnp.zeros(shape, jnp.float32, out_sharding=columns),
        ),
    )
    reports = (drawn, logprobs, slots.count - before, slots.active)
    return slots, jax.tree.map(lambda x: reshard(x, WHOLE), reports)


def _decode(decoder: Decoder, slots: Slots, banned: Array, stops: Array, key: jax.Array) -> tuple[Slots, Array, Array]:
    """One token for every slot: (slots, token i32[slots], log-probability f32[slots]); inactive slots stand still."""
    logits, cache = decode_logits(decoder, slots)

    def choose(key: jax.Array, banned: Array, logits: Array, slots: Slots) -> tuple[Array, Array]:
        def uniform() -> Array:
            keys = jax.vmap(lambda r, n: jax.random.fold_in(jax.random.fold_in(key, r), n))(slots.request, slots.count)
            return jax.vmap(jax.random.uniform)(keys)

        return next_token(logits, banned, slots.history, slots.settings, slots.active, uniform)

    # Every device draws for its own slots, over the whole vocabulary.
    token, logprob = jax.shard_map(choose, in_specs=(WHOLE, WHOLE, ROWS, ROWS), out_specs=ROWS)(
        key, banned, reshard(logits, ROWS), replace(slots, cache=())
    )
    step = slots.active.astype(jnp.int32)
    count = slots.count + step
    stopped = (token[:, None] == stops).any(-1) | (count >= slots.limit)
    history = slots.history
    if history is not None:
        now = (token[:, None] == jnp.arange(history.reply.shape[1])) & slots.active[:, None]
        history = replace(history, reply=history.reply + now)
    return (
        replace(
            slots,
            cache=cache,
            token=jnp.where(slots.active, token, slots.token),
            length=slots.length + step,
            position=slots.position + step[:, None],
            count=count,
            active=slots.active & ~stopped,
            history=history,
        ),
        token,
        logprob,
    )


def decode_logits(decoder: Decoder, slots: Slots) -> tuple[Float[Array, "slots V"], Cache]:
    """Raw float32 logits after `slots.token`, and the cache that holds its keys and values."""
    weights, model, compute = decoder.weights, decoder.model, decoder.compute
    no_image = jnp.full_like(slots.token, -1)[:, None]
    nothing = jnp.zeros((len(slots.token), 0, model.hidden_size), compute.dtype, out_sharding=ROWS)
    x = forward.embed(weights, slots.token[:, None], no_image, nothing, model, compute)
    cache = []
    for layer, old in zip(decoder.layers, slots.cache, strict=True):
        attend = functools.partial(append_and_attend, old, slots.length)
        x, new = forward.text_block(layer, x, slots.position[:, :, None], attend, model, compute)
        cache.append(new)
    return forward.logits(weights, forward.final_norm(weights, x[:, 0], model), model, compute), tuple(cache)
