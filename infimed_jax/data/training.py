"""The gate before training: data for evaluation only is refused, held-out splits and licences are reported."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from infimed_jax.data.storage import MANIFEST, Samples, open_samples
from infimed_jax.errors import UserError

HELD_OUT = ("validation", "test", "dev")
"""Splits by which models are compared, and those whose names begin so: `test_v1`."""

log = logging.getLogger(__name__)


def open_for_training(folder: str | Path) -> Samples:
    """Open a prepared dataset to learn from it; a warning names its held-out splits.

    UserError: there is none, or it is for evaluation only.
    """
    samples = open_samples(folder)
    origins = samples.manifest["origins"]
    if not training_allowed(samples):
        raise UserError(f"{folder} holds {', '.join(origins)}, for evaluation only: train on a dataset without it")
    if held := held_out(origins):
        _warn(str(folder), ", ".join(held))
    return samples


def training_allowed(samples: Samples) -> bool:
    """As ingestion wrote it into the manifests of the datasets that hold the samples; a view's own lifts nothing."""
    return all(_allowed(base.manifest["info"]) for base in samples.bases)


def _allowed(info: dict[str, Any]) -> bool:
    """A step that writes samples anew keeps the manifest before it."""
    while "training_allowed" not in info and "derived_from" in info:
        info = info["derived_from"]
    return info.get("training_allowed", True)


def licences(folder: Path) -> dict[str, str]:
    """By source, as the manifests of a dataset, and of those that a view points to, state them; the latter count."""
    stated: dict[str, str] = {}
    for info in _infos(folder):
        by_source = info.get("licences") or {info.get("source"): info.get("licence")}
        stated |= {source: licence for source, licence in by_source.items() if source and licence}
    return stated


def commercial_use(folder: Path) -> dict[str, bool]:
    """By source, whether the manifests of a dataset, and of those that a view points to, allow commercial use."""
    return {
        info["source"]: bool(info["commercial_use"])
        for info in _infos(folder)
        if {"source", "commercial_use"} <= info.keys()
    }


def _infos(folder: Path) -> Iterator[dict[str, Any]]:
    """What ingestion wrote into a dataset's manifest, then the same of each base of a view."""
    file = folder / MANIFEST
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    info = manifest.get("info", {})
    while "derived_from" in info:
        info = info["derived_from"]
    yield info
    for base in manifest.get("bases", ()):
        yield from _infos(folder / base["folder"])


def held_out(origins: Iterable[str]) -> list[str]:
    """Those of a dataset's origins (`source/split`) that are held out for evaluation."""
    return [origin for origin in origins if origin.partition("/")[2].partition("_")[0] in HELD_OUT]


@functools.cache
def _warn(folder: str, held: str) -> None:
    """Once, though a command opens a dataset again."""
    log.warning(
        "warning: %s holds %s, held out for evaluation: what is trained on it scores there by memory; leave it out, "
        "unless you never evaluate on it",
        folder,
        held,
    )
