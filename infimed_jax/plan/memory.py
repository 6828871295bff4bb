"""Bytes a device holds: exact for what the state is, estimated for what a step needs beside it."""

from __future__ import annotations

from infimed_jax import config
from infimed_jax.plan.flops import BF16, attention_kernel
from infimed_jax.plan.program import Program
from infimed_jax.train.memory import local_bytes

F32 = 4


def state_bytes(program: Program) -> dict[str, int]:
    """Exact, a device: `parameters` (float32 masters and the frozen rest), `moments`, `batch`, and `gradients`.

    Gradients are as large as the masters; they live only inside the step, so a compiler's temporaries hold them.
    """
    state = program.state
    trainable = local_bytes(state.trainable)
    return {
        "parameters": trainable + local_bytes(state.frozen),
        "moments": local_bytes(state.opt),
        "batch": local_bytes(program.batch),
        "gradients": trainable,
    }


def activation_estimate(cfg: config.Config, rows: int, mesh: dict[str, int]) -> int:
    """Bytes a device, without a compiler: what is kept for the backward pass, and the largest thing beside it.

    `rows` are those of one micro-batch. One ahead-of-time compile (4B, pretraining, v5p:2x4x4, full recomputation) is
    what it was compared with: tests/plan/test_cell.py.
    """
    local, tensor = rows // (mesh["data"] * mesh["fsdp"]), mesh["tensor"]
    text, length = cfg.model.text, cfg.data.context
    positions = local * length
    heads, kv, f = (n // tensor for n in (text.num_heads, text.num_kv_heads, text.intermediate_size))
    scores = local * heads * length**2 if attention_kernel(cfg) == "xla" else 0
    stream = positions * text.hidden_size * BF16
    attended = positions * text.head_dim * (2 * heads + 2 * kv) * BF16
    hidden = 3 * positions * f * BF16
    layer = 4 * stream + attended + hidden
    kept = {"full": stream, "dots": 3 * stream + attended + 2 * positions * f * BF16}
    weights = 2 * text.hidden_size * (text.num_heads + text.num_kv_heads) * text.head_dim
    weights = (weights + 3 * text.hidden_size * text.intermediate_size) // tensor * BF16
    stored = text.num_layers * kept.get(cfg.train.remat, layer + weights + scores * (F32 + BF16))
    # The table whole for the lookup and for the head, and a gradient of each.
    tables = 2 * text.vocab_size * text.hidden_size * BF16 * (1 + 1 / tensor)
    logits = local * min(cfg.train.logit_chunk, length) * text.vocab_size // tensor * (2 * F32 + BF16)
    backward = layer * 2 + scores * (2 * F32 + BF16) + 3 * weights
    return int(stored + tables + max(backward, logits, _vision(cfg, local, tensor)))


def _vision(cfg: config.Config, local: int, tensor: int) -> int:
    """One block's peak, and every block's where the tower learns."""
    vision, images = cfg.model.vision, local * cfg.data.images_per_row
    stream = images * vision.num_patches * vision.hidden_size * BF16
    scores = images * (vision.num_heads // tensor) * vision.num_patches**2 * (F32 + BF16)
    block = 6 * stream + images * vision.num_patches * (vision.intermediate_size // tensor) * BF16 + scores
    if "vision" not in cfg.train.train:
        return block
    kept = {"full": stream, "dots": 6 * stream}.get(cfg.train.remat, block)
    return 2 * block + vision.num_blocks * kept
