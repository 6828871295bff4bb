"""A run's curves as a picture: the first thing to look at when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infimed_jax.report.plot import ACCENT, BAD, panels, save

CURVE = "curve.png"

_PANELS = (
    ("loss", "loss, nats a token"),
    ("image_gain", "loss with another's image, minus with its own"),
    ("reward", "reward"),
    ("grad_norm", "gradient norm"),
    ("learning_rate", "learning rate"),
    ("tokens_per_second", "tokens a second, without padding"),
)


def draw_curve(rows: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Draw a panel for each metric in the rows; skipped updates are marked, not drawn.

    Without an update that was not skipped, no file is written.
    """
    shown = [(name, label) for name, label in _PANELS if any(name in row and not row.get("skipped") for row in rows)]
    if not shown:
        return
    figure, axes = panels(4.5 * len(shown), 3.4, 1, len(shown))
    figure.suptitle(title).set_parse_math(False)  # a path may hold "$"
    for axis, (name, label) in zip(axes, shown, strict=True):
        good = [(row["step"], row[name]) for row in rows if name in row and not row.get("skipped")]
        steps, values = np.array(good, np.float64).reshape(-1, 2).T
        if name == "tokens_per_second":  # over five steps: where two end together, the second takes no time
            tokens, seconds = (
                np.array([row[n] for row in rows if not row.get("skipped")]) for n in ("tokens", "seconds")
            )
            values = smoothed(tokens, 5) / smoothed(seconds, 5)
        axis.plot(steps, values, color=ACCENT, alpha=0.35 if len(values) >= 20 else 1.0, linewidth=1)
        if len(values) >= 20:
            axis.plot(steps, smoothed(values), color=ACCENT, linewidth=1.8, label="mean of 5 % of the steps")
        for step in (row["step"] for row in rows if row.get("skipped")):
            axis.axvline(step, color=BAD, linewidth=0.8)
        axis.set(xlabel="step", title=label)
    save(figure, file)


def smoothed(values: np.ndarray, width: int = 0) -> np.ndarray:
    """Centred moving mean over `width` values, or a twentieth of them; at the edges over the values that exist."""
    width = min(width or max(1, len(values) // 20), len(values))
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
