import dataclasses

import jax
import numpy as np
import pytest

from data_prep.tokenizer import make_tokenizer
from infimed_jax import config
from infimed_jax.models.params import abstract_params
from tests import tiny
from tests.tiny import mesh  # noqa: F401

MODEL = tiny.uneven_model(visual_tokens=16, feature_layer=-2, vocab_size=400, rope_theta=50_000.0)


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
