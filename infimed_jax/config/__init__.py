"""Every setting of the package (`settings`), and how they are read, composed and checked (`reading`)."""

from infimed_jax.config.fields import ConfigError
from infimed_jax.config.reading import from_dict, load, load_groups, merge, to_dict, with_overrides
from infimed_jax.config.settings import (
    FAMILIES,
    Config,
    Data,
    Grpo,
    ImageSpan,
    Lora,
    Mesh,
    Model,
    Optimizer,
    Sampling,
    Train,
    model_class,
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
