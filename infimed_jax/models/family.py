"""What the rest of the package may ask about a model: a family is a folder in `models/`, a module or a .py file.

Its module defines `MODEL`, the settings (`config.Model`), and `FAMILY`; a folder keeps the latter in its `family.py`,
so that reading settings imports neither JAX nor Flax.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from infimed_jax import config, plugins
from infimed_jax.arrays import Array
from infimed_jax.config.fields import require
from infimed_jax.models.hugging_face import HuggingFace
from infimed_jax.models.weights import Unweighted, Weight

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]), rotated and normed → (out [B,T,N,H], whatever the caller collects)."""


@dataclass(frozen=True)
class Family:
    """Functions of the family's own settings, `model`; `params` are the whole tree or what of it a function uses.

    Arrays lie on an explicit mesh (`infimed_jax.sharding`): a lookup, a reshape or a repeat may have to name the
    sharding of its result, as in `models/forward.py`. Replies are computed block by block and training by `hidden`,
    so nothing may stand between the embedding lookup and the first block: positions belong inside the blocks.
    """

    weights: Callable[[Any], tuple[Weight, ...]]
    """Every weight, in the order of the computation."""
    places: Callable[[Any], Mapping[str, int]]
    """Rows that one image gives to the products of each `Weight.per` but `token`."""
    unweighted: Callable[[Any], tuple[Unweighted, ...]]
    """The products of one image that multiply no weight."""
    encoder: Mapping[str, Callable[..., Array]]
    """From pixels to visual tokens, a stage for each part that has weights in it, by the part's name: (params, images
    [I, …], model, compute) to the next stage's images, and at last to [I, P, D]. The first takes `host_arrays`."""
    blocks: str
    """Path of the language model's stack of blocks in the tree of parameters."""
    hidden: Callable[..., Array]
    """(params, embeddings [B,T,D], positions [B,A,T], mask, model, compute) to hidden states: every `block`, then
    `final_norm`."""
    block: Callable[..., tuple[Array, Any]]
    """(one layer's parameters, x [B,T,D], positions [B,A,T], attend, model, compute) to (x, what `attend` collects)."""
    final_norm: Callable[..., Array]
    """(params, x [..., D], model) to normed hidden states."""
    hugging_face: HuggingFace
    """Its names and settings in Hugging Face's files."""


def family_of(model: config.Model) -> Family:
    """The family that `model.family` names; ConfigError where its module defines none."""
    return family_named(model.family)


@functools.cache
def family_named(name: str) -> Family:
    """The family of that name in models/, of a dotted module, or of a .py file."""
    module = plugins.load(config.FAMILIES, name, "model.family")
    if not hasattr(module, "FAMILY") and hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.family")
    family = getattr(module, "FAMILY", None)
    require(
        isinstance(family, Family), f"model.family={name}: its module must define FAMILY, a Family of models/family.py"
    )
    return family


def table_path(model: config.Model) -> str:
    """Path of the embedding that tokens look up."""
    return next(weight.path for weight in weights(model) if weight.role == "table")


def head_path(model: config.Model) -> str | None:
    """Path of the output layer's own matrix; None where it is the transposed embedding."""
    return next((weight.path for weight in weights(model) if weight.role == "head"), None)


def weights(model: config.Model) -> tuple[Weight, ...]:
    """Every weight of `model`, in the order of the computation."""
    return family_of(model).weights(model)
