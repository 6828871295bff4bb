"""The forward pass a layer at a time, each widened to float32 as it comes up: one layer is in float32 at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infimed_jax import config, sharding
from infimed_jax.data.batch import Batch
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.models.family import family_of, table_path, weights
from infimed_jax.models.params import Params
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.trees import nest


class Outputs(NamedTuple):
    """What the model makes of one row, up to the logits."""

    features: dict[str, np.ndarray]
    """With images, each stage of the encoder: [M, …]."""
    hidden: jax.Array
    """[T,D], after the final norm."""


def layerwise(
    read: Callable[[str], Any], rows: Sequence[Batch], model: config.Model, compute: Compute
) -> list[Outputs]:
    """The outputs of each batch of one row; `read(path)` gives an array or a subtree of the parameters, on the host.

    All rows go through one part after the other.
    """
    family, table = family_of(model), table_path(model)
    part = widen({name: read(name) for name in family.encoder})
    encoded = [_encode(part, row.pixels, model, compute) for row in rows]
    part = widen(nest({table: read(table)}))
    states = [_embed(part, row, stages, model, compute) for row, stages in zip(rows, encoded, strict=True)]
    del part
    stacks = read(family.blocks)
    for number in range(model.num_layers):
        layer = widen(jax.tree.map(lambda leaf, number=number: leaf[number], stacks))
        states = [_block(layer, x, row, model, compute) for x, row in zip(states, rows, strict=True)]
    others = [w.path for w in weights(model) if w.part == model.language and not (w.layers or w.role)]
    norm = widen(nest({path: read(path) for path in others}))
    features = [{name: np.asarray(stage) for name, stage in stages.items()} for stages in encoded]
    return [Outputs(f, forward.final_norm(norm, x[0], model)) for f, x in zip(features, states, strict=True)]


def widen(tree: Mapping[str, Any]) -> Params:
    """Host arrays in float32 on the device."""
    return jax.device_put(jax.tree.map(lambda leaf: leaf.astype(np.float32), tree))


_jit = functools.partial(jax.jit, static_argnames=("model", "compute"))


@_jit
def _encode(params: Params, pixels: Any, model: config.Model, compute: Compute) -> dict[str, jax.Array]:
    """What each stage of the encoder makes of one row's images; empty without images."""
    images, stages = jax.tree.map(lambda x: x[0], pixels), {}
    for name, stage in family_of(model).encoder.items() if len(jax.tree.leaves(images)[0]) else ():
        stages[name] = images = stage(params, images, model, compute)
    return stages


@_jit
def _embed(
    params: Params, row: Batch, stages: dict[str, jax.Array], model: config.Model, compute: Compute
) -> jax.Array:
    last = [*family_of(model).encoder][-1]
    visual = stages[last] if stages else jnp.zeros((0, 0, model.hidden_size))
    flat = sharding.reshape_rows(visual, 1, visual.shape[0] * visual.shape[1], visual.shape[2])
    return forward.embed(params, row.tokens, row.visual_index, flat, model, compute)


@_jit
def _block(layer: Params, x: jax.Array, row: Batch, model: config.Model, compute: Compute) -> jax.Array:
    mask = Mask(causal=True, query_segments=row.segment_ids, key_segments=row.segment_ids)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return attention(q, k, v, mask, implementation=compute.implementation), None

    return forward.text_block(layer, x, row.positions, attend, model, compute)[0]
