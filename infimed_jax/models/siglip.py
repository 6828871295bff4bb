"""SigLIP's vision tower up to the feature layer (Zhai et al. 2023; Hugging Face `SiglipVisionModel`)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from infimed_jax import config
from infimed_jax.models.compute import Compute, scan_blocks
from infimed_jax.models.layers import LayerNorm, Linear, fan_in_normal, weight
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.sharding import reshape_rows, summed_once

_POSITION_INIT = nn.initializers.normal(0.75)
"""For towers that learn from scratch: of the size of the patches' own embedding, where Hugging Face has 1/sqrt(D).
One trial each, one seed, same data: with 1/sqrt(D) questions of place stayed at chance after 1,500 steps, with this
they were answered after 900. The two runs differ in the length of their schedule too."""


class SelfAttention(nn.Module):
    vision: config.Vision
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        d, n = self.vision.hidden_size, self.vision.num_heads
        h = d // n
        dtype = jnp.dtype(self.compute.dtype)
        x = summed_once(x, "tensor")

        def project(name: str) -> Float[Array, "B P N H"]:
            return Linear((d,), (n, h), ("embed", "heads", None), dtype, True, fan_in_normal(d), name=name)(x)

        # XLA on every platform: heads 72 wide and 729 tokens fit no kernel's tiles, and dense scores of 48 images a
        # chip added nothing to the 4B step's peak memory.
        out = attention(project("q_proj"), project("k_proj"), project("v_proj"), Mask(), implementation="xla")
        return Linear((n, h), (d,), ("heads", None, "embed"), dtype, True, fan_in_normal(d), name="out_proj")(out)


class Mlp(nn.Module):
    vision: config.Vision
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        d, f = self.vision.hidden_size, self.vision.intermediate_size
        dtype = jnp.dtype(self.compute.dtype)
        x = Linear((d,), (f,), ("embed", "mlp"), dtype, True, fan_in_normal(d), name="fc1")(x)
        x = jax.nn.gelu(x, approximate=self.vision.activation == "gelu_tanh")
        return Linear((f,), (d,), ("mlp", "embed"), dtype, True, fan_in_normal(f), name="fc2")(x)


class Block(nn.Module):
    """Pre-norm transformer block."""

    vision: config.Vision
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        with jax.named_scope("vision_attention"):
            normed = LayerNorm(self.vision.norm_eps, name="layer_norm1")(x)
            x = x + SelfAttention(self.vision, self.compute, name="self_attn")(normed)
        with jax.named_scope("vision_mlp"):
            normed = LayerNorm(self.vision.norm_eps, name="layer_norm2")(x)
            return x + Mlp(self.vision, self.compute, name="mlp")(normed)


class SiglipTower(nn.Module):
    """Pixels → the hidden state of `vision.feature_layer`, every patch, no class token, no final norm."""

    vision: config.Vision
    compute: Compute

    @nn.compact
    def __call__(self, pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B P D"]:
        vision, dtype = self.vision, jnp.dtype(self.compute.dtype)
        p, d = vision.patch_size, vision.hidden_size
        with jax.named_scope("patch_embedding"):
            patches = to_patches(pixels, p)
            normalised = (patches.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)
            embedding = Linear(
                (p * p * 3,), (d,), (None, "embed"), dtype, True, fan_in_normal(p * p * 3), name="patch_embedding"
            )
            x = embedding(normalised)
            x = x + weight(self, "position_embedding", (vision.num_patches, d), (None, "embed"), _POSITION_INIT, dtype)
        if vision.num_blocks == 0:
            return x
        blocks = Block(vision, self.compute, name="blocks")
        return scan_blocks(lambda block, x: block(x), blocks, x, vision.num_blocks, self.compute)


def to_patches(pixels: UInt8[Array, "B S S 3"], patch: int) -> UInt8[Array, "B P patch*patch*3"]:
    """Cut into patches, row-major, each flattened as (row, column, channel); the remainder at the edge is not seen."""
    batch, side = pixels.shape[0], pixels.shape[1]
    grid = side // patch
    cut = pixels[:, : grid * patch, : grid * patch]
    cut = reshape_rows(cut, batch, grid, patch, grid, patch * 3).transpose(0, 1, 3, 2, 4)
    return reshape_rows(cut, batch, grid * grid, patch * patch * 3)
