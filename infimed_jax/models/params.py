"""The model's parameters: random values, shapes and shardings, and counts, all from its table of weights."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from infimed_jax import config, sharding
from infimed_jax.models.family import weights
from infimed_jax.models.layers import initial
from infimed_jax.trees import nest

Params = Mapping[str, Any]


def init_params(key: jax.Array, model: config.Model) -> Params:
    """Random float32 parameters, born in their shardings under the current mesh; traceable by `jax.eval_shape`."""
    sharding.check_fits(model, jax.sharding.get_abstract_mesh())
    return _init(key, model)


@functools.partial(jax.jit, static_argnames="model")
def _init(key: jax.Array, model: config.Model) -> Params:
    """A weight's values depend on the key and its path alone, so another table changes no other weight."""
    keys = {weight.path: jax.random.fold_in(key, zlib.crc32(weight.path.encode())) for weight in weights(model)}
    return nest({weight.path: initial(weight, keys[weight.path]) for weight in weights(model)})


def abstract_params(model: config.Model) -> Params:
    """The tree of shapes, types and shardings under the current mesh, without computing anything."""
    # The key is made inside: under an abstract mesh nothing may create an array.
    return jax.eval_shape(lambda: init_params(jax.random.key(0), model))


def param_count(model: config.Model) -> dict[str, int]:
    """Parameters of each part and in `total`."""
    counts: dict[str, int] = {}
    for weight in weights(model):
        counts[weight.part] = counts.get(weight.part, 0) + weight.size
    return counts | {"total": sum(counts.values())}
