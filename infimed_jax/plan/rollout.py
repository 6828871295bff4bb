"""What a GRPO rollout needs beside its updates: the sampler's weights, its key-value cache, and the decoding's time."""

from __future__ import annotations

from collections import Counter
from typing import Any

from infimed_jax import config
from infimed_jax.cost.chips import Topology
from infimed_jax.cost.flops import forward_flops
from infimed_jax.models.family import weights


def rollout(cfg: config.Config, topology: Topology, mesh: dict[str, int], state: int, available: int) -> dict[str, Any]:
    """Memory and time of all completions of a rollout, each prompt with one image and every length at its bound.

    Bytes are a device's: `state`, the reference included, stays while it decodes; all must fit `available`. The time is
    the larger of arithmetic and of reading the text model (an untied table aside) and the cache once a token.
    """
    model, grpo, chip = cfg.model, cfg.grpo, topology.chip
    width = 2 if cfg.train.compute_dtype == "bfloat16" else 4
    table = next(weight for weight in weights(model) if weight.role == "table")
    parts: Counter[str] = Counter()
    """Bytes that a device holds, off fsdp, as `sampling.weights` moves them; the embedding aside."""
    for weight in weights(model):
        split = mesh["tensor"] if weight.splits_inputs or weight.splits_outputs else 1
        parts[weight.part] += width * weight.size // split if weight is not table else 0
    embedding = width * table.size  # whole on every device, but split as the head
    tied = all(weight.role != "head" for weight in weights(model))
    decoder = parts[model.language] + (embedding // mesh["tensor"] if tied else 0)
    stored = parts.total() + embedding
    slots = -(-cfg.sampling.slots // (mesh["data"] * mesh["fsdp"]))
    length = grpo.max_prompt + grpo.max_response
    cache = 2 * width * slots * length * model.num_kv_heads // mesh["tensor"] * model.head_dim * model.num_layers
    completions = grpo.prompts * grpo.group_size
    unit, new = forward_flops(cfg.model), grpo.max_response
    prefill = unit.token * grpo.max_prompt + unit.pair * grpo.max_prompt * (grpo.max_prompt + 1) / 2 + unit.image
    decode = (unit.token + unit.loss_token) * new + unit.pair * new * (grpo.max_prompt + (new + 1) / 2)
    arithmetic = (grpo.prompts * prefill + completions * decode) / (chip.flops * topology.devices)
    steps = -(-completions // cfg.sampling.slots) * new
    reading = steps * (decoder + cache) / chip.bandwidth
    needed = state + stored + cache
    return {
        "completions": completions,
        "sampler_weights": stored,
        "cache": cache,
        "needed": needed,
        "fits": needed <= available,
        "prefill_flops": round(grpo.prompts * prefill),
        "decode_flops": round(completions * decode),
        "decode_steps": steps,
        "seconds": max(arithmetic, reading),
        "bound_by": "arithmetic" if arithmetic > reading else "memory",
    }
