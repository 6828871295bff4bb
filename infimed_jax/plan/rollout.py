"""What a GRPO rollout needs beside its updates: the sampler's weights, its key-value cache, and the decoding's time."""

from __future__ import annotations

import math
from typing import Any

import jax

from infimed_jax import config, sharding
from infimed_jax.cost.chips import Topology
from infimed_jax.cost.flops import forward_flops
from infimed_jax.models.params import abstract_params


def rollout(cfg: config.Config, topology: Topology, mesh: dict[str, int], state: int, available: int) -> dict[str, Any]:
    """Of `grpo.prompts * grpo.group_size` completions, each prompt with one image and every length at its bound.

    Bytes are a device's: `state`, the reference included, stays while it decodes; all must fit `available`. The time is
    the larger of arithmetic and of reading the text model (an untied table aside) and the cache once a token.
    """
    text, grpo, chip = cfg.model.text, cfg.grpo, topology.chip
    width = 2 if cfg.train.compute_dtype == "bfloat16" else 4
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(**mesh)):
        params = abstract_params(cfg.model)

    def held(tree: Any) -> int:
        """Off fsdp, as `sampling.weights` moves them."""
        leaves = jax.tree.leaves(tree)
        return sum(width * math.prod(x.shape) // (mesh["tensor"] if "tensor" in x.sharding.spec else 1) for x in leaves)

    blocks = held(params["text"] | {"embed_tokens": {}})
    table = width * math.prod(params["text"]["embed_tokens"].shape)  # whole on every device, but split as the head
    decoder = blocks + (table // mesh["tensor"] if text.tie_embeddings else 0)
    weights = blocks + table + held(params["vision"]) + held(params["projector"])
    slots = -(-cfg.sampling.slots // (mesh["data"] * mesh["fsdp"]))
    length = grpo.max_prompt + grpo.max_response
    cache = 2 * width * slots * length * text.num_kv_heads // mesh["tensor"] * text.head_dim * text.num_layers
    completions = grpo.prompts * grpo.group_size
    unit, new = forward_flops(cfg.model), grpo.max_response
    prefill = unit.token * grpo.max_prompt + unit.pair * grpo.max_prompt * (grpo.max_prompt + 1) / 2 + unit.image
    decode = (unit.token + unit.loss_token) * new + unit.pair * new * (grpo.max_prompt + (new + 1) / 2)
    arithmetic = (grpo.prompts * prefill + completions * decode) / (chip.flops * topology.devices)
    steps = -(-completions // cfg.sampling.slots) * new
    reading = steps * (decoder + cache) / chip.bandwidth
    needed = state + weights + cache
    return {
        "completions": completions,
        "sampler_weights": weights,
        "cache": cache,
        "needed": needed,
        "fits": needed <= available,
        "prefill_flops": round(grpo.prompts * prefill),
        "decode_flops": round(completions * decode),
        "decode_steps": steps,
        "seconds": max(arithmetic, reading),
        "bound_by": "arithmetic" if arithmetic > reading else "memory",
    }
