"""The gate before training: data for evaluation only is refused, held-out splits are reported."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path

from infimed_jax.data.storage import Samples, open_samples
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
    """As ingestion wrote it into the manifest; a step that only removes samples keeps the manifest before it."""
    info = samples.manifest["info"]
    while "derived_from" in info:
        info = info["derived_from"]
    return info.get("training_allowed", True)


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
