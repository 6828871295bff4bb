"""Every setting of the package (`settings`), and how they are read, composed and checked (`reading`)."""

from infimed_jax.config.fields import ConfigError
from infimed_jax.config.reading import from_dict, load, merge, to_dict, with_overrides
from infimed_jax.config.settings import (
    Config,
    Data,
    Grpo,
    Lora,
    Mesh,
    Model,
    Optimizer,
    Projector,
    Sampling,
    Text,
    Train,
    Vision,
)

__all__ = [
    "Config",
    "ConfigError",
    "Data",
    "Grpo",
    "Lora",
    "Mesh",
    "Model",
    "Optimizer",
    "Projector",
    "Sampling",
    "Text",
    "Train",
    "Vision",
    "from_dict",
    "load",
    "merge",
    "to_dict",
    "with_overrides",
]
