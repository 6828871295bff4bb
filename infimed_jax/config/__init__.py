"""Every setting of the package (`settings`, `model`), and how they are read, composed and checked (`reading`)."""

from infimed_jax.config.fields import ConfigError
from infimed_jax.config.model import FAMILIES, ImageSpan, Model, model_class
from infimed_jax.config.reading import from_dict, load, load_groups, merge, to_dict, with_overrides
from infimed_jax.config.settings import (
    Config,
    Data,
    Grpo,
    Lora,
    Mesh,
    Optimizer,
    Sampling,
    Train,
)

__all__ = [
    "FAMILIES",
    "Config",
    "ConfigError",
    "Data",
    "Grpo",
    "ImageSpan",
    "Lora",
    "Mesh",
    "Model",
    "Optimizer",
    "Sampling",
    "Train",
    "from_dict",
    "load",
    "load_groups",
    "merge",
    "model_class",
    "to_dict",
    "with_overrides",
]
