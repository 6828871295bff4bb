"""Bytes a device holds: exact for what the state is, estimated for what a step needs beside it.

The estimate is what `train.remat: auto` chooses by, in a run and in a plan.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from typing import Any, Protocol

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.cost.chips import GIB
from infimed_jax.cost.flops import attention_backend
from infimed_jax.models.family import family_of, weights
from infimed_jax.models.weights import Weight
from infimed_jax.ops.attention import platform_backend

F32 = 4
_USABLE = 0.8
"""Share of a device's memory that the estimate may fill: it leaves out kernels' scratch and fragmentation."""

log = logging.getLogger(__name__)


class State(Protocol):
    """The parts of a training state whose bytes are counted: arrays, or their abstract values."""

    @property
    def trainable(self) -> Any: ...

    @property
    def frozen(self) -> Any: ...

    @property
    def opt(self) -> Any: ...


def choose_remat(
    cfg: config.Config,
    state: State,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    rows: int,
    shape: tuple[int, int],
    available: float | None = None,
) -> str:
    """`train.remat`, or for `auto`: `dots` where about 80 % of a device's memory holds the step, else `full`.

    `rows` of `shape` (tokens, images) are computed at once over all devices. Several processes choose the same where
    their devices are the same. `available` is a device's memory in bytes where it is not here to be asked.
    """
    if cfg.train.remat != "auto":
        return cfg.train.remat
    attention = cfg.train.attention
    here = available is None
    if here:
        available = device_bytes(mesh)
        attention = platform_backend(mesh.devices.flat[0].platform) if attention == "auto" else attention
    kept = replace(
        cfg,
        data=replace(cfg.data, context=shape[0], images_per_row=shape[1]),
        train=replace(cfg.train, remat="dots", attention=attention),
    )
    sums = 2 if cfg.train.micro_batches > 1 or cfg.train.rows_per_device else 1  # a micro-batch's, and all so far
    needed = (
        local_bytes(state) + sums * local_bytes(state.trainable) + activation_estimate(kept, rows, dict(mesh.shape))
    )
    choice = "dots" if needed <= _USABLE * available else "full"
    if here:  # a plan has a line of its own for each machine
        log.info(
            "activations: %s (with every matrix product kept about %.1f of %.1f GiB a device)",
            choice,
            needed / GIB,
            available / GIB,
        )
    return choice


def state_bytes(state: State, batch: Any) -> dict[str, int]:
    """Exact, a device: `parameters` (float32 masters and the frozen rest), `moments`, `batch`, and `gradients`.

    Gradients are as large as the masters; they live only inside the step, so a compiler's temporaries hold them.
    """
    trainable = local_bytes(state.trainable)
    return {
        "parameters": trainable + local_bytes(state.frozen),
        "moments": local_bytes(state.opt),
        "batch": local_bytes(batch),
        "gradients": trainable,
    }


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of placed (or abstract and placed) arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def device_bytes(mesh: jax.sharding.Mesh) -> float:
    """What one device of this process holds; the machine's memory divided by its devices where they are CPUs."""
    device = mesh.local_devices[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(mesh.local_devices)


def activation_estimate(cfg: config.Config, rows: int, mesh: dict[str, int]) -> int:
    """Bytes a device, without a compiler: what is kept for the backward pass, and the largest thing beside it.

    `rows` are those of one micro-batch. Compared with ahead-of-time compilations it was within 5 % for the published
    stages on their pods (tests/plan/test_cell.py), 10 % low for 1.7B pretraining on a quarter of its pod, and for 4B
    tuning with full rematerialisation 8 % high (14.5 GiB compiled), with LoRA 20 % (11.9; 11.6 with q_proj's alone).
    Half of LoRA's is that of the plain stage; where the other 1.2 GiB come from is not known. The state's bytes are
    right.
    """
    local, tensor = rows // (mesh["data"] * mesh["fsdp"]), mesh["tensor"]
    model, length, width = cfg.model, cfg.data.context, _width(cfg)
    positions = local * length
    kernels = _stack(cfg, model.language)
    heads, kv, f = (n // tensor for n in (model.num_heads, model.num_kv_heads, kernels[-1].fan_in))
    scores = local * heads * length**2 if attention_backend(cfg).dense else 0
    stream = positions * model.hidden_size * width
    attended = positions * model.head_dim * (2 * heads + 2 * kv) * width
    hidden = 3 * positions * f * width
    layer = 4 * stream + attended + hidden
    kept = {"full": stream, "dots": stream + dots_bytes(cfg, local, tensor)}
    matrices = sum(kernel.fan_in * kernel.fan_out for kernel in kernels) // tensor * width
    stored = model.num_layers * kept.get(cfg.train.remat, layer + matrices + scores * (F32 + width))
    # The table whole for the lookup, and its part for the head. Of each a copy and its gradient: 8 bytes in float32,
    # and as many in bfloat16, where the gradient is made float32 beside them.
    tables = int(model.vocab_size * model.hidden_size * 2 * F32 * (1 + 1 / tensor))
    logits = local * min(cfg.train.logit_chunk, length) * model.vocab_size // tensor * (2 * F32 + width)
    # A block computed again, and the gradients of what it computes.
    backward = 3 * layer + scores * (2 * F32 + width) + 3 * matrices
    block, blocks = _towers(cfg, local, tensor)
    # A tower's own peak comes before anything is kept for the text.
    return max(block + blocks, stored + tables + blocks + max(backward, logits))


def dots_bytes(cfg: config.Config, local: int, tensor: int) -> int:
    """A layer's products that `dots` keeps for `local` rows: q, k, v, the attention's output, gate and up.

    The last product is the block's output, the next one's input. For 2 rows of 4096 tokens of the 4B model these are
    15.5 GiB; an ahead-of-time compilation for v5p needed 15.2 GiB more with `dots` than with `full`.
    """
    split = sum(kernel.fan_out for kernel in _stack(cfg, cfg.model.language) if kernel.splits_outputs)
    return local * cfg.data.context * (split // tensor + cfg.model.hidden_size) * _width(cfg)


def _width(cfg: config.Config) -> int:
    return 2 if cfg.train.compute_dtype == "bfloat16" else F32


def _stack(cfg: config.Config, part: str) -> list[Weight]:
    """The kernels of one block of `part`, the last of which gives the block's output."""
    return [weight for weight in weights(cfg.model) if weight.part == part and weight.layers and weight.inputs]


def _towers(cfg: config.Config, local: int, tensor: int) -> tuple[int, int]:
    """(largest block's peak, forward and backward where the tower learns; what is then kept of all blocks)."""
    family, images, width = family_of(cfg.model), local * cfg.data.images_per_row, _width(cfg)
    peak = stored = 0
    for part in cfg.model.PARTS[:-1]:
        if not (kernels := _stack(cfg, part)):
            continue
        last = kernels[-1]
        patches = images * family.places(cfg.model)[last.per]
        stream = patches * last.fan_out * width
        scores = sum(o.rows * o.outer for o in family.unweighted(cfg.model) if o.part == part and o.name == "scores")
        block = 6 * stream + patches * (last.fan_in // tensor) * width + images * scores // tensor * (F32 + width)
        if part in cfg.train.train:
            stored += last.layers * {"full": stream, "dots": 6 * stream}.get(cfg.train.remat, block)
            block *= 2
        peak = max(peak, block)
    return peak, stored
