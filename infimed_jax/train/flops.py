"""Model FLOPs of a step, and what share of the devices' peak they are.

Convention: multiply and add are two. Counted is what the algorithm needs: matrix products of non-padding tokens and
used image slots, logits where there is a loss, attention over the query-key pairs that the mask lets through (the sum
of n (n + 1) / 2 over the segments, not the square of the row). A part that learns costs three forward passes; a frozen
text model two, for the gradient passes through it; a frozen tower one. Recomputation, optimizer, norms and softmax are
not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infimed_jax import config
from infimed_jax.models import lora

CONVENTION = "model FLOPs without recomputation, padding or masked pairs; a frozen tower counts its forward pass only"

_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""JAX's name of a device → dense bfloat16 FLOP/s, from the vendors' data sheets."""


def peak_flops(device_kind: str) -> float | None:
    """Of one device; None where the table does not know it. The longest name that occurs decides."""
    known = [name for name in _PEAK if name in device_kind]
    return _PEAK[max(known, key=len)] if known else None


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward pass, a unit of each count of `telemetry.batch_counts`."""

    token: float
    loss_token: float
    pair: float
    image: float

    def of(self, counts: Mapping[str, float]) -> float:
        """FLOPs of a batch with these `tokens`, `loss_tokens`, `pairs` and `images`."""
        return (
            self.token * counts["tokens"]
            + self.loss_token * counts["loss_tokens"]
            + self.pair * counts["pairs"]
            + self.image * counts["images"]
        )


def step_flops(model: config.Model, train: config.Train) -> StepFlops:
    """Per unit, for the parts that `train` lets learn."""
    text, vision, adapters = model.text, model.vision, train.lora
    d, n, k, h = text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim
    whole = "text" in train.train and not adapters.rank
    block = d * (n + 2 * k) * h + n * h * d + 3 * d * text.intermediate_size
    token = 2.0 * text.num_layers * block * (3 if whole else 2)
    if adapters.rank:
        token += 3 * 2.0 * lora.param_count(text, adapters)
    width, patches = vision.hidden_size, vision.num_patches
    projector = 2.0 * model.projector.visual_tokens * (width * d + d * d)
    passes = {part: 3 if part in train.train else 1 for part in ("projector", "vision")}
    if passes["vision"] == 3:
        passes["projector"] = max(passes["projector"], 2)  # the gradient passes through
    linears = vision.patch_size**2 * 3 * width + vision.num_blocks * (
        4 * width**2 + 2 * width * vision.intermediate_size
    )
    tower = 2.0 * patches * linears + 4.0 * width * patches**2 * vision.num_blocks
    return StepFlops(
        token=token,
        loss_token=2.0 * d * text.vocab_size * (3 if whole else 2),
        pair=3 * 4.0 * n * h * text.num_layers,
        image=passes["projector"] * projector + passes["vision"] * tower,
    )
