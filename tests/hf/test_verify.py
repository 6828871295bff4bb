import dataclasses
import importlib.util
import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from infimed_jax.data.sample import Chat, Turn
from infimed_jax.hf import reference
from infimed_jax.hf.verify import builtin_samples, verify
from infimed_jax.models.infimed import config as infimed
from tests.hf.reading import to_hf


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """transformers in this process: importing it takes longer than all else here. `test_reference` has its own."""
    monkeypatch.setattr(reference, "in_own_process", lambda function, *arguments: function(*arguments))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_computes_what_we_compute(model, untied, make_params, tokenizer_folder, tmp_path, tied, dtype):
    model = model if tied else untied
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out", dtype=dtype)
    result = verify(params, model, folder, tokenizer_folder)
    assert result["status"] == "passed", result["failures"]
    assert [case["images"] for case in result["cases"]] == [0, 1, 3]
    for case in result["cases"]:
        assert case["tokens_equal"]
        assert case["logits"]["max_abs"] < 1e-4
        assert case["logits"]["top1_agreement"] == 1
        assert case["logits"]["scale"] > 1  # logits that are all alike would prove nothing
        assert ("rounding" in case) == (dtype == "bfloat16")
        if case["images"]:
            assert case["pixels"]["max_abs"] <= 1e-6
            assert case["vision"]["max_abs"] < 1e-4
            assert case["projector"]["max_abs"] < 1e-4
    assert json.loads((folder / "verify.json").read_text()) == result


@pytest.mark.parametrize(
    "leaf", ["text.layers.self_attn.k_norm.scale", "vision.blocks.mlp.fc2.bias", "projector.linear_1.kernel"]
)
def test_one_wrong_leaf_fails(model, make_params, tokenizer_folder, tmp_path, leaf):
    """The layers of a stacked leaf in the wrong order, or rows swapped: what a false converter would do."""
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    *groups, name = leaf.split(".")
    node = params
    for group in groups:
        node = node[group]
    node[name] = node[name][::-1]
    result = verify(params, model, folder, tokenizer_folder)
    assert result["status"] == "failed"
    assert any("logits differ" in failure for failure in result["failures"])
    text_fails = any(failure.startswith("verify/text") for failure in result["failures"])
    assert text_fails == leaf.startswith("text.")


def test_another_rope_base_fails(model, make_params, tokenizer_folder, tmp_path):
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    other = dataclasses.replace(model, text=dataclasses.replace(model.text, rope_theta=10_000.0))
    assert verify(params, other, folder, tokenizer_folder, builtin_samples()[:1])["status"] == "failed"


def test_a_damaged_export_fails(model, make_params, tokenizer_folder, tmp_path):
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    del weights["vision_tower.vision_model.head.probe"]  # unused, but transformers would draw one
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = verify(params, model, folder, tokenizer_folder)
    assert result["status"] == "failed"
    assert any("missing_keys" in failure for failure in result["failures"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "transformers cannot load the export: Error while deserializing header"),
        ("tokenizer.json", "transformers cannot load the export: "),
        ("chat_template.jinja", "transformers cannot give a prompt to the export's processor: "),
    ],
)
def test_an_export_that_cannot_be_used_fails(model, make_params, tokenizer_folder, tmp_path, file, message):
    """Cut weights, and files that went missing: a failed proof with the reason, not a traceback."""
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    (folder / file).unlink() if file != "model.safetensors" else os.truncate(folder / file, 5000)
    result = verify(params, model, folder, tokenizer_folder)
    (failure,) = result["failures"]
    assert result["status"] == "failed" and failure.startswith(message) and "\n" not in failure
    assert json.loads((folder / "verify.json").read_text())["failures"] == [failure]
    assert [path.name for path in tmp_path.iterdir() if "verify" in path.name] == []


def test_an_export_that_does_not_run_fails(model, make_params, tokenizer_folder, tmp_path):
    """config.json names another token as the image's place: transformers finds no places for the features."""
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"image_token_index": 1}))
    result = verify(params, model, folder, tokenizer_folder)
    (failure,) = result["failures"]
    assert result["status"] == "failed" and failure.startswith("transformers cannot run the export: ")
    assert "image tokens" in failure and "\n" not in failure


def test_another_processor_fails(model, make_params, tokenizer_folder, tmp_path):
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resample": 2}))  # bilinear
    failures = verify(params, model, folder, tokenizer_folder)["failures"]
    assert any("verify/image: pixels differ" in failure for failure in failures)
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_feature_select_strategy": "default"}))
    failures = verify(params, model, folder, tokenizer_folder)["failures"]
    assert "verify/image: the exported processor gives other tokens than our renderer" in failures


def test_torchvision_beside_transformers_changes_no_proof(model, make_params, tokenizer_folder, tmp_path):
    """Where it is installed, transformers resizes with it unless asked for Pillow, and gets other pixels."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    assert verify(params, model, folder, tokenizer_folder)["status"] == "passed"


def test_own_samples_and_a_repeated_image(model, make_params, tokenizer_folder, tmp_path):
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    images = builtin_samples()[2].images[:2]
    turns = (
        Turn("user", (0, "\nIs it?")),
        Turn("assistant", ("Yes.",), reasoning="It looks so."),
        Turn("user", (1, 0, "\nAnd these?")),
        Turn("assistant", ("No.",)),
    )
    sample = Chat("mine", "mine", "test", images, turns)
    result = verify(params, model, folder, tokenizer_folder, [sample])
    assert result["status"] == "passed", result["failures"]
    assert [case["id"] for case in result["cases"]] == ["mine"]
    assert result["cases"][0]["images"] == 3


def test_a_pooled_model_is_verified_at_full_resolution(model, make_params, tokenizer_folder, tmp_path):
    pooled = dataclasses.replace(model, projector=infimed.Projector(visual_tokens=4))
    params = make_params(pooled)
    folder = to_hf(params, pooled, tokenizer_folder, tmp_path / "out", visual_tokens=16)
    assert verify(params, pooled, folder, tokenizer_folder)["status"] == "passed"


def test_without_torch_it_says_so(model, make_params, tokenizer_folder, tmp_path, monkeypatch):
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    result = verify(params, model, folder, tokenizer_folder)
    assert result == {"status": "skipped", "reason": "torch is not installed"}
    assert json.loads((folder / "verify.json").read_text()) == result


def test_a_nan_is_never_within_tolerance(model, make_params, tokenizer_folder, tmp_path):
    params = make_params(model)
    params["text"]["norm"]["scale"][0] = np.nan
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out")
    assert verify(params, model, folder, tokenizer_folder)["status"] == "failed"
    written = json.loads((folder / "verify.json").read_text(), parse_constant=pytest.fail)  # a bare NaN is no JSON
    assert written["cases"][0]["logits"]["max_abs"] is None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params["vision"]))
