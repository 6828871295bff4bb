"""The settings of InfiMed-Foundation: SigLIP's tower, the projector and Qwen3. Light: `--help` reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
from PIL import Image

from infimed_jax import config
from infimed_jax.config.fields import Count, Group, require


@dataclass(frozen=True)
class Vision(Group, path="model.vision"):
    """SigLIP's vision tower. The defaults are so400m-patch14-384."""

    image_size: Count = 384
    """Side of the square input image, pixels."""
    patch_size: Count = 14
    """Side of a patch, pixels; a remainder at the image's edge is cut off (384 = 27 * 14 + 6)."""
    hidden_size: Count = 1152
    """Width of the residual stream."""
    intermediate_size: Count = 4304
    """Width inside the feed-forward block."""
    num_layers: Count = 27
    """Blocks of the source model; the tower holds only those that `feature_layer` needs."""
    num_heads: Count = 16
    """Attention heads; their width is hidden_size / num_heads."""
    feature_layer: int = -2
    """The feature is Hugging Face's `hidden_states[feature_layer]`: 0 is the embeddings, -1 the last block's output."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """Hugging Face's SigLIP has the tanh approximation; the ancestor's vision library has exact GELU."""
    norm_eps: float = 1e-6
    """Added to the variance in layer normalisation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hidden_size % self.num_heads == 0, "vision.hidden_size must be a multiple of vision.num_heads")
        require(self.image_size >= self.patch_size, "vision.image_size must hold at least one patch")
        require(
            -self.num_layers - 1 <= self.feature_layer <= self.num_layers,
            f"vision.feature_layer must lie in [-{self.num_layers + 1}, {self.num_layers}]",
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def num_blocks(self) -> int:
        """Blocks that run, so blocks that the tower holds."""
        return self.feature_layer if self.feature_layer >= 0 else self.num_layers + 1 + self.feature_layer


@dataclass(frozen=True)
class Projector(Group, path="model.projector"):
    """Adaptive average pooling and the two-layer MLP (Linear, exact GELU, Linear)."""

    visual_tokens: int = 729
    """Tokens of one image after pooling, a square number. Recipe: 144 in pretraining, 729 (no pooling) in SFT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.visual_tokens > 0 and math.isqrt(self.visual_tokens) ** 2 == self.visual_tokens,
            f"projector.visual_tokens must be a square number, not {self.visual_tokens}",
        )

    @property
    def grid(self) -> int:
        return math.isqrt(self.visual_tokens)


@dataclass(frozen=True)
class Text(Group, path="model.text"):
    """Qwen3, dense. The defaults are Qwen3-4B."""

    vocab_size: Count = 151_936
    """Rows of the embedding; at least the tokenizer's length (Qwen3 keeps 267 free rows)."""
    hidden_size: Count = 2560
    """Width of the residual stream."""
    intermediate_size: Count = 9728
    """Width inside the feed-forward block."""
    num_layers: Count = 36
    """Number of blocks."""
    num_heads: Count = 32
    """Query heads."""
    num_kv_heads: Count = 8
    """Key-value heads (grouped-query attention); divides num_heads."""
    head_dim: Count = 128
    """Width of a head; even, for the rotary embedding."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary embedding; 5e6 in Qwen3-4B-Instruct-2507."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMS normalisation."""
    tie_embeddings: bool = True
    """Whether the output layer is the transposed embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_heads % self.num_kv_heads == 0, "text.num_heads must be a multiple of text.num_kv_heads")
        require(self.head_dim % 2 == 0, "text.head_dim must be even (rotary embedding)")


@dataclass(frozen=True)
class Model(config.Model):
    """The model's shape: vision tower, projector and language model."""

    PARTS: ClassVar = ("vision", "projector", "text")

    vision: Vision = field(default_factory=Vision)
    projector: Projector = field(default_factory=Projector)
    text: Text = field(default_factory=Text)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.projector.grid <= self.vision.grid,
            f"model.projector.visual_tokens={self.projector.visual_tokens} exceeds the {self.vision.num_patches} "
            "patches of an image: set a square number up to that",
        )

    @property
    def split(self) -> dict[str, int]:
        return {
            "text.num_kv_heads": self.text.num_kv_heads,
            "text.intermediate_size": self.text.intermediate_size,
            "text.hidden_size": self.text.hidden_size,
            "text.vocab_size": self.text.vocab_size,
            "vision.num_heads": self.vision.num_heads,
            "vision.intermediate_size": self.vision.intermediate_size,
        }

    @property
    def visual_tokens(self) -> int:
        return self.projector.visual_tokens

    def image(self, height: int, width: int) -> config.ImageSpan:
        return config.ImageSpan(self.projector.visual_tokens, (self.projector.grid, self.projector.grid))

    def host_arrays(self, image: Image.Image) -> np.ndarray:
        """u8[S,S,3]: bicubic, aspect ratio ignored."""
        side = self.vision.image_size
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))

    def span(self, pixels: np.ndarray) -> config.ImageSpan:
        return self.image(*pixels.shape[:2])

    def blank_image(self) -> np.ndarray:
        return np.zeros((self.vision.image_size, self.vision.image_size, 3), np.uint8)

    def with_visual_tokens(self, tokens: int) -> Model:
        return replace(self, projector=Projector(visual_tokens=tokens))

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.text.hidden_size

    @property
    def num_layers(self) -> int:
        return self.text.num_layers

    @property
    def num_heads(self) -> int:
        return self.text.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.text.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.text.head_dim
