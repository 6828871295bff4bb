"""Phantoms: procedural images that look like CT, MRI, radiographs and microscopy, with lesions of known attributes.

They stand in for medical data where there is none: in the quickstart and in tests. Nothing in them is a patient's.
"""

from __future__ import annotations

from functools import partial

from data_prep.sources.phantom.captions import caption
from data_prep.sources.phantom.questions import ask
from data_prep.sources.phantom.reasoning import think
from data_prep.sources.phantom.render import render_png
from data_prep.sources.phantom.scene import Scene, draw_scene
from data_prep.sources.procedural import Procedure, procedural_source, write_folder


def _meta(scene: Scene) -> dict[str, str]:
    return {"modality": scene.modality, "organ": scene.organ}


PHANTOM: Procedure[Scene] = Procedure(
    name="phantom", draw=draw_scene, png=render_png, caption=caption, ask=ask, think=think, meta=_meta
)

write_phantom = partial(write_folder, PHANTOM)
"""(folder, seed, sizes) draws `sizes[split]` phantoms for each split, as `procedural.write_folder` says."""

SOURCE = procedural_source("phantom", "Phantoms: procedural images in the manner of CT, MRI, X-ray and microscopy")
