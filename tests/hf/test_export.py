import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, SiglipVisionConfig, SiglipVisionModel

from infimed_jax.errors import UserError
from infimed_jax.hf import export, names
from infimed_jax.hf.card import Card, DataSource
from infimed_jax.models.infimed import config as infimed
from tests.hf.reading import from_llava, to_hf

ROOT = Path(__file__).resolve().parents[2]


def equal_trees(a, b) -> bool:
    """Same structure, dtypes, shapes and bits."""
    flat_a, flat_b = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
    return len(flat_a) == len(flat_b) and all(
        path == other and x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for (path, x), (other, y) in zip(flat_a, flat_b, strict=True)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10_000_000, 60_000])
def test_round_trip_is_bit_exact(model, untied, make_params, tokenizer_folder, tmp_path, tied, dtype, shard_bytes):
    model = model if tied else untied
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out", dtype=dtype, shard_bytes=shard_bytes)
    if dtype == "bfloat16":
        params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    read, read_model = from_llava(folder, dtype=dtype)
    assert read_model == model
    assert equal_trees(read, params)
    shards = sorted(folder.glob("*.safetensors"))
    assert all(shard.stat().st_size <= shard_bytes + 20_000 for shard in shards)  # a header is a few kilobytes
    assert (len(shards) > 1) == (shard_bytes == 60_000) == (folder / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_configuration_survives(model, make_params, tokenizer_folder, tmp_path, activation):
    vision = dataclasses.replace(model.vision, activation=activation, norm_eps=3e-5, feature_layer=1)
    model = dataclasses.replace(
        model, vision=vision, text=dataclasses.replace(model.text, norm_eps=2e-5, rope_theta=5e6)
    )
    folder = to_hf(make_params(model), model, tokenizer_folder, tmp_path / "out")
    assert from_llava(folder)[1] == model
    written = json.loads((folder / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "float32"  # whatever the reader's age
    settings = LlavaForConditionalGeneration.from_pretrained(folder).config
    assert settings.text_config.rope_parameters == {"rope_theta": 5e6, "rope_type": "default"}
    assert settings.text_config.rms_norm_eps == 2e-5
    assert settings.vision_config.layer_norm_eps == 3e-5
    assert settings.vision_config.hidden_act == {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[activation]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_misses_and_ignores_nothing(model, untied, make_params, tokenizer_folder, tmp_path, tied):
    model = model if tied else untied
    folder = to_hf(make_params(model), model, tokenizer_folder, tmp_path / "out")
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    settings = theirs.config
    assert settings.vision_feature_select_strategy == "full"
    assert settings.image_seq_length == model.vision.num_patches
    assert (theirs.lm_head.weight is theirs.model.language_model.embed_tokens.weight) == tied
    assert theirs.generation_config.do_sample is False


def test_spare_tensors_come_back_from_the_source(model, make_params, tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    v = model.vision
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=v.hidden_size,
            intermediate_size=v.intermediate_size,
            num_hidden_layers=v.num_layers,
            num_attention_heads=v.num_heads,
            image_size=v.image_size,
            patch_size=v.patch_size,
        )
    )
    siglip.save_pretrained(tmp_path / "siglip")
    params = make_params(model)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out", source_vision=tmp_path / "siglip")
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    tower, source = theirs.model.vision_tower.state_dict(), siglip.state_dict()
    spare = [key for key in source if key.startswith(("encoder.layers.2.", "post_layernorm.", "head."))]
    assert len(spare) == 16 + 2 + 11
    assert all(torch.equal(tower[key], source[key]) for key in spare)
    assert not torch.equal(
        tower["encoder.layers.1.mlp.fc1.weight"], source["encoder.layers.1.mlp.fc1.weight"]
    )  # what we trained is ours
    assert "Initialised" not in (folder / "README.md").read_text()


def test_a_source_of_another_shape_is_refused(model, make_params, tokenizer_folder, tmp_path):
    other = SiglipVisionConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=30, patch_size=7
    )
    SiglipVisionModel(other).save_pretrained(tmp_path / "siglip")
    with pytest.raises(UserError) as raised:
        to_hf(make_params(model), model, tokenizer_folder, tmp_path / "out", source_vision=tmp_path / "siglip")
    assert "16 missing" in str(raised.value)  # its third block
    assert "vision.post_layernorm.weight [16] instead of [24]" in str(raised.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "siglip"]


def test_without_a_source_the_made_up_tensors_are_named(model, make_params, tokenizer_folder, tmp_path, caplog):
    folder = to_hf(make_params(model), model, tokenizer_folder, tmp_path / "out")
    card = (folder / "README.md").read_text()
    summary = json.loads((folder / "export.json").read_text())
    modules = ("encoder.layers.2.*", "post_layernorm.*", "head.*")
    assert summary["initialised"] == [f"vision_tower.vision_model.{module}" for module in modules]
    for name in summary["initialised"]:
        assert name in card
        assert name in caplog.text
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    tower = theirs.model.vision_tower
    pooled = tower(torch.zeros(1, 3, 30, 30)).pooler_output  # what is made up can be run, and is no accident
    assert torch.isfinite(pooled).all()
    torch.manual_seed(7)
    again = LlavaForConditionalGeneration.from_pretrained(folder).model.vision_tower.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in tower.state_dict().items())


def test_a_pooled_model_is_no_llava(model, make_params, tokenizer_folder, tmp_path):
    pooled = dataclasses.replace(model, projector=infimed.Projector(visual_tokens=4))
    params = make_params(pooled)
    with pytest.raises(UserError, match=r"pools to 4 visual tokens is not plain LLaVA.*visual_tokens=16"):
        to_hf(params, pooled, tokenizer_folder, tmp_path / "out")
    for asked, trained in ((0, pooled), (4, pooled), (9, pooled), (729, model), (4, model)):
        with pytest.raises(UserError, match=rf"--visual-tokens {asked} is no plain LLaVA.*has 16 patches"):
            to_hf(params, trained, tokenizer_folder, tmp_path / "out", visual_tokens=asked)
    assert not any(tmp_path.iterdir())
    folder = to_hf(params, pooled, tokenizer_folder, tmp_path / "out", visual_tokens=16)
    assert "Trained with 4 pooled visual tokens" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["image_seq_length"] == 16


def test_the_card_says_what_was_given(model, make_params, tokenizer_folder, tmp_path):
    card = Card(
        title="Tiny",
        base_models=("Qwen3-4B, Apache-2.0",),
        stages=("Continual pretraining",),
        sources=(DataSource("VQA-RAD", "CC0-1.0", True), DataSource("PMC-VQA", "CC BY-NC 4.0", False)),
        results={"VQA-RAD": "57.9"},
    )
    text = (to_hf(make_params(model), model, tokenizer_folder, tmp_path / "out", card=card) / "README.md").read_text()
    for part in ("# Tiny", "Qwen3-4B, Apache-2.0", "Continual pretraining", "| PMC-VQA | CC BY-NC 4.0 | no |", "57.9"):
        assert part in text
    assert "Not for commercial use, because of the training data: PMC-VQA." in text
    assert "must not be used for diagnosis" in text
    assert "backend='pil'" in text and "`<image_1>: `" in text


def test_parameters_that_do_not_fit_are_refused(model, untied, make_params, tokenizer_folder, tmp_path):
    with pytest.raises(UserError, match=r"1 missing: text\.lm_head"):
        to_hf(make_params(model), untied, tokenizer_folder, tmp_path / "out")
    small = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=100))
    with pytest.raises(UserError, match="tokens, the model's vocab_size is 100"):
        to_hf(make_params(small), small, tokenizer_folder, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_without_a_template_is_refused_before_a_weight_is_read(
    model, make_params, tokenizer_folder, tmp_path
):
    class Unread:
        def __init__(self, leaf):
            self.shape, self.dtype = leaf.shape, leaf.dtype

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("was read")

    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("chat_template.jinja"))
    settings = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no chat template"):
        to_hf(jax.tree.map(Unread, make_params(model)), model, tmp_path / "tokenizer", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_an_existing_output_is_kept(model, make_params, tokenizer_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        to_hf(make_params(model), model, tokenizer_folder, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    with pytest.raises(UserError, match="cannot write /proc/out: No such file or directory; name another folder"):
        to_hf(make_params(model), model, tokenizer_folder, "/proc/out")


def test_a_full_disk_is_one_line_and_leaves_nothing(model, make_params, tokenizer_folder, tmp_path, monkeypatch):
    def full(*args):
        (args[0] / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "write_weights", full)
    with pytest.raises(UserError, match="no space left") as raised:
        to_hf(make_params(model), model, tokenizer_folder, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not any(tmp_path.iterdir())


KILLED = """
import os, pickle, signal, sys
from infimed_jax.hf.export import Export
from infimed_jax.models.weights import Weight

params, model, tokenizer, output = pickle.load(open(sys.argv[1], "rb"))
count, convert = 0, Weight.to_key

def to_key(self, ours):
    global count
    count += 1
    if count == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return convert(self, ours)

Weight.to_key = to_key
Export(params, model, tokenizer).write(output, shard_bytes=20_000)
"""


def test_a_killed_export_leaves_no_folder_and_does_not_stop_the_next(model, make_params, tokenizer_folder, tmp_path):
    import pickle

    params = make_params(model)
    output = tmp_path / "out"
    arguments = tmp_path / "arguments.pickle"
    arguments.write_bytes(pickle.dumps((params, model, tokenizer_folder, output)))
    ended = subprocess.run([sys.executable, "-c", KILLED, str(arguments)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not output.exists()
    partial = tmp_path / ".out.partial"
    assert any(partial.glob("model-*"))  # it was in the middle
    with pytest.raises(UserError):
        from_llava(partial)
    assert from_llava(to_hf(params, model, tokenizer_folder, output))[1] == model
    assert not partial.exists()


def test_sharded_arrays_are_exported(model, make_params, tokenizer_folder, tmp_path, mesh):
    """Parameters as training holds them: global arrays, and a frozen part in bfloat16."""
    params = make_params(model)
    placed = jax.tree.map(jax.numpy.asarray, params)
    placed["vision"] = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), placed["vision"])
    read, _ = from_llava(to_hf(placed, model, tokenizer_folder, tmp_path / "out"))
    expected = params | {
        "vision": jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params["vision"])
    }
    assert equal_trees(read, expected)


def test_a_tensor_larger_than_a_shard_gets_its_own():
    from infimed_jax.hf.weights import plan_shards

    assert plan_shards({"a": 4, "b": 5, "c": 20, "d": 1, "e": 9}, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert names.by_module(["t.layers.3.x.weight", "t.layers.3.y", "t.head.probe"]) == ["t.layers.3.*", "t.head.*"]
