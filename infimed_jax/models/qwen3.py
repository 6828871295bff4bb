"""Qwen3, dense (Qwen3 technical report, arXiv 2505.09388; Hugging Face `Qwen3ForCausalLM`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from infimed_jax import config
from infimed_jax.models.compute import Compute, scan_blocks
from infimed_jax.models.layers import Linear, RMSNorm, normal_002, weight
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.ops.rope import apply_rope, rope_tables
from infimed_jax.sharding import summed_once

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]), rotated and normed → (out [B,T,N,H], whatever the caller collects)."""


class SelfAttention(nn.Module):
    """Grouped-query attention with RMS-normed queries and keys; `attend` says over which keys."""

    text: config.Text
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], rope: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        text, dtype = self.text, jnp.dtype(self.compute.dtype)
        d, n, k, h = text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim
        linear = functools.partial(Linear, dtype=dtype, lora_scale=self.compute.lora_scale)
        axes = ("embed", "heads", None)
        x = summed_once(x, "tensor")
        query = linear((d,), (n, h), axes, name="q_proj")(x)
        key = linear((d,), (k, h), axes, name="k_proj")(x)
        value = linear((d,), (k, h), axes, name="v_proj")(x)
        query = apply_rope(RMSNorm(text.norm_eps, name="q_norm")(query), rope)
        key = apply_rope(RMSNorm(text.norm_eps, name="k_norm")(key), rope)
        out, aux = attend(query, key, value)
        return linear((n, h), (d,), ("heads", None, "embed"), name="o_proj")(out), aux


class Mlp(nn.Module):
    """SwiGLU."""

    text: config.Text
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        d, f, dtype = self.text.hidden_size, self.text.intermediate_size, jnp.dtype(self.compute.dtype)
        linear = functools.partial(Linear, dtype=dtype, lora_scale=self.compute.lora_scale)
        x = summed_once(x, "tensor")
        gate = linear((d,), (f,), ("embed", "mlp"), name="gate_proj")(x)
        up = linear((d,), (f,), ("embed", "mlp"), name="up_proj")(x)
        return linear((f,), (d,), ("mlp", "embed"), name="down_proj")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer block; the same in training's scan and in the sampler's unrolled layers."""

    text: config.Text
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], rope: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        with jax.named_scope("attention"):
            normed = RMSNorm(self.text.norm_eps, name="input_layernorm")(x)
            mixed, aux = SelfAttention(self.text, self.compute, name="self_attn")(normed, rope, attend)
            x = x + mixed
        with jax.named_scope("mlp"):
            normed = RMSNorm(self.text.norm_eps, name="post_attention_layernorm")(x)
            return x + Mlp(self.text, self.compute, name="mlp")(normed), aux


class Qwen3(nn.Module):
    """Embeddings → hidden states after the final norm.

    It also declares `embed_tokens` and `lm_head`, which `infimed.embed` and `infimed.logits` read as plain arrays.
    """

    text: config.Text
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], mask: Mask) -> Float[Array, "B T D"]:
        text = self.text
        weight(self, "embed_tokens", (text.vocab_size, text.hidden_size), ("vocab", "embed"), normal_002, jnp.float32)
        if not text.tie_embeddings:
            weight(self, "lm_head", (text.hidden_size, text.vocab_size), ("embed", "vocab"), normal_002, jnp.float32)
        rope = rope_tables(positions, text.head_dim, text.rope_theta)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return attention(q, k, v, mask, implementation=self.compute.implementation), None

        x = scan_blocks(
            lambda block, x: block(x, rope, attend)[0],
            Block(text, self.compute, name="layers"),
            x,
            text.num_layers,
            self.compute,
        )
        return RMSNorm(text.norm_eps, name="norm")(x)
