"""Every stage of `configs/` with every model, on the pod that the model's header names."""

from __future__ import annotations

import re
from pathlib import Path

from infimed_jax import config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = ("tiny", "foundation_1p7b", "foundation_4b")
STAGES = ("pretrain", "sft_general", "sft_medical", "sft_cross_distribution", "sft_reflective", "grpo")
TPU_POD = re.compile(r"^# Pod: (\S+)", re.MULTILINE)


def load(model: str, stage: str) -> config.Config:
    """The tiny model's heads fit no TPU kernel, and its context is the quickstart's."""
    files = [CONFIGS / f"models/{model}.yaml", CONFIGS / f"stages/{stage}.yaml"]
    if model != "tiny":
        return config.load(files)
    return config.load([*files, CONFIGS / f"runs/quickstart/{stage}.yaml"], ["train.attention=xla"])


def pod(model: str) -> str:
    """From the line `# Pod: v5p:2x4x4 …` of the model's configuration."""
    return TPU_POD.search((CONFIGS / f"models/{model}.yaml").read_text(encoding="utf-8"))[1]


def distinct() -> list[tuple[str, str]]:
    """Pairs of model and stage whose compiled steps differ: tuning stages differ in their data alone."""
    seen: dict[str, tuple[str, str]] = {}
    for model in MODELS:
        for stage in STAGES:
            cfg = load(model, stage)
            train = cfg.train
            shape = (cfg.data.context, cfg.data.images_per_row, train.global_batch, train.micro_batches, train.train)
            key = repr((cfg.model, shape, train.remat, train.logit_chunk, train.compute_dtype, stage == "grpo"))
            seen.setdefault(key, (model, stage))
    return list(seen.values())
