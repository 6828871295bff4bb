"""The model's parameters: random values, shapes and shardings, and counts."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from infimed_jax import config, sharding
from infimed_jax.models.compute import Compute
from infimed_jax.models.projector import Projector
from infimed_jax.models.qwen3 import Qwen3
from infimed_jax.models.siglip import SiglipTower
from infimed_jax.ops.attention import Mask

Params = Mapping[str, Any]


def init_params(key: jax.Array, model: config.Model) -> Params:
    """Random float32 parameters, born in their shardings under the current mesh; traceable by `jax.eval_shape`."""
    sharding.check_fits(model, jax.sharding.get_abstract_mesh())
    return _init(key, model)


@functools.partial(jax.jit, static_argnames="model")
def _init(key: jax.Array, model: config.Model) -> Params:
    compute = Compute("float32", "none", "xla", 1)
    vision_key, projector_key, text_key = jax.random.split(key, 3)
    pixels = jnp.zeros((1, model.vision.image_size, model.vision.image_size, 3), jnp.uint8)
    patch = jnp.zeros((1, 1, model.vision.hidden_size))
    embedding = jnp.zeros((1, 1, model.text.hidden_size))
    position = jnp.zeros((1, 1), jnp.int32)
    return {
        "vision": SiglipTower(model.vision, compute).init(vision_key, pixels)["params"],
        "projector": Projector(model.text.hidden_size, compute).init(projector_key, patch)["params"],
        "text": Qwen3(model.text, compute).init(text_key, embedding, position, Mask())["params"],
    }


def abstract_params(model: config.Model) -> Params:
    """The tree of shapes, types and shardings under the current mesh, without computing anything."""
    # The key is made inside: under an abstract mesh nothing may create an array.
    return jax.eval_shape(lambda: init_params(jax.random.key(0), model))


def param_count(model: config.Model) -> dict[str, int]:
    """Parameters of each part and in `total`; needs no mesh and no memory."""
    current = jax.sharding.get_abstract_mesh()
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh() if current.empty else current):
        tree = abstract_params(model)
    counts = {part: sum(math.prod(x.shape) for x in jax.tree.leaves(tree[part])) for part in tree}
    return counts | {"total": sum(counts.values())}
