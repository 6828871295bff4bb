"""How the model is computed, as opposed to what it is: precision, recomputation, kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax

from infimed_jax import config
from infimed_jax.models import lora


@dataclass(frozen=True)
class Compute:
    """Static (hashable) choices that every model function takes; all follow from `config.Train`."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "dots", "full"] = "full"
    attention: str = "auto"
    logit_chunk: int = 512
    lora_scale: float = 0.0
    """What adapters' outputs are multiplied by; a tree without adapters is computed as it is."""

    @classmethod
    def of(cls, train: config.Train) -> Compute:
        """`remat: auto` is `full` here; `cost.memory.choose_remat` finds out whether more fits."""
        remat = "full" if train.remat == "auto" else train.remat
        return cls(train.compute_dtype, remat, train.attention, train.logit_chunk, lora.scale_of(train.lora))

    @property
    def implementation(self) -> str | None:
        """What `ops.attention` calls its choice by platform is None."""
        return None if self.attention == "auto" else self.attention


def scan_blocks(body: Callable, block: nn.Module, x: Any, length: int, compute: Compute) -> Any:
    """x after `length` blocks: `body(block, x) -> x`, its parameters stacked on axis 0, checkpointed as asked."""

    def step(block: nn.Module, x: Any, _: None) -> tuple[Any, None]:
        return body(block, x), None

    if compute.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if compute.remat == "dots" else None
        step = nn.remat(step, policy=policy, prevent_cse=False)
    scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)
    x, _ = scan(block, x, None)
    return x
