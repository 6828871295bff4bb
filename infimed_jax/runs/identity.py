"""What makes a run the same run: which settings and what content a resumed one must share with its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infimed_jax.errors import UserError
from infimed_jax.runs.checkpoint import Metadata, open_checkpoint

RESUME_MAY_CHANGE = frozenset(
    {
        *("mesh", "sampling"),
        *("data.dataset", "data.tokenizer", "data.prefetch", "data.threads", "data.max_bad_records"),
        *("train.init_from", "train.output", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints"),
        *("train.max_skipped_updates", "train.remat", "train.attention", "train.logit_chunk", "train.micro_batches"),
        *("train.rows_per_device", "train.wandb", "train.step_timeout", "train.image_check"),
    }
)
"""Settings, and groups of them, that may change on resume; everything else is bound. They alter how a step is computed,
not what it computes. (Another mesh, kernel or number of micro-batches adds in another order, so its losses are equal to
rounding; all else equal, they are the same bits.) Data, tokenizer and the run before may move: their content is bound.
"""

_CONTENT = {
    "tokenizer_sha256": "data.tokenizer={} is another tokenizer",
    "batches_sha256": "data.dataset={} holds other samples, or they are packed in another way",
    "questions_sha256": "data.dataset={} holds other questions",
    "family_sha256": "model.family={} is another program than when the run began",
    "reward_sha256": "grpo.reward={} is another program than when the run began",
}
_MAY_MOVE = {"family_sha256": "model.family", "reward_sha256": "grpo.reward"}
"""Programs of the user's that are the same wherever they lie."""


def check_same_run(folder: Path, saved: Metadata, ours: Metadata) -> None:
    """UserError, by what differs, where the run in `folder` was begun with other settings, data or parameters.

    Both metadata hold the `config` and the SHA-256 of each `content` that the run depends on; `init_from_sha256` may be
    absent from ours where those parameters were not read. The group `grpo` is bound only in a run that asks questions.
    """
    if "content" not in saved:
        raise UserError(f"cannot resume {folder}: an older version began it; name another train.output")
    old, new = saved["content"], ours["content"]
    free = RESUME_MAY_CHANGE if "questions_sha256" in new else RESUME_MAY_CHANGE | {"grpo"}
    free = free.union(name for key, name in _MAY_MOVE.items() if new.get(key) and old.get(key) == new[key])
    before, now = (_flat(metadata["config"]) for metadata in (saved, ours))
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not {name, name.split(".")[0]} & free
    ]
    start = before["train.init_from"], now["train.init_from"]
    if not changed and old["init_from_sha256"] != _start_sha256(old, new, *start):
        changed = [_other_start(*start)]
    for name, words in _CONTENT.items():
        if not changed and old.get(name) != new.get(name):
            setting = words.partition("=")[0]
            changed = [words.format(now[setting])]
    if changed:
        raise UserError(f"cannot resume {folder}: {'; '.join(changed)}; restore that or name another train.output")


def _start_sha256(old: Mapping[str, str], new: Mapping[str, str], before: str, now: str) -> str:
    """The fingerprint of the parameters in `now`. Under the path of before they are not read: they may be gone."""
    if "init_from_sha256" in new:
        return new["init_from_sha256"]
    if now == before:
        return old["init_from_sha256"]
    return open_checkpoint(now).sha256 if now else ""


def _other_start(before: str, now: str) -> str:
    if before != now:
        return f"train.init_from was {before!r}, is {now!r}"
    return f"train.init_from={now} holds other parameters than when the run began"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
