"""Whether a folder's checkpoints are of the run that is asked to go on there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infimed_jax.errors import UserError
from infimed_jax.runs.checkpoint import Metadata, leaves_fingerprint

_FREE = {
    *("mesh", "sampling", "grpo"),
    *("data.dataset", "data.tokenizer", "data.prefetch", "data.threads", "data.max_bad_records"),
    *("train.output", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.max_skipped_updates", "train.remat", "train.attention", "train.logit_chunk", "train.micro_batches"),
    *("train.rows_per_device", "train.wandb", "train.step_timeout"),
}
"""Settings that may change on resume: they alter how a step is computed, not what it computes. (Another mesh, kernel or
number of micro-batches adds in another order, so its losses are equal to rounding; all else equal, they are the same
bits.) Dataset, tokenizer and the run before may move: fingerprints are of their content."""


def check_same_run(folder: Path, saved: Metadata, ours: Metadata) -> None:
    """UserError, by what differs, where the run in `folder` was begun with other settings, data or parameters."""
    before, now = (_flat(metadata["config"]) for metadata in (saved, ours))
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not {name, name.split(".")[0]} & _FREE
        and not (name == "train.init_from" and now[name] and saved.get("start") == leaves_fingerprint(now[name]))
    ]
    if not changed and saved["tokenizer"] != ours["tokenizer"]:
        changed = [f"data.tokenizer={now['data.tokenizer']} is another tokenizer"]
    if not changed and saved["fingerprint"] != ours["fingerprint"]:
        changed = [f"data.dataset={now['data.dataset']} holds other samples, or they are packed in another way"]
    if changed:
        raise UserError(f"cannot resume {folder}: {'; '.join(changed)}; restore that or name another train.output")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
