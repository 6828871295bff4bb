"""A checkpoint's history: the stages behind it, each with its settings, its data's origins and their licences.

All of it is stored in the checkpoint, so it stays known where the earlier runs are gone or elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infimed_jax import config
from infimed_jax.data.storage import MANIFEST
from infimed_jax.data.training import commercial_use, licences
from infimed_jax.runs.checkpoint import Metadata

Entry = dict[str, Any]
UNKNOWN = "not stated"


def history_of(metadata: Metadata) -> list[Entry]:
    """Every stage behind a checkpoint with this metadata, in order, each with the `step` at which it ended.

    An import has no `step`. Empty for parameters that were saved without a history.
    """
    *before, last = metadata.get("history") or [{}]
    step = {"step": metadata["step"]} if "step" in metadata else {}
    return [*before, last | step] if last else []


def stage_entry(cfg: config.Config, content: Mapping[str, str]) -> Entry:
    """The entry that a run adds to the history of its `train.init_from`; `history_of` adds the step.

    `content` are the fingerprints that bind the run.
    """
    manifest = _manifest(cfg.data.dataset)
    names = {origin.partition("/")[0] for origin in manifest.get("origins", {})}
    stated = licences(Path(cfg.data.dataset)) if names else {}
    return {
        "stage": cfg.train.stage,
        "content": dict(content),
        "config": config.to_dict(cfg),
        "grpo": "questions_sha256" in content,
        "origins": sorted(manifest.get("origins", ())),
        "licences": {name: stated.get(name, UNKNOWN) for name in sorted(names)},
        "commercial_use": commercial_use(Path(cfg.data.dataset)) if names else {},
    }


def learnt_from(history: Sequence[Entry], origins: Iterable[str]) -> list[str]:
    """The dataset's origins (`source/split`) that any stage of the history learnt from."""
    return sorted({origin for entry in history for origin in entry.get("origins", ())} & {*origins})


def _manifest(dataset: str | Path) -> dict[str, Any]:
    file = Path(dataset) / MANIFEST
    return json.loads(file.read_text(encoding="utf-8")) if dataset and file.is_file() else {}
