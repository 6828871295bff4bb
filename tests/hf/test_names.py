import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax import config, sharding
from infimed_jax.errors import UserError
from infimed_jax.hf import names
from infimed_jax.models.hugging_face import SpecialTokens
from infimed_jax.models.infimed import config as infimed
from infimed_jax.models.infimed.hf import HUGGING_FACE, LLAVA, text_from_hf, vision_from_hf
from infimed_jax.models.params import abstract_params

HF_CONFIGS = Path(__file__).resolve().parents[3] / "shared/data/hf_configs"
SPELLINGS = HUGGING_FACE.spellings[LLAVA]
PARTS = ("vision", "projector", "text")


@st.composite
def models(draw) -> config.Model:
    number = st.integers(1, 4)
    vision_heads, kv_heads, patch = draw(number), draw(number), draw(st.integers(1, 3))
    layers = draw(number)
    vision = infimed.Vision(
        image_size=patch * draw(st.integers(1, 3)) + draw(st.integers(0, patch - 1)),
        patch_size=patch,
        hidden_size=vision_heads * draw(number),
        intermediate_size=draw(number),
        num_layers=layers,
        num_heads=vision_heads,
        feature_layer=draw(st.integers(-layers - 1, layers)),
    )
    text = infimed.Text(
        vocab_size=draw(number),
        hidden_size=draw(number),
        intermediate_size=draw(number),
        num_layers=draw(number),
        num_heads=kv_heads * draw(number),
        num_kv_heads=kv_heads,
        head_dim=2 + 2 * draw(number),  # JAX >= 0.11 drops the sharding of slices of one element: half a head of two
        tie_embeddings=draw(st.booleans()),
    )
    return infimed.Model(vision, infimed.Projector(vision.num_patches), text)


def respell(key: str, choice: int) -> str:
    """Our key in one of the spellings that LLaVA files have."""
    ours = max((o for o in SPELLINGS if key.startswith(o)), key=len)
    spellings = SPELLINGS[ours]
    return spellings[choice % len(spellings)] + key[len(ours) :]


@settings(max_examples=60, deadline=None)
@given(models(), st.integers(0, 3))
def test_every_key_is_matched_once_in_every_spelling(model, choice):
    tensors, unused = names.tensors(model), HUGGING_FACE.unused(model)
    keys = [t.key for t in tensors] + [s.key for s in unused]
    assert len(set(keys)) == len(keys)
    found = {respell(t.key, choice): names.Found(t.key_shape, "F32") for t in tensors}
    found |= {respell(s.key, choice): names.Found(s.shape, "F32") for s in unused}
    assert len(found) == len(keys)
    match = names.match(found, LLAVA, model, PARTS, "here")
    assert set(match.sources) == set(tensors)
    assert {names.to_our_key(key, SPELLINGS) for key in match.dropped} == {s.key for s in unused}
    # and the spelling that is written is read back to the same key
    assert all(names.to_our_key(names.to_file_key(key, SPELLINGS), SPELLINGS) == key for key in keys)


@settings(max_examples=40, deadline=None)
@given(models(), st.randoms(use_true_random=False))
def test_both_directions_are_inverse_and_keep_every_number(model, random):
    for tensor in names.tensors(model):
        numbers = list(range(int(np.prod(tensor.weight.shape))))
        random.shuffle(numbers)
        ours = np.array(numbers).reshape(tensor.weight.shape)
        theirs = tensor.weight.to_key(ours)
        assert theirs.shape == tensor.key_shape
        assert np.array_equal(tensor.weight.to_leaf(theirs), ours)
        assert np.array_equal(tensor.weight.to_key(tensor.weight.to_leaf(theirs)), theirs)


