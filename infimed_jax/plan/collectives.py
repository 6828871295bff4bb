"""Bytes that a step moves between devices, counted from the parameters' placement and the configuration.

What is counted is the program as it is: a weight is gathered over `fsdp` wherever it is used, and again in the backward
pass of a checkpointed block; its gradient is reduced over all rows, then cut to the shard that is kept. A v5p compile
of the 4B model, cut to two layers, has just these collectives and no reduce-scatter: libtpu 0.0.42 makes an all-reduce
even of an explicit `psum_scatter` over all devices. tests/aot/test_aot.py compares the bytes on the tiny model.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from infimed_jax import config, sharding
from infimed_jax.cost.flops import Use, rows_of, uses
from infimed_jax.models import lora
from infimed_jax.models.family import weights
from infimed_jax.models.params import abstract_params
from infimed_jax.trees import flatten

GATHER, REDUCE = "all-gather", "all-reduce"


@dataclass(frozen=True)
class Collective:
    """`times` operations a step on an array of `payload` bytes, among `group` devices."""

    name: str
    """weights, gradients, activations or loss."""
    part: str
    kind: str
    payload: int
    """Bytes of the whole array that every device of the group ends with."""
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, by a ring: (n-1)/n of the array, twice in an all-reduce."""
        share = (self.group - 1) / self.group * (2 if self.kind == REDUCE else 1)
        return share * self.payload * self.times


def collectives(cfg: config.Config, rows: int, mesh: dict[str, int], pieces: int) -> list[Collective]:
    """Those of one step over `rows` rows in `pieces` micro-batches; needs no devices."""
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(**mesh)):
        leaves = flatten(abstract_params(cfg.model))
        adapters = flatten(jax.eval_shape(lambda: lora.init_lora(jax.random.key(0), cfg.model, cfg.train.lora)))
    kernels = {use.weight.path: use for use in uses(cfg)}
    found: list[Collective] = []
    for path, leaf in leaves.items():
        found += _weight(cfg, kernels[path], leaf, mesh, pieces)
    for path, leaf in adapters.items():
        kernel = kernels[f"{path.rpartition('.')[0]}.kernel"]
        found += _weight(cfg, replace(kernel, learns=True, below=True), leaf, mesh, pieces)
    found += _activations(cfg, rows // (mesh["data"] * mesh["fsdp"]), mesh["tensor"])
    return [item for item in found if item.group > 1 and item.times]


def span(item: Collective, mesh: dict[str, int]) -> int:
    """Neighbouring devices among which a group lies: `tensor` is the innermost axis, then `fsdp`."""
    if item.name in ("activations", "loss"):
        return mesh["tensor"]
    return mesh["fsdp"] * mesh["tensor"] if item.name == "weights" else math.prod(mesh.values())


def by_name(items: Sequence[Collective]) -> dict[str, int]:
    """Bytes that a device sends in a step, by what is moved and in `total`."""
    names: dict[str, int] = {}
    for item in items:
        names[item.name] = names.get(item.name, 0) + round(item.sent)
    return names | {"total": sum(names.values())}


def _weight(cfg: config.Config, use: Use, leaf: Any, mesh: dict[str, int], pieces: int) -> list[Collective]:
    """Collectives of one parameter: how often it is gathered, and how often a gradient of it is reduced.

    Micro-batches share the gathered weights outside the stacks: XLA moves those out of their loop.
    """
    weight, part, learns = use.weight, use.weight.part, use.learns
    axes = {axis for axis in leaf.sharding.spec if axis is not None}
    width = 4 if weight.float32 or cfg.train.compute_dtype == "float32" else 2
    whole = math.prod(leaf.shape) * width
    used = whole // (mesh["tensor"] if "tensor" in axes else 1)
    rows = mesh["data"] * mesh["fsdp"]
    fsdp = mesh["fsdp"] if "fsdp" in axes else 1
    if part != cfg.model.language and cfg.data.images_per_row == 0:
        return []
    head = [
        Collective("weights", "head", GATHER, used, fsdp, 1),
        Collective("gradients", "head", REDUCE, used, rows, pieces * learns),
    ]
    if weight.role == "head":
        return head
    if weight.role == "table":
        tied = all(other.role != "head" for other in weights(cfg.model))
        return [
            Collective("weights", part, GATHER, whole, fsdp * mesh["tensor"], 1),
            Collective("gradients", part, REDUCE, whole, rows, pieces * learns),
            *(head if tied else []),
        ]
    # The last bias of a block is no operand of its backward pass.
    again = weight.layers and cfg.train.remat != "none" and use.below and not (use.last and weight.name == "bias")
    rows *= mesh["tensor"] if weight.split_input else 1
    return [
        Collective("weights", part, GATHER, used, fsdp, pieces * (1 + bool(again)) if weight.layers else 1),
        Collective("gradients", part, REDUCE, used, rows, pieces * learns),
    ]


def _activations(cfg: config.Config, rows: int, tensor: int) -> list[Collective]:
    """Sums over `tensor` behind every product that contracts a split axis; times are those of all micro-batches."""
    width = 4 if cfg.train.compute_dtype == "float32" else 2
    tokens, counts = rows * cfg.data.context, rows_of(cfg, rows)
    times: Counter[tuple[str, int]] = Counter({("head", tokens * cfg.model.hidden_size): 1})
    """How often each part sums so many elements."""
    kernels = [use for use in uses(cfg) if use.weight.inputs]
    for use in kernels:
        weight, layers = use.weight, use.weight.layers or 1
        if weight.splits_inputs:
            times[weight.part, counts[weight.per] * weight.fan_out] += layers * (1 + use.recomputed(cfg))
    for _, group in itertools.groupby((u for u in kernels if u.weight.splits_outputs), key=lambda u: u.weight.block):
        use = next(group)  # all of the block's that read one input sum its gradient once
        times[use.weight.part, counts[use.weight.per] * use.weight.fan_in] += (use.weight.layers or 1) * use.below
    again = int(cfg.train.remat == "full")
    for kernel in lora.adapted(cfg.model, cfg.train.lora):
        # x A is summed forward behind a split input, its gradient elsewhere.
        times[kernel.part, tokens * cfg.train.lora.rank] += kernel.layers * (1 + again if kernel.splits_inputs else 1)
    return [
        *(Collective("activations", part, REDUCE, n * width, tensor, count) for (part, n), count in times.items() if n),
        # Float32, a number a position: the maximum and four sums, then the maximum and one sum again.
        Collective("loss", "head", REDUCE, tokens * 4, tensor, 7),
    ]
