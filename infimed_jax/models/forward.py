"""The whole model of any family as functions of a plain parameter tree; everything runs under `jax.set_mesh`.

The tree has the paths of the family's weights; linears are {"kernel"[, "bias"]}, norms {"scale"[, "bias"]}, and the
layers of a stack lie on axis 0 of its leaves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from infimed_jax import config, sharding
from infimed_jax.arrays import Array
from infimed_jax.data.batch import Batch
from infimed_jax.models.compute import Compute
from infimed_jax.models.family import Attend, family_of, head_path, table_path
from infimed_jax.models.params import Params
from infimed_jax.ops.attention import Mask
from infimed_jax.ops.cross_entropy import target_logprobs
from infimed_jax.trees import at


def encode_images(params: Params, pixels: Any, model: config.Model, compute: Compute) -> Float[Array, "B MP D"]:
    """Every image's visual tokens, those of the largest image's number; `pixels` is a tree with [B,M] in front.

    M may be 0. What a smaller image leaves of its P places is no visual token.
    """
    first = jax.tree.leaves(pixels)[0]
    rows, images = first.shape[:2]
    if images == 0:
        nothing = (rows, 0, model.hidden_size)
        return jnp.zeros(nothing, compute.dtype, out_sharding=PartitionSpec(sharding.spec_of(first)[0]))
    visual = jax.tree.map(lambda x: sharding.reshape_rows(x, rows * images, *x.shape[2:]), pixels)
    for stage in family_of(model).encoder.values():
        visual = stage(params, visual, model, compute)
    return sharding.reshape_rows(visual, rows, images * visual.shape[1], model.hidden_size)


def embed(
    params: Params,
    tokens: Int[Array, "B T"],
    visual_index: Int[Array, "B T"],
    visual: Float[Array, "B MP D"],
    model: config.Model,
    compute: Compute,
) -> Float[Array, "B T D"]:
    """Text embeddings, with the row's visual tokens laid over the places whose index is not negative.

    A token or an index that does not exist becomes NaN, so that the loss shows it, instead of a neighbour's value.
    """
    split = sharding.spec_of(tokens)[0]
    with jax.named_scope("embed"):
        table = jax.sharding.reshard(at(params, table_path(model)).astype(compute.dtype), PartitionSpec())
        text = table.at[tokens].get(mode="fill", fill_value=jnp.nan, out_sharding=PartitionSpec(split))
    if visual.shape[1] == 0:
        return text
    with jax.named_scope("merge"):
        # Row by row, so that no device needs another's images: `.at[rows, index]` would compile to an all-gather.
        take = jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False))
        return jnp.where(visual_index[..., None] >= 0, take(visual, visual_index).astype(text.dtype), text)


def hidden_states(params: Params, batch: Batch, model: config.Model, compute: Compute) -> Float[Array, "B T D"]:
    """Hidden states of packed rows after the final norm; a segment sees itself alone, and what it continues."""
    visual = encode_images(params, batch.pixels, model, compute)
    x = embed(params, batch.tokens, batch.visual_index, visual, model, compute)
    ids = batch.segment_ids
    mask = Mask(causal=True, query_segments=ids, key_segments=ids, query_prefixes=batch.prefix_ids)
    return family_of(model).hidden(params, x, batch.positions, mask, model, compute)


def next_tokens(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """What each place predicts; the last predicts nothing and gets 0, so its weight must be 0 (`build_row`)."""
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))


def token_logprobs(
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    model: config.Model,
    compute: Compute,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log p(targets) and the entropy, in nats, computed where `weights` is not 0 and 0 elsewhere."""
    with jax.named_scope("head"):
        return target_logprobs(hidden, _unembedding(params, model, compute), targets, weights, compute.logit_chunk)


def text_block(
    layer: Params,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B A T"],
    attend: Attend,
    model: config.Model,
    compute: Compute,
) -> tuple[Float[Array, "B T D"], Any]:
    """One text layer with its own (unstacked) parameters; `attend` brings the keys, and its aux is returned."""
    return family_of(model).block(layer, x, positions, attend, model, compute)


def final_norm(params: Params, x: Float[Array, "... D"], model: config.Model) -> Float[Array, "... D"]:
    return family_of(model).final_norm(params, x, model)


def logits(
    params: Params, hidden: Float[Array, "... D"], model: config.Model, compute: Compute
) -> Float[Array, "... V"]:
    """Float32 logits of normed hidden states; split over the vocabulary by `tensor`."""
    unembedding = _unembedding(params, model, compute)
    return jnp.einsum(
        "...d,dv->...v",
        hidden,
        unembedding,
        preferred_element_type=jnp.float32,
        out_sharding=PartitionSpec(*sharding.spec_of(hidden)[:-1], sharding.spec_of(unembedding)[1]),
    )


def _unembedding(params: Params, model: config.Model, compute: Compute) -> Float[Array, "D V"]:
    head = head_path(model)
    matrix = at(params, head) if head else at(params, table_path(model)).T
    return jax.sharding.reshard(matrix.astype(compute.dtype), sharding.gathered_spec(("embed", "vocab")))
