"""Tiny random Hugging Face models in torch, and their weights as our parameter tree, written out by hand."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from infimed_jax.models.infimed import config as infimed
from tests import tiny

EPS = 1e-2
"""Epsilon of the norms: the published 1e-6 is too small to be seen in a comparison of this size."""

MODEL = tiny.uneven_model(norm_eps=EPS, vocab_size=97, rope_theta=10_000.0)
VISION, TEXT = MODEL.vision, MODEL.text


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough that every path matters; norms near one, biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    return module.eval()


def torch_siglip_config(vision: infimed.Vision, head: bool = True) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}[vision.activation],
        layer_norm_eps=vision.norm_eps,
        attn_implementation="eager",
        vision_use_head=head,
    )


def torch_siglip(vision: infimed.Vision, seed: int = 0) -> SiglipVisionModel:
    return randomise(SiglipVisionModel(torch_siglip_config(vision)), seed)


def torch_qwen3(text: infimed.Text, seed: int = 0) -> Qwen3ForCausalLM:
    settings = Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        rms_norm_eps=text.norm_eps,
        rope_theta=text.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        tie_word_embeddings=text.tie_embeddings,
        attn_implementation="eager",
    )
    model = Qwen3ForCausalLM(settings)
    assert model.config.rope_parameters["rope_theta"] == text.rope_theta
    return randomise(model, seed)


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def siglip_params(module: SiglipVisionModel, vision: infimed.Vision) -> dict:
    """Our vision subtree; the blocks that `vision.feature_layer` does not need are left out."""
    w = {name.removeprefix("vision_model."): value for name, value in arrays(module).items()}
    d, n, h = vision.hidden_size, vision.num_heads, vision.hidden_size // vision.num_heads

    def block(i: int) -> dict:
        at = f"encoder.layers.{i}."
        attention = {
            name: {
                "kernel": w[f"{at}self_attn.{name}.weight"].T.reshape(d, n, h),
                "bias": w[f"{at}self_attn.{name}.bias"].reshape(n, h),
            }
            for name in ("q_proj", "k_proj", "v_proj")
        }
        attention["out_proj"] = {
            "kernel": w[f"{at}self_attn.out_proj.weight"].T.reshape(n, h, d),
            "bias": w[f"{at}self_attn.out_proj.bias"],
        }
        norms = {
            name: {"scale": w[f"{at}{name}.weight"], "bias": w[f"{at}{name}.bias"]}
            for name in ("layer_norm1", "layer_norm2")
        }
        mlp = {
            name: {"kernel": w[f"{at}mlp.{name}.weight"].T, "bias": w[f"{at}mlp.{name}.bias"]}
            for name in ("fc1", "fc2")
        }
        return {"self_attn": attention, "mlp": mlp, **norms}

    patch = w["embeddings.patch_embedding.weight"]  # [D, 3, p, p]
    tree = {
        "patch_embedding": {
            "kernel": patch.transpose(2, 3, 1, 0).reshape(-1, d),
            "bias": w["embeddings.patch_embedding.bias"],
        },
        "position_embedding": w["embeddings.position_embedding.weight"],
    }
    if vision.num_blocks:
        tree["blocks"] = stack([block(i) for i in range(vision.num_blocks)])
    return tree


def qwen3_params(module: Qwen3ForCausalLM, text: infimed.Text) -> dict:
    """Our text subtree."""
    w = arrays(module)
    d, n, k, h = text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim

    def layer(i: int) -> dict:
        at = f"model.layers.{i}."
        attention = {
            "q_proj": {"kernel": w[f"{at}self_attn.q_proj.weight"].T.reshape(d, n, h)},
            "k_proj": {"kernel": w[f"{at}self_attn.k_proj.weight"].T.reshape(d, k, h)},
            "v_proj": {"kernel": w[f"{at}self_attn.v_proj.weight"].T.reshape(d, k, h)},
            "o_proj": {"kernel": w[f"{at}self_attn.o_proj.weight"].T.reshape(n, h, d)},
            "q_norm": {"scale": w[f"{at}self_attn.q_norm.weight"]},
            "k_norm": {"scale": w[f"{at}self_attn.k_norm.weight"]},
        }
        mlp = {name: {"kernel": w[f"{at}mlp.{name}.weight"].T} for name in ("gate_proj", "up_proj", "down_proj")}
        norms = {name: {"scale": w[f"{at}{name}.weight"]} for name in ("input_layernorm", "post_attention_layernorm")}
        return {"self_attn": attention, "mlp": mlp, **norms}

    tree = {
        "embed_tokens": w["model.embed_tokens.weight"],
        "layers": stack([layer(i) for i in range(text.num_layers)]),
        "norm": {"scale": w["model.norm.weight"]},
    }
    return tree if text.tie_embeddings else tree | {"lm_head": w["lm_head.weight"].T}


def stack(trees: list[dict]) -> dict:
    first = trees[0]
    return {
        name: stack([tree[name] for tree in trees])
        if isinstance(first[name], dict)
        else np.stack([t[name] for t in trees])
        for name in first
    }
