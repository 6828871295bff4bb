"""Bytes that a step moves between devices, counted from the parameters' placement and the configuration.

What is counted is the program as it is: a weight is gathered over `fsdp` wherever it is used, and again in the backward
pass of a checkpointed block; its gradient is reduced over all rows, then cut to the shard that is kept. A v5p compile
of the 4B model, cut to two layers, has just these collectives and no reduce-scatter: libtpu 0.0.42 makes an all-reduce
even of an explicit `psum_scatter` over all devices. tests/aot/test_aot.py compares the bytes on the tiny model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from infimed_jax import config, sharding
from infimed_jax.cost.flops import text_learns
from infimed_jax.models import lora
from infimed_jax.models.params import abstract_params

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
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params(cfg.model))
        if cfg.train.lora.rank:
            make = functools.partial(lora.init_lora, text=cfg.model.text, lora=cfg.train.lora)
            adapters = jax.eval_shape(lambda: {"text": make(jax.random.key(0))})
            leaves += jax.tree_util.tree_leaves_with_path(adapters)
    found: list[Collective] = []
    for path, leaf in leaves:
        found += _weight(cfg, tuple(entry.key for entry in path), leaf, mesh, pieces)
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


def _weight(cfg: config.Config, path: tuple[str, ...], leaf: Any, mesh: dict[str, int], pieces: int) -> list:
    """Of one parameter: how often it is gathered, and how often a gradient of it is reduced.

    Micro-batches share the gathered weights outside the stacks: XLA moves those out of their loop.
    """
    part, name = path[0], path[-1]
    axes = {axis for axis in leaf.sharding.spec if axis is not None}
    norm = name == "scale" or any("norm" in key for key in path)  # used in float32
    width = 4 if norm or cfg.train.compute_dtype == "float32" else 2
    used = math.prod(leaf.shape) * width // (mesh["tensor"] if "tensor" in axes else 1)
    rows = mesh["data"] * mesh["fsdp"]
    learns = part in cfg.train.train if part != "text" else name in (lora.A, lora.B) or text_learns(cfg)
    fsdp = mesh["fsdp"] if "fsdp" in axes else 1
    if part != "text" and cfg.data.images_per_row == 0:
        return []
    if name == "lm_head":
        return [
            Collective("weights", "head", GATHER, used, fsdp, 1),
            Collective("gradients", "head", REDUCE, used, rows, pieces * learns),
        ]
    if name == "embed_tokens":
        whole = math.prod(leaf.shape) * width
        tied = cfg.model.text.tie_embeddings
        return [
            Collective("weights", "text", GATHER, whole, fsdp * mesh["tensor"], 1),
            Collective("gradients", "text", REDUCE, whole, rows, pieces * learns),
            Collective("weights", "head", GATHER, used, fsdp, int(tied)),
            Collective("gradients", "head", REDUCE, used, rows, pieces * learns * tied),
        ]
    stacked = "layers" in path or "blocks" in path
    # A block's last bias is no operand of its backward pass.
    again = stacked and cfg.train.remat != "none" and _differentiated(cfg, part) and path[-2:] != ("fc2", "bias")
    rows *= mesh["tensor"] if name == "scale" and {"q_norm", "k_norm"} & set(path) else 1
    return [
        Collective("weights", part, GATHER, used, fsdp, pieces * (1 + again) if stacked else 1),
        Collective("gradients", part, REDUCE, used, rows, pieces * learns),
    ]


def _differentiated(cfg: config.Config, part: str) -> bool:
    """Whether gradients pass through `part`: all of the text model's inputs come from what may learn."""
    return part in cfg.train.train or part == "text"


def _activations(cfg: config.Config, rows: int, tensor: int) -> list[Collective]:
    """Sums over `tensor` behind every product that contracts a split axis; times are those of all micro-batches."""
    text, vision, data = cfg.model.text, cfg.model.vision, cfg.data
    width = 4 if cfg.train.compute_dtype == "float32" else 2
    again = int(cfg.train.remat == "full")
    tokens, images = rows * data.context, rows * data.images_per_row
    sees = int("vision" in cfg.train.train)

    def summed(part: str, elements: int, times: int) -> Collective:
        return Collective("activations", part, REDUCE, elements * width, tensor, times)

    found = [
        # Forward o_proj and down_proj; again o_proj; backward what enters q, k and v, and what enters gate and up.
        summed("text", tokens * text.hidden_size, text.num_layers * (2 + again + 2)),
        summed("head", tokens * text.hidden_size, 1),
        # Float32, a number a position: the maximum and four sums, then the maximum and one sum again.
        Collective("loss", "head", REDUCE, tokens * 4, tensor, 7),
    ]
    adapted = lora.dimensions(text, cfg.train.lora)
    behind = sum(map(lora.splits_inputs, adapted))  # x A is summed forward there, its gradient elsewhere
    low = tokens * cfg.train.lora.rank
    found.append(summed("text", low, text.num_layers * (behind * (1 + again) + len(adapted) - behind)))
    if images:
        patches = images * vision.num_patches * vision.hidden_size
        visual = images * cfg.model.projector.visual_tokens
        found += [
            summed("vision", patches, vision.num_blocks * (2 + sees * (again + 2))),
            summed("projector", visual * text.hidden_size, 1),
            summed("projector", visual * vision.hidden_size, sees),
        ]
    return found
