import dataclasses

import jax
import numpy as np
import pytest

from data_prep.tokenizer import make_tokenizer
from infimed_jax import config, sharding
from infimed_jax.models.infimed import config as infimed
from infimed_jax.models.params import abstract_params

MODEL = infimed.Model(
    vision=infimed.Vision(
        image_size=30, patch_size=7, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=2, feature_layer=-2
    ),
    projector=infimed.Projector(visual_tokens=16),
    text=infimed.Text(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=50_000.0,
    ),
)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    texts = ["Is the heart enlarged? Which organ makes insulin? Yes. No."]
    return make_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=400)


@pytest.fixture(scope="session")
def model():
    return MODEL


@pytest.fixture(scope="session")
def untied(model):
    return dataclasses.replace(model, text=dataclasses.replace(model.text, tie_embeddings=False))


@pytest.fixture
def make_params():
    """model → random NumPy parameters, large enough that every weight matters; norms near one, biases not zero."""

    def make(model: config.Model, seed: int = 0) -> dict:
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            noise = rng.standard_normal(leaf.shape, np.float32)
            return 1 + 0.2 * noise if path[-1].key == "scale" else 0.15 * noise

        return jax.tree_util.tree_map_with_path(draw, abstract_params(model))

    return make
