"""Pictures by matplotlib in one style, without a display: SVG for pages, PNG for files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from infimed_jax.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE, PALE, GRID = "#1c2733", "#5b6b7b", "#b9c3cc", "#d3dde0", "#e8edf0"
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", GRID: "grid"}
"""Names of colours in `base.html.jinja`, which differ in the dark; those of data stay."""
ACCENT, SECOND, THIRD, BAD = "#0b6e75", "#c98a12", "#7a4fa3", "#b3372f"
SERIES = (ACCENT, SECOND, THIRD, "#3f74b5", "#8a9a2b", "#b5483a", "#5b6b7b")
"""Colours of curves in one panel, in order."""
LEGEND = {"frameon": False, "fontsize": 8, "labelcolor": SOFT}


def panels(
    width: float, height: float, rows: int = 1, columns: int = 1, *, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Any]]:
    """A figure of `width` x `height` inches, and its panels row by row."""
    from matplotlib.figure import Figure  # takes 0.1 s, which --help must not

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(LINE)
        panel.tick_params(which="both", colors=SOFT, labelsize=8.5)
        panel.xaxis.label.set(color=SOFT, fontsize=8.5)
        panel.yaxis.label.set(color=SOFT, fontsize=8.5)
        panel.grid(axis="y", color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
    return figure, axes


def svg(figure: Figure) -> Markup:
    """The figure as an element of a page, the same bytes each time."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "infimed"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text[text.index("<svg") :])


def save(figure: Figure, path: Path) -> None:
    """The figure as a PNG file, written whole or not at all."""
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
