"""What a family declares in settings: the model's shape, and what an image and a position are to it. Without JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np

from infimed_jax import plugins
from infimed_jax.config.fields import ConfigError, Group, Member

FAMILIES = "infimed_jax.models"
"""The room of the families."""


class ImageSpan(NamedTuple):
    """The places that one image takes among the tokens."""

    tokens: int
    grid: tuple[int, int]
    """Rows and columns of its visual tokens."""


@dataclass(frozen=True)
class Model(Group, path="model"):
    """The model's shape: each family declares its own settings, and answers what the rest of the package asks."""

    PARTS: ClassVar[tuple[str, ...]] = ()
    """First names of the family's weights, which `train.train` may list; the last one is the language model."""

    position_axes: ClassVar[int] = 1
    """Axes of a position: 1, or 3 of multimodal rotary embeddings."""
    sized: ClassVar[bool] = False
    """Whether an image's visual tokens depend on its size, so that packing has to read it."""

    family: Annotated[str, Member(FAMILIES)] = field(default="infimed", kw_only=True)
    """The model's kind. A module of your own defines `MODEL`, its settings, and `FAMILY`, what it computes."""

    @property
    def language(self) -> str:
        """The part that is the language model."""
        return self.PARTS[-1]

    @property
    def split(self) -> dict[str, int]:
        """Sizes that `mesh.tensor` splits, by their settings' names; equal to those of the table of weights."""
        raise NotImplementedError

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the largest image."""
        raise NotImplementedError

    def image(self, height: int, width: int) -> ImageSpan:
        """The visual tokens of an image of so many pixels."""
        raise NotImplementedError

    def host_arrays(self, image: Any) -> Any:
        """A PIL image in RGB as the encoder takes it: an array, or a tree of arrays, whose shapes never change."""
        raise NotImplementedError

    def span(self, pixels: Any) -> ImageSpan:
        """The visual tokens of an image by its `host_arrays`."""
        raise NotImplementedError

    def blank_image(self) -> Any:
        """Zeros in the shapes and types of `host_arrays`."""
        raise NotImplementedError

    def positions(self, visual: np.ndarray, spans: Sequence[ImageSpan]) -> np.ndarray:
        """i32[A,n] of a segment whose image places are `visual`, from 0; what continues it follows the largest."""
        return np.arange(len(visual), dtype=np.int32)[None]

    def with_visual_tokens(self, tokens: int) -> Model:
        """The same with so many visual tokens an image; ConfigError where that cannot be."""
        raise ConfigError(f"the visual tokens of the family {self.family} cannot be chosen: leave out --visual-tokens")

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    @property
    def hidden_size(self) -> int:
        """Width of the language model's residual stream."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Blocks of the language model."""
        raise NotImplementedError

    @property
    def num_heads(self) -> int:
        """Query heads of the language model."""
        raise NotImplementedError

    @property
    def num_kv_heads(self) -> int:
        raise NotImplementedError

    @property
    def head_dim(self) -> int:
        raise NotImplementedError


def model_class(family: str) -> type[Model]:
    """The settings that `family` declares; ConfigError where its module has none."""
    kind = getattr(plugins.load(FAMILIES, family, "model.family"), "MODEL", None)
    if isinstance(kind, type) and issubclass(kind, Model):
        return kind
    raise ConfigError(
        f"model.family={family}: its module must define MODEL, a dataclass that extends infimed_jax.config.Model"
    )
