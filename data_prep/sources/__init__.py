"""Data sources, one adapter each: the only place that knows a dataset's own files."""

from __future__ import annotations

from data_prep.sources import phantom, shapes, slake, vqa_rad
from data_prep.sources.source import Source

SOURCES: dict[str, Source] = {
    "phantom": phantom.SOURCE,
    "shapes": shapes.SOURCE,
    "slake": slake.SOURCE,
    "vqa_rad": vqa_rad.SOURCE,
}
