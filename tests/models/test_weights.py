"""The table of weights against what is declared or computed elsewhere."""

import jax
import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.config import ConfigError
from infimed_jax.models.family import family_of, weights
from infimed_jax.models.infimed import config as infimed
from infimed_jax.models.infimed.weights import sizes
from infimed_jax.models.params import init_params
from infimed_jax.trees import flatten
from tests.models.reference import MODEL
from tests.tiny import one_device


def test_tensor_splits_the_sizes_that_the_settings_name():
    """Sizes that are all different, so that none can stand for another."""
    vision = infimed.Vision(hidden_size=66, intermediate_size=20, num_heads=6, num_layers=2, feature_layer=-1)
    text = infimed.Text(24, 36, 28, 2, num_heads=32, num_kv_heads=16, head_dim=10, tie_embeddings=False)
    model = infimed.Model(vision, infimed.Projector(1), text)
    letters = sizes(model)
    split = {
        letters[letter]
        for weight in weights(model)
        for letter, axis in zip(weight.letters.split(), weight.axes, strict=True)
        if axis in ("heads", "mlp", "vocab")
    }
    assert split == {*model.split.values(), 32}  # query heads are a multiple of the key-value heads


def test_first_values_depend_on_the_key_and_the_weight_alone():
    """Another table (an untied head) changes no other weight; kernels of one shape differ."""
    untied = infimed.Model(MODEL.vision, MODEL.projector, infimed.Text(**vars(MODEL.text) | {"tie_embeddings": False}))
    with one_device():
        tied, other = (flatten(init_params(jax.random.key(3), model)) for model in (MODEL, untied))
    assert other.keys() - tied.keys() == {"text.lm_head"}
    for path, values in tied.items():
        np.testing.assert_array_equal(values, other[path])
    attention = "text.layers.self_attn"
    assert not np.array_equal(tied[f"{attention}.k_proj.kernel"], tied[f"{attention}.v_proj.kernel"])


def test_first_values_have_the_distributions_that_the_table_names():
    with one_device():
        params = flatten(init_params(jax.random.key(0), MODEL))
    assert params.keys() == {weight.path for weight in weights(MODEL)}
    for weight in weights(MODEL):
        values = np.asarray(params[weight.path])
        if weight.name in ("bias", "scale"):
            assert (values == (weight.name == "scale")).all()
            continue
        expected = weight.fan_in**-0.5 if weight.part == "vision" else 0.02
        expected = 0.75 if weight.name == "position_embedding" else expected
        error = values.std() / expected - 1
        assert abs(error) < 5 / np.sqrt(2 * values.size)  # five standard errors of a deviation


def test_a_family_without_functions_is_refused(tmp_path):
    (tmp_path / "half_a_family.py").write_text(
        "from dataclasses import dataclass\nfrom infimed_jax.config import Model\n"
        "@dataclass(frozen=True)\nclass MODEL(Model):\n    PARTS = ('mouth',)\n"
    )
    name = str(tmp_path / "half_a_family.py")
    with pytest.raises(ConfigError, match="must define FAMILY"):
        family_of(config.model_class(name)(family=name))
