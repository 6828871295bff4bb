"""SigLIP's vision tower up to the feature layer, and the projector.

Zhai et al. 2023, Hugging Face `SiglipVisionModel`; the projector is Open-Qwen2VL's (arXiv 2504.00595).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8

from infimed_jax.arrays import Array
from infimed_jax.models.compute import Compute, scan_blocks
from infimed_jax.models.infimed import config as infimed
from infimed_jax.models.infimed.weights import tree
from infimed_jax.models.layers import LayerNorm, Linear, parameter
from infimed_jax.models.params import Params
from infimed_jax.models.weights import Tree
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.ops.pooling import adaptive_average_pool
from infimed_jax.sharding import defer_grad_reduction, reshape_rows


class SelfAttention(nn.Module):
    weights: Tree
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        dtype = jnp.dtype(self.compute.dtype)
        x = defer_grad_reduction(x, "tensor")

        def project(name: str) -> Float[Array, "B P A X"]:
            return Linear(self.weights[name], dtype, name=name)(x)

        # XLA on every platform: heads 72 wide and 729 tokens fit no kernel's tiles, and dense scores of 48 images a
        # chip added nothing to the 4B step's peak memory.
        out = attention(project("q_proj"), project("k_proj"), project("v_proj"), Mask(), implementation="xla")
        return Linear(self.weights["out_proj"], dtype, name="out_proj")(out)


class Mlp(nn.Module):
    weights: Tree
    vision: infimed.Vision
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        dtype = jnp.dtype(self.compute.dtype)
        x = Linear(self.weights["fc1"], dtype, name="fc1")(x)
        x = jax.nn.gelu(x, approximate=self.vision.activation == "gelu_tanh")
        return Linear(self.weights["fc2"], dtype, name="fc2")(x)


class Block(nn.Module):
    """Pre-norm transformer block."""

    weights: Tree
    vision: infimed.Vision
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        weights, eps = self.weights, self.vision.norm_eps
        with jax.named_scope("vision_attention"):
            normed = LayerNorm(weights["layer_norm1"], eps, name="layer_norm1")(x)
            x = x + SelfAttention(weights["self_attn"], self.compute, name="self_attn")(normed)
        with jax.named_scope("vision_mlp"):
            normed = LayerNorm(weights["layer_norm2"], eps, name="layer_norm2")(x)
            return x + Mlp(weights["mlp"], self.vision, self.compute, name="mlp")(normed)


class SiglipTower(nn.Module):
    """Pixels → the hidden state of `vision.feature_layer`, every patch, no class token, no final norm."""

    weights: Tree
    vision: infimed.Vision
    compute: Compute

    @nn.compact
    def __call__(self, pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B P E"]:
        weights, vision, dtype = self.weights, self.vision, jnp.dtype(self.compute.dtype)
        with jax.named_scope("patch_embedding"):
            patches = to_patches(pixels, vision.patch_size)
            normalised = (patches.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)
            x = Linear(weights["patch_embedding"], dtype, name="patch_embedding")(normalised)
            x = x + parameter(self, weights["position_embedding"], dtype)
        if vision.num_blocks == 0:
            return x
        blocks = Block(weights["blocks"], vision, self.compute, name="blocks")
        return scan_blocks(lambda block, x: block(x), blocks, x, vision.num_blocks, self.compute)


def to_patches(pixels: UInt8[Array, "B S S 3"], patch: int) -> UInt8[Array, "B P 3*{patch}*{patch}"]:
    """Cut into patches, row-major, each flattened as (row, column, channel); the remainder at the edge is not seen."""
    batch, side = pixels.shape[0], pixels.shape[1]
    grid = side // patch
    cut = pixels[:, : grid * patch, : grid * patch]
    cut = reshape_rows(cut, batch, grid, patch, grid, patch * 3).transpose(0, 1, 3, 2, 4)
    return reshape_rows(cut, batch, grid * grid, patch * patch * 3)


class Projector(nn.Module):
    """Linear, exact GELU, Linear, both with biases: vision width to text width."""

    weights: Tree
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "I P E"]) -> Float[Array, "I P D"]:
        dtype = jnp.dtype(self.compute.dtype)
        x = Linear(self.weights["linear_1"], dtype, name="linear_1")(x)
        x = jax.nn.gelu(x, approximate=False)
        return Linear(self.weights["linear_2"], dtype, name="linear_2")(x)


def vision_features(
    params: Params, pixels: UInt8[Array, "I S S 3"], model: infimed.Model, compute: Compute
) -> Float[Array, "I patches E"]:
    """SigLIP's feature layer of every image."""
    return SiglipTower(tree(model)["vision"], model.vision, compute).apply({"params": params["vision"]}, pixels)


def project(
    params: Params, features: Float[Array, "I patches E"], model: infimed.Model, compute: Compute
) -> Float[Array, "I P D"]:
    """Each image's visual tokens from its features."""
    with jax.named_scope("projector"):
        pooled = adaptive_average_pool(features, model.projector.grid)
        return Projector(tree(model)["projector"], compute).apply({"params": params["projector"]}, pooled)
