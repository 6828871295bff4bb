"""Phantoms: procedural images that look like CT, MRI, radiographs and microscopy, with lesions of known attributes.

They stand in for medical data where there is none: in the quickstart and in tests. Nothing in them is a patient's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from data_prep.sources import procedural
from data_prep.sources.phantom.captions import caption
from data_prep.sources.phantom.questions import ask
from data_prep.sources.phantom.reasoning import think
from data_prep.sources.phantom.render import render_png
from data_prep.sources.phantom.scene import Scene, draw_scene
from data_prep.sources.source import Source


def _meta(scene: Scene) -> dict[str, str]:
    return {"modality": scene.modality, "organ": scene.organ}


PHANTOM: procedural.Procedure[Scene] = procedural.Procedure(
    name="phantom",
    draw=draw_scene,
    png=render_png,
    caption=caption,
    ask=ask,
    think=think,
    meta=_meta,
)


def write_phantom(folder: str | Path, seed: int, sizes: Mapping[str, int], per_image: int = 4) -> Path:
    """Draw `sizes[split]` phantoms for each split into `folder`, as `procedural.write_folder` says."""
    return procedural.write_folder(PHANTOM, folder, seed, sizes, per_image)


SOURCE = Source(
    name="phantom",
    title="Phantoms: procedural images in the manner of CT, MRI, X-ray and microscopy",
    licence="Apache-2.0",
    commercial_use=True,
    allow_external_api=True,
    training_allowed=True,
    splits=procedural.SPLITS,
    layout="images/*.png, SPLIT.json for each split",
    obtain="data_prep.sources.phantom.write_phantom(folder, seed, sizes) draws them",
    read=partial(procedural.read_folder, "phantom"),
)
