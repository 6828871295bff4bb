"""A LoRA run's adapters in PEFT's layout, for `PeftModel.from_pretrained(model, folder)` over the exported base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infimed_jax.config import Lora, Model
from infimed_jax.errors import UserError
from infimed_jax.files import write_json
from infimed_jax.hf.weights import SINGLE, write_weights
from infimed_jax.models import lora
from infimed_jax.models.family import family_of, weights


def take_adapters(leaves: dict[str, Any], model: Model) -> dict[str, np.ndarray]:
    """Remove the adapters of `model`'s linears from `leaves` (path → array) and return them as PEFT's tensors.

    Ours are [inputs…, rank] and [rank, outputs…] with their layers on axis 0; PEFT's are [rank, in] and [out, rank].
    """
    modules = f"base_model.model.model.{family_of(model).hugging_face.language}"  # PEFT's beginning, then transformers'
    taken: dict[str, np.ndarray] = {}
    for weight in weights(model):
        ours = [weight.path.removesuffix("kernel") + name for name in (lora.A, lora.B)]
        if not weight.layers or not all(name in leaves for name in ours):
            continue
        if weight.pieces:
            raise UserError(f"{weight.path} is a piece of a tensor, which PEFT adapts as a whole: export it merged")
        a, b = (np.asarray(leaves.pop(name), np.float32) for name in ours)
        for layer, (down, up) in enumerate(zip(a, b, strict=True)):
            key = modules + weight.key.format(layer=layer).removesuffix("weight").removeprefix(f"{model.language}.")
            taken[f"{key}lora_A.weight"] = down.reshape(-1, down.shape[-1]).T
            taken[f"{key}lora_B.weight"] = up.reshape(up.shape[0], -1).T
    return taken


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], settings: Lora, model: Model, base: Path) -> None:
    """adapter_model.safetensors, float32 as learnt, and adapter_config.json into `folder`; `base` is the export."""
    folder.mkdir()
    language = re.escape(family_of(model).hugging_face.language)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    write_weights(folder, tensors.items(), shapes, "float32", 1 << 62)
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        # A pattern: a bare `q_proj` would adapt SigLIP's too.
        "target_modules": rf".*{language}layers\.\d+\.\w+\.({'|'.join(settings.targets)})",
    }
    write_json(folder / "adapter_config.json", values)
