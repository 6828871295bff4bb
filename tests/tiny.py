"""What tests share: one tiny InfiMed, one whose sizes divide nothing, images for them, and a mesh of one device."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from infimed_jax import config
from infimed_jax.models.infimed.config import Model, Projector, Text, Vision
from infimed_jax.sharding import make_mesh

SIDE = 12
"""Pixels of an image of the tiny model: 16 patches."""


def model(visual_tokens: int = 4, **text: Any) -> Model:
    """A few thousand parameters in two layers; `text` are fields of Text that a test wants otherwise."""
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
    return Model(
        Vision(SIDE, patch_size=3, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2),
        Projector(visual_tokens),
        Text(**sizes | {"num_kv_heads": 2, "head_dim": 8, "rope_theta": 1e4} | text),
    )


def uneven_model(visual_tokens: int = 4, feature_layer: int = -1, norm_eps: float = 1e-6, **text: Any) -> Model:
    """As `model`, of sizes by which a mistaken axis, layer or pooling window shows: a patch does not divide the image,
    and heads are wider than the hidden size's share."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
    vision = Vision(
        30, patch_size=7, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=2,
        feature_layer=feature_layer, norm_eps=norm_eps,
    )  # fmt: skip
    return Model(vision, Projector(visual_tokens), Text(**sizes | {"head_dim": 16, "norm_eps": norm_eps} | text))


def pixels(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """u8[height, width, 3], noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(seed: int, height: int = SIDE, width: int = SIDE) -> bytes:
    """`pixels` as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(file, "PNG")
    return file.getvalue()


@contextmanager
def one_device() -> Iterator[jax.sharding.Mesh]:
    """The explicit mesh of the first device, under which every model function runs."""
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(autouse=True)
def mesh() -> Iterator[jax.sharding.Mesh]:
    """Imported by the files and folders whose tests run on one device."""
    with one_device() as mesh:
        yield mesh
