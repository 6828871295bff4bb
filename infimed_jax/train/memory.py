"""Which activations a step keeps: an estimate of its memory, before anything is compiled."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import jax
import numpy as np

from infimed_jax import config, sharding
from infimed_jax.train.state import TrainState

_USABLE = 0.8
"""Share of a device's memory that the estimate may fill: it leaves out kernels' scratch and fragmentation."""
_GIB = 2**30

log = logging.getLogger(__name__)


def choose_remat(
    cfg: config.Config,
    state: TrainState,
    mesh: jax.sharding.Mesh,
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
    rows = rows // sharding.row_shards(mesh)
    needed = step_bytes(cfg, state, mesh.shape["tensor"], rows, shape) + dots_bytes(
        cfg, mesh.shape["tensor"], rows, shape
    )
    available = device_bytes(mesh) if available is None else available
    choice = "dots" if needed <= _USABLE * available else "full"
    log.info(
        "activations: %s (with every matrix product kept about %.1f of %.1f GiB a device)",
        choice,
        needed / _GIB,
        available / _GIB,
    )
    return choice


def step_bytes(cfg: config.Config, state: TrainState, tensor: int, rows: int, shape: tuple[int, int]) -> float:
    """A device's bytes under full recomputation: state, gradients, block inputs, one block, the loss's logits."""
    text, size = cfg.model.text, _item(cfg)
    gradients = local_bytes(state.trainable) * (2 if cfg.train.micro_batches > 1 or cfg.train.rows_per_device else 1)
    places = rows * shape[0]
    inputs = places * text.hidden_size * text.num_layers * size
    block = 4 * dots_bytes(cfg, tensor, rows, shape) / text.num_layers
    logits = 3 * 4 * rows * min(cfg.train.logit_chunk, shape[0]) * text.vocab_size / tensor
    table = 2 * size * text.vocab_size * text.hidden_size  # gathered for the lookup, and its gradient
    return local_bytes(state) + gradients + inputs + block + logits + table


def dots_bytes(cfg: config.Config, tensor: int, rows: int, shape: tuple[int, int]) -> float:
    """A device's bytes of the products that `dots` keeps: q, k, v, the attention's output, gate and up of each layer.

    The last product of a block is its output, which is kept anyway. For 2 rows of 4096 tokens of the 4B model in
    bfloat16 this is 15.5 GiB; an ahead-of-time compilation for v5p needed 15.2 GiB more with `dots` than with `full`.
    """
    text, vision = cfg.model.text, cfg.model.vision
    heads = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    widths = (heads + 2 * text.intermediate_size) / tensor + text.hidden_size
    total = rows * shape[0] * widths * text.num_layers
    if "vision" in cfg.train.train:
        widths = (3 * vision.hidden_size + vision.intermediate_size) / tensor + vision.hidden_size
        total += rows * shape[1] * vision.num_patches * widths * vision.num_blocks
    return total * _item(cfg)


def _item(cfg: config.Config) -> int:
    return 2 if cfg.train.compute_dtype == "bfloat16" else 4


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
