"""Qwen3, dense (Qwen3 technical report, arXiv 2505.09388; Hugging Face `Qwen3ForCausalLM`)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from infimed_jax.arrays import Array
from infimed_jax.models.compute import Compute, scan_blocks
from infimed_jax.models.family import Attend
from infimed_jax.models.infimed import config as infimed
from infimed_jax.models.infimed.weights import tree
from infimed_jax.models.layers import Linear, RMSNorm
from infimed_jax.models.params import Params
from infimed_jax.models.weights import Tree
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.ops.rope import apply_rope, rope_tables
from infimed_jax.sharding import defer_grad_reduction


class SelfAttention(nn.Module):
    """Grouped-query attention with RMS-normed queries and keys; `attend` says over which keys."""

    weights: Tree
    text: infimed.Text
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], rope: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        weights, eps = self.weights, self.text.norm_eps
        linear = functools.partial(_linear, weights, self.compute)
        x = defer_grad_reduction(x, "tensor")
        query, key, value = linear("q_proj")(x), linear("k_proj")(x), linear("v_proj")(x)
        query = apply_rope(RMSNorm(weights["q_norm"], eps, name="q_norm")(query), rope)
        key = apply_rope(RMSNorm(weights["k_norm"], eps, name="k_norm")(key), rope)
        out, aux = attend(query, key, value)
        return linear("o_proj")(out), aux


class Mlp(nn.Module):
    """SwiGLU."""

    weights: Tree
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        linear = functools.partial(_linear, self.weights, self.compute)
        x = defer_grad_reduction(x, "tensor")
        gate, up = linear("gate_proj")(x), linear("up_proj")(x)
        return linear("down_proj")(jax.nn.silu(gate) * up)


def _linear(weights: Tree, compute: Compute, name: str) -> Linear:
    return Linear(weights[name], jnp.dtype(compute.dtype), compute.lora_scale, name=name)


class Block(nn.Module):
    """Pre-norm transformer block; the same in training's scan and in the sampler's unrolled layers."""

    weights: Tree
    text: infimed.Text
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], rope: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        weights, eps = self.weights, self.text.norm_eps
        with jax.named_scope("attention"):
            normed = RMSNorm(weights["input_layernorm"], eps, name="input_layernorm")(x)
            mixed, aux = SelfAttention(weights["self_attn"], self.text, self.compute, name="self_attn")(
                normed, rope, attend
            )
            x = x + mixed
        with jax.named_scope("mlp"):
            normed = RMSNorm(weights["post_attention_layernorm"], eps, name="post_attention_layernorm")(x)
            return x + Mlp(weights["mlp"], self.compute, name="mlp")(normed), aux


class Qwen3(nn.Module):
    """Embeddings to hidden states after the final norm."""

    weights: Tree
    text: infimed.Text
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], mask: Mask) -> Float[Array, "B T D"]:
        text = self.text
        rope = rope_tables(positions, text.head_dim, text.rope_theta)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return attention(q, k, v, mask, implementation=self.compute.implementation), None

        x = scan_blocks(
            lambda block, x: block(x, rope, attend)[0],
            Block(self.weights["layers"], text, self.compute, name="layers"),
            x,
            text.num_layers,
            self.compute,
        )
        return RMSNorm(self.weights["norm"], text.norm_eps, name="norm")(x)


def hidden(
    params: Params,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B 1 T"],
    mask: Mask,
    model: infimed.Model,
    compute: Compute,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm."""
    return Qwen3(tree(model)["text"], model.text, compute).apply({"params": params["text"]}, x, positions[:, 0], mask)


def block(
    layer: Params,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B 1 T"],
    attend: Attend,
    model: infimed.Model,
    compute: Compute,
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer with its own (unstacked) parameters; `attend` brings the keys, and what it collects is returned."""
    rope = rope_tables(positions[:, 0], model.text.head_dim, model.text.rope_theta)
    return Block(tree(model)["text"]["layers"], model.text, compute).apply({"params": layer}, x, rope, attend)


def final_norm(params: Params, x: Float[Array, "... D"], model: infimed.Model) -> Float[Array, "... D"]:
    return RMSNorm(tree(model)["text"]["norm"], model.text.norm_eps).apply({"params": params["text"]["norm"]}, x)
