"""The whole model as functions of a plain parameter tree; everything runs under `jax.set_mesh`.

    {"vision": {"patch_embedding", "position_embedding", "blocks"},
     "projector": {"linear_1", "linear_2"},
     "text": {"embed_tokens", "layers", "norm", "lm_head" where untied}}

Linears are {"kernel"[, "bias"]}, norms {"scale"[, "bias"]}; `blocks` and `layers` are stacked on axis 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from infimed_jax import config, sharding
from infimed_jax.data.batch import Batch
from infimed_jax.models.compute import Compute
from infimed_jax.models.infimed.text import Attend, Block, Qwen3
from infimed_jax.models.infimed.vision import Projector, SiglipTower
from infimed_jax.models.infimed.weights import tree
from infimed_jax.models.layers import RMSNorm
from infimed_jax.models.params import Params
from infimed_jax.ops.attention import Mask
from infimed_jax.ops.cross_entropy import target_logprobs
from infimed_jax.ops.pooling import adaptive_average_pool
from infimed_jax.ops.rope import rope_tables


def encode_images(
    params: Params, pixels: UInt8[Array, "B M S S 3"], model: config.Model, compute: Compute
) -> Float[Array, "B M*P D"]:
    """Every image's visual tokens: SigLIP's feature layer, adaptive average pooling, MLP. M may be 0."""
    rows, images = pixels.shape[:2]
    visual_tokens, width = model.projector.visual_tokens, model.text.hidden_size
    if images == 0:
        return jnp.zeros((rows, 0, width), compute.dtype, out_sharding=PartitionSpec(sharding.spec_of(pixels)[0]))
    visual = project(params, vision_features(params, pixels, model, compute), model, compute)
    return sharding.reshape_rows(visual, rows, images * visual_tokens, width)


def vision_features(
    params: Params, pixels: UInt8[Array, "B M S S 3"], model: config.Model, compute: Compute
) -> Float[Array, "B*M patches E"]:
    """SigLIP's feature layer of every image."""
    flat = sharding.reshape_rows(pixels, pixels.shape[0] * pixels.shape[1], *pixels.shape[2:])
    return SiglipTower(tree(model)["vision"], model.vision, compute).apply({"params": params["vision"]}, flat)


def project(
    params: Params, features: Float[Array, "I patches E"], model: config.Model, compute: Compute
) -> Float[Array, "I P D"]:
    """Each image's visual tokens from its features."""
    with jax.named_scope("projector"):
        pooled = adaptive_average_pool(features, model.projector.grid)
        return Projector(tree(model)["projector"], compute).apply({"params": params["projector"]}, pooled)


def embed(
    params: Params,
    tokens: Int[Array, "B T"],
    visual_index: Int[Array, "B T"],
    visual: Float[Array, "B M*P D"],
    model: config.Model,
    compute: Compute,
) -> Float[Array, "B T D"]:
    """Text embeddings, with the row's visual tokens laid over the places whose index is not negative.

    A token or an index that does not exist becomes NaN, so that the loss shows it, instead of a neighbour's value.
    """
    split = sharding.spec_of(tokens)[0]
    with jax.named_scope("embed"):
        table = jax.sharding.reshard(params["text"]["embed_tokens"].astype(compute.dtype), PartitionSpec())
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
    return Qwen3(tree(model)["text"], model.text, compute).apply({"params": params["text"]}, x, batch.positions, mask)


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
    layer_params: Params,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    attend: Attend,
    model: config.Model,
    compute: Compute,
) -> tuple[Float[Array, "B T D"], Any]:
    """One text layer with its own (unstacked) parameters; `attend` brings the keys, and its aux is returned."""
    rope = rope_tables(positions, model.text.head_dim, model.text.rope_theta)
    return Block(tree(model)["text"]["layers"], model.text, compute).apply({"params": layer_params}, x, rope, attend)


def final_norm(params: Params, x: Float[Array, "... D"], model: config.Model) -> Float[Array, "... D"]:
    return RMSNorm(tree(model)["text"]["norm"], model.text.norm_eps).apply({"params": params["text"]["norm"]}, x)


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
    text = params["text"]
    table = text["embed_tokens"].T if model.text.tie_embeddings else text["lm_head"]
    return jax.sharding.reshard(table.astype(compute.dtype), sharding.gathered_spec(("embed", "vocab")))
