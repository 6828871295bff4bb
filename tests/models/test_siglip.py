"""The vision tower against Hugging Face, a block at a time."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import SiglipVisionModel

from infimed_jax import config
from infimed_jax.models.compute import Compute
from infimed_jax.models.infimed import config as infimed
from infimed_jax.models.infimed.vision import SiglipTower, to_patches
from infimed_jax.models.infimed.weights import tree
from infimed_jax.models.params import param_count
from tests.models.reference import VISION, siglip_params, torch_siglip, torch_siglip_config

FLOAT32 = Compute("float32", "none", "xla", 64)


def tower(vision: infimed.Vision) -> SiglipTower:
    weights = tree(infimed.Model(vision=vision, projector=infimed.Projector(visual_tokens=1)))
    return SiglipTower(weights["vision"], vision, FLOAT32)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 30, 30, 3), dtype=np.uint8)


def torch_hidden_states(model, pixels):
    scaled = torch.from_numpy((pixels.astype(np.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        return [h.numpy() for h in model(pixel_values=scaled, output_hidden_states=True).hidden_states]


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_every_feature_layer_is_hugging_faces_hidden_state(pixels, activation):
    vision = replace(VISION, activation=activation)
    model = torch_siglip(vision)
    expected = torch_hidden_states(model, pixels)
    assert len(expected) == vision.num_layers + 1
    for layer in range(-vision.num_layers - 1, vision.num_layers + 1):
        held = replace(vision, feature_layer=layer)
        params = siglip_params(model, held)
        out = jax.jit(tower(held).apply)({"params": params}, pixels)
        np.testing.assert_allclose(out, expected[layer], atol=1e-4, rtol=0, err_msg=f"feature layer {layer}")


def test_the_two_activations_differ(pixels):
    params = siglip_params(torch_siglip(VISION), VISION)
    tanh, exact = (
        tower(replace(VISION, activation=name)).apply({"params": params}, pixels) for name in ("gelu_tanh", "gelu")
    )
    assert np.abs(tanh - exact).max() > 1e-4


def test_the_published_tower_is_so400m_without_what_never_runs():
    """so400m without its head, counted by transformers; of it this model holds all but block 27 and the final norm."""
    vision = config.load([Path(__file__).resolve().parents[2] / "configs/models/foundation_4b.yaml"]).model.vision
    with torch.device("meta"):
        theirs = SiglipVisionModel(torch_siglip_config(vision, head=False))
    counts = {name: parameter.numel() for name, parameter in theirs.named_parameters()}
    assert sum(counts.values()) == 412_987_248
    runs = sum(n for name, n in counts.items() if "layers.26." not in name and "post_layernorm" not in name)
    assert param_count(infimed.Model(vision=vision))["vision"] == runs == 397_745_440


def test_patches_are_row_major_and_leave_the_remainder(pixels):
    patches = np.asarray(to_patches(jax.numpy.asarray(pixels), 7))
    assert patches.shape == (3, 16, 147)
    np.testing.assert_array_equal(patches[1, 6].reshape(7, 7, 3), pixels[1, 7:14, 14:21])