@settings(max_examples=6, deadline=None)
@given(models())
def test_leaves_are_those_of_the_model(model):
    tree = abstract_params(model)
    found = {".".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert names.leaf_shapes(model) == found


@pytest.mark.parametrize("text", ["Qwen3-1.7B", "Qwen3-4B"])
def test_published_shapes_match_completely(text):
    """transformers' own model of the published sizes, on the meta device, against the table and against init_params."""
    if not HF_CONFIGS.is_dir():
        pytest.skip("shared/data/hf_configs is absent")
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text_values = json.loads((HF_CONFIGS / f"{text}.config.json").read_text())
    siglip = json.loads((HF_CONFIGS / "siglip-so400m-patch14-384.config.json").read_text())
    model = infimed.Model(
        vision_from_hf(siglip["vision_config"], "siglip", -2),
        infimed.Projector(729),
        text_from_hf(text_values, text),
    )
    assert model.text.rope_theta == 1e6
    values = HUGGING_FACE.to_hf(model, SpecialTokens(image=151655, stop=151645, pad=151643), "float32", 40960)
    with torch.device("meta"):
        theirs = LlavaForConditionalGeneration(LlavaConfig.from_dict(values))
    shapes = {key: names.Found(tuple(tensor.shape), "F32") for key, tensor in theirs.state_dict().items()}
    match = names.match(shapes, LLAVA, model, PARTS, text)
    assert {names.to_our_key(key, SPELLINGS) for key in match.dropped} == {
        s.key for s in HUGGING_FACE.unused(model)
    } | {"text.lm_head.weight"}
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh()):
        tree = abstract_params(model)
    found = {".".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert names.leaf_shapes(model) == found
    vision = sum(np.prod(s) for path, s in found.items() if path.startswith("vision."))
    assert vision == 397_745_440  # so400m without block 27, the final norm and the head


def test_all_faults_are_named_at_once(model):
    found = {names.to_file_key(t.key, SPELLINGS): names.Found(t.key_shape, "BF16") for t in names.tensors(model)}
    for layer in (0, 1, 2):
        del found[f"language_model.model.layers.{layer}.mlp.up_proj.weight"]
    del found["multi_modal_projector.linear_2.bias"]
    found["language_model.model.layers.7.mlp.up_proj.weight"] = names.Found((48, 32), "F32")
    found["adapter.weight"] = names.Found((1,), "F32")
    found["language_model.model.norm.weight"] = names.Found((31,), "F32")
    found["multi_modal_projector.linear_1.bias"] = names.Found((32,), "I64")
    found["model.multi_modal_projector.linear_1.weight"] = names.Found((32, 24), "F32")
    with pytest.raises(UserError) as raised:
        names.match(found, LLAVA, model, PARTS, "the folder")
    message = str(raised.value)
    assert "\n" not in message
    assert "4 missing: " in message
    assert "language_model.model.layers.{0-2}.mlp.up_proj.weight" in message
    assert "multi_modal_projector.linear_2.bias" in message
    assert "2 not known: adapter.weight, language_model.model.layers.7.mlp.up_proj.weight" in message
    assert "language_model.model.norm.weight [31] instead of [32]" in message
    assert "multi_modal_projector.linear_1.bias I64 instead of F32/BF16/F16" in message
    assert "model.multi_modal_projector.linear_1.weight and multi_modal_projector.linear_1.weight" in message


def test_an_untied_file_for_a_tied_model_is_not_lost(model, untied):
    tied_keys = {t.key for t in names.tensors(model)}
    assert {t.key for t in names.tensors(untied)} - tied_keys == {"text.lm_head.weight"}


def test_a_wrong_tree_is_named_leaf_by_leaf(model):
    leaves = {path: (shape, "float32") for path, shape in names.leaf_shapes(model).items()}
    leaves["text.norm.scale"] = ((33,), "float32")
    leaves["text.embed_tokens"] = (leaves["text.embed_tokens"][0], "float16")
    leaves["lora.a"] = ((1,), "float32")
    del leaves["projector.linear_1.bias"]
    with pytest.raises(UserError) as raised:
        names.check_leaves({path: names.Found(*leaf) for path, leaf in leaves.items()}, model)
    for part in (
        "1 missing: projector.linear_1.bias",
        "1 not known: lora.a",
        "scale [33]",
        "text.embed_tokens float16",
    ):
        assert part in str(raised.value)


def test_feature_layer_decides_what_is_unused(model):
    whole = dataclasses.replace(model, vision=dataclasses.replace(model.vision, feature_layer=-1))
    assert not any("layers" in tensor.key for tensor in HUGGING_FACE.unused(whole))
    assert sum("layers.2." in tensor.key for tensor in HUGGING_FACE.unused(model)) == 16
