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
from infimed_jax.config.fields import require
from infimed_jax.models.weights import Unweighted, Weight


@dataclass(frozen=True)
class Family:
    """Functions of the family's own settings, `model`."""

    weights: Callable[[Any], tuple[Weight, ...]]
    """Every weight, in the order of the computation."""
    places: Callable[[Any], Mapping[str, int]]
    """Rows that one image gives to the products of each `Weight.per` but `token`."""
    unweighted: Callable[[Any], tuple[Unweighted, ...]]
    """The products of one image that multiply no weight."""


def family_of(model: config.Model) -> Family:
    """The family that `model.family` names; ConfigError where its module defines none."""
    return _family(model.family)


@functools.cache
def _family(name: str) -> Family:
    module = plugins.load(config.FAMILIES, name, "model.family")
    if not hasattr(module, "FAMILY") and hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.family")
    family = getattr(module, "FAMILY", None)
    require(
        isinstance(family, Family), f"model.family={name}: its module must define FAMILY, a Family of models/family.py"
    )
    return family


def weights(model: config.Model) -> tuple[Weight, ...]:
    """Every weight of `model`, in the order of the computation."""
    return family_of(model).weights(model)
