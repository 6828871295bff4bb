"""What a checkpoint remembers: the stages behind it, each with its settings and its data's licences.

All of it is in the checkpoint, so a model knows its history where the runs before are gone or elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infimed_jax import config
from infimed_jax.data.storage import MANIFEST
from infimed_jax.train.stored import Metadata

Entry = dict[str, Any]
UNKNOWN = "not stated"


def history_of(metadata: Metadata) -> list[Entry]:
    """Every stage behind a checkpoint with this metadata, the first one first, each with the `step` that it ended at.

    Without a `step` where the checkpoint does not say it (an import, or one of an older version); empty for parameters
    that were saved without a history.
    """
    *before, last = metadata.get("history") or [{}]
    step = {"step": metadata["step"]} if "step" in metadata else {}
    return [*before, last | step] if last else []


def stage_entry(cfg: config.Config, fingerprint: str, *, grpo: bool = False) -> Entry:
    """What a run adds to the history of its `train.init_from`; the step is added by who goes on from it."""
    licences = licences_of(cfg.data.dataset) if cfg.data.dataset else {}
    values = config.to_dict(cfg)
    return {"stage": cfg.train.stage, "fingerprint": fingerprint, "config": values, "grpo": grpo, "licences": licences}


def licences_of(dataset: str | Path) -> dict[str, str]:
    """Source -> licence of a prepared dataset; empty where there is none."""
    file = Path(dataset) / MANIFEST
    if not file.is_file():
        return {}
    manifest = json.loads(file.read_text(encoding="utf-8"))
    names = {origin.partition("/")[0] for origin in manifest.get("origins", {})}
    given = _given(manifest.get("info", {}))
    return {name: str(given.get(name, UNKNOWN)) for name in sorted(names)}


def _given(info: Mapping[str, Any]) -> dict[str, Any]:
    """Licences as ingestion or a mixture states them, behind any steps that only took samples away."""
    while "derived_from" in info:
        info = info["derived_from"]
    return info.get("licences") or {info.get("source"): info.get("licence", UNKNOWN)}
