import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from infimed_jax.errors import UserError
from tests.hf.reading import from_hf, from_llava, to_hf

VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=30, patch_size=7
)


@pytest.fixture
def qwen3(tmp_path):
    """A text folder as published: bfloat16, rope_theta on its own."""
    return save_qwen3(tmp_path / "qwen3")


def save_qwen3(folder, *, tied=True, **settings):
    torch.manual_seed(0)
    values = dict(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        tie_word_embeddings=tied,
    )
    module = Qwen3ForCausalLM(Qwen3Config(**values | settings)).to(torch.bfloat16)
    module.save_pretrained(folder)
    return folder


@pytest.fixture
def siglip(tmp_path):
    torch.manual_seed(1)
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip"


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_sources_pass_through_unchanged(siglip, tokenizer_folder, tmp_path, tied):
    """from_hf → to_hf → transformers holds the very tensors of the two sources."""
    text = save_qwen3(tmp_path / "qwen3", tied=tied)
    params, model = from_hf(text=text, vision=siglip, visual_tokens=16)
    assert model.text.rope_theta == 5e6
    assert model.text.tie_embeddings is tied
    assert (model.vision.num_layers, model.vision.num_blocks) == (3, 2)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out", source_vision=siglip)
    out = LlavaForConditionalGeneration.from_pretrained(folder)
    source = Qwen3ForCausalLM.from_pretrained(text, dtype=torch.float32).state_dict()
    assert all(
        torch.equal(value, source[f"model.{key}"]) for key, value in out.model.language_model.state_dict().items()
    )
    assert torch.equal(out.lm_head.weight, source["lm_head.weight"])
    tower = SiglipVisionModel.from_pretrained(siglip).state_dict()
    exported = out.model.vision_tower.state_dict()
    assert exported.keys() == tower.keys()
    assert all(torch.equal(exported[key], value) for key, value in tower.items())


def test_siglip_with_its_text_tower_gives_the_same_tower(siglip, qwen3, tmp_path):
    whole = SiglipModel(
        SiglipConfig(
            text_config=dict(
                hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
            ),
            vision_config=VISION,
        )
    )
    whole.vision_model.load_state_dict(SiglipVisionModel.from_pretrained(siglip).state_dict())
    whole.save_pretrained(tmp_path / "whole")
    a, model_a = from_hf(text=qwen3, vision=siglip, visual_tokens=16)
    b, model_b = from_hf(text=qwen3, vision=tmp_path / "whole", visual_tokens=16)
    assert model_a == model_b
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_projector_is_drawn_from_the_seed(qwen3, siglip):
    def kernel(seed):
        params, _ = from_hf(text=qwen3, vision=siglip, visual_tokens=16, seed=seed)
        assert not params["projector"]["linear_1"]["bias"].any()
        return params["projector"]["linear_1"]["kernel"]

    assert np.array_equal(kernel(1), kernel(1))
    assert not np.array_equal(kernel(1), kernel(2))
    assert kernel(1).std() == pytest.approx(0.02, rel=0.1)


def test_bfloat16_is_kept(qwen3, siglip):
    wide, _ = from_hf(text=qwen3, vision=siglip, visual_tokens=16)
    narrow, _ = from_hf(text=qwen3, vision=siglip, visual_tokens=16, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow)} == {"bfloat16"}
    assert jax.tree.all(  # Qwen3's file is bfloat16, so nothing of it is rounded
        jax.tree.map(lambda a, b: np.array_equal(a, b.astype(np.float32)), wide["text"], narrow["text"])
    )


def test_rope_theta_of_transformers_4_is_read(qwen3, siglip):
    config = json.loads((qwen3 / "config.json").read_text())
    del config["rope_parameters"]
    for extra, expected in (({"rope_theta": 1_000_000}, 1e6), ({"rope_theta": 7e5, "rope_scaling": None}, 7e5)):
        (qwen3 / "config.json").write_text(json.dumps(config | extra))
        assert from_hf(text=qwen3, vision=siglip, visual_tokens=16)[1].text.rope_theta == expected
    (qwen3 / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="rope_theta must be written once, not left out"):
        from_hf(text=qwen3, vision=siglip, visual_tokens=16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "is of Qwen2ForCausalLM; this reads Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "llama"}, "no architecture .*llama"),
        ({"rope_theta": 1e4}, "rope_theta must be written once"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope scaling is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"head_dim": None}, "head_dim must be written as a number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number above 0, not 2.5"),
        ({"architectures": "Qwen2ForCausalLM"}, "is of Qwen2ForCausalLM; this reads"),
        ({"architectures": 5}, "is of 5; this reads"),
        ({"layer_types": 5}, "layer_types"),
        ({"hidden_size": "32"}, "hidden_size must be written as a number, not '32'"),
        ({"hidden_size": float("inf")}, "hidden_size must be a whole number above 0, not inf"),
        ({"vocab_size": -4}, "vocab_size must be a whole number above 0, not -4"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0, not nan"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be a whole number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false' is not supported"),
        ({"rope_scaling": "yarn"}, "rope scaling is not supported"),
        ({"rope_parameters": "x"}, "rope_parameters is no group of settings but 'x'"),
        ({"rope_parameters": {"type": "yarn", "rope_theta": 1e6}}, "rope scaling is not supported"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta must be written as a number, not '1e6'"),
        ({"rope_parameters": {"rope_theta": True}}, "rope_theta must be written as a number, not True"),
        ({"rope_parameters": {"rope_theta": -5}}, "rope_theta must be a number above 0, not -5"),
        ({"intermediate_size": 64}, r"gate_proj.weight \[48, 32\] instead of \[64, 32\]"),
        ({"num_hidden_layers": 3}, "11 missing: model.layers.2"),
        ({"num_hidden_layers": 1}, "11 not known: model.layers.1"),
        ({"tie_word_embeddings": False}, "1 missing: lm_head.weight"),
    ],
)
def test_text_configurations_that_do_not_fit_are_refused(qwen3, siglip, values, message):
    edit_json(qwen3 / "config.json", **values)
    with pytest.raises(UserError, match=message) as raised:
        from_hf(text=qwen3, vision=siglip, visual_tokens=16)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["CLIPVisionModel"]}, "is of CLIPVisionModel"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"architectures": ["SiglipModel"], "vision_config": "x"}, "vision_config is no group of settings but 'x'"),
        ({"num_channels": 1}, "num_channels 1 is not supported"),
        ({"image_size": None}, "image_size must be written"),
        ({"num_attention_heads": 5}, "multiple of vision.num_heads"),
    ],
)
def test_vision_configurations_that_do_not_fit_are_refused(qwen3, siglip, values, message):
    edit_json(siglip / "config.json", **values)
    with pytest.raises(UserError, match=message):
        from_hf(text=qwen3, vision=siglip, visual_tokens=16)


def test_published_siglip_configuration_needs_no_more(qwen3, siglip):
    """The so400m file has no hidden_act, layer_norm_eps or num_channels."""
    values = json.loads((siglip / "config.json").read_text())
    for name in ("hidden_act", "layer_norm_eps", "num_channels"):
        del values[name]
    (siglip / "config.json").write_text(json.dumps(values))
    vision = from_hf(text=qwen3, vision=siglip, visual_tokens=16)[1].vision
    assert (vision.activation, vision.norm_eps) == ("gelu_tanh", 1e-6)


def test_a_copy_of_the_embedding_as_output_matrix(qwen3, siglip):
    """Published tied files repeat the embedding; a different matrix there is an error, not a loss."""
    edit_weights(qwen3, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    from_hf(text=qwen3, vision=siglip, visual_tokens=16)
    edit_weights(qwen3, lambda t: t["lm_head.weight"][0, 0].add_(1))
    with pytest.raises(UserError, match=r"ties the embeddings, but lm_head.weight is another matrix"):
        from_hf(text=qwen3, vision=siglip, visual_tokens=16)


def test_all_faults_of_a_file_come_at_once(qwen3, siglip):
    def change(tensors):
        del tensors["model.layers.0.self_attn.q_norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.norm.weight"] = torch.zeros(33)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)

    edit_weights(qwen3, change)
    with pytest.raises(UserError) as raised:
        from_hf(text=qwen3, vision=siglip, visual_tokens=16)
    for part in ("q_norm.weight", "q_proj.bias", "model.norm.weight [33] instead of [32]", "up_proj.weight I8"):
        assert part in str(raised.value)


def test_pickles_are_refused(qwen3, siglip):
    (qwen3 / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(qwen3 / "exploded"),)

    (qwen3 / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"only pickles \(pytorch_model.bin\).*give safetensors.*save_pretrained"):
        from_hf(text=qwen3, vision=siglip, visual_tokens=16)
    assert not (qwen3 / "exploded").exists()


@pytest.fixture
def llava(model, make_params, tokenizer_folder, tmp_path):
    """A sharded export."""
    return to_hf(make_params(model), model, tokenizer_folder, tmp_path / "llava", shard_bytes=100_000)


FIRST, SECOND = "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"


def index_of(folder):
    return folder / "model.safetensors.index.json"


def test_a_missing_index_is_refused(llava):
    index_of(llava).unlink()
    with pytest.raises(UserError, match=r"index.json is missing"):
        from_llava(llava)


def test_an_index_that_names_an_absent_file(llava):
    (llava / FIRST).unlink()
    with pytest.raises(UserError, match=f"{FIRST} is missing"):
        from_llava(llava)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/tmp/x.safetensors", "a\\b.safetensors", "model.bin", ""])
def test_an_index_must_stay_in_its_folder(llava, name):
    shutil.copy(llava / FIRST, llava.parent / "secret.safetensors")
    values = json.loads(index_of(llava).read_text())
    key = next(k for k, v in values["weight_map"].items() if v == FIRST)
    values["weight_map"][key] = name
    index_of(llava).write_text(json.dumps(values))
    with pytest.raises(UserError, match="not a safetensors file of that folder"):
        from_llava(llava)


def test_an_index_that_disagrees_with_its_shards(llava):
    values = json.loads(index_of(llava).read_text())
    key = next(k for k, v in values["weight_map"].items() if v == FIRST)
    values["weight_map"][key] = SECOND
    index_of(llava).write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"disagree on {key}"):
        from_llava(llava)


def test_a_single_file_beside_shards_is_not_passed_over(llava):
    """transformers would take the file, we the shards: two models in one folder."""
    shutil.copy(llava / FIRST, llava / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model.safetensors beside shards, and .*index.json does not name it"):
        from_llava(llava)


def test_faults_of_several_shards_come_together(llava):
    """Two cut files, and two tensors that are in two files each."""
    first, third = load_file(llava / FIRST), "model-00003-of-00004.safetensors"
    twice = sorted(first)[:2]
    save_file(load_file(llava / SECOND) | {key: first[key] for key in twice}, llava / SECOND, {"format": "pt"})
    fourth = third.replace("3-of", "4-of")
    for name in (third, fourth):
        (llava / name).write_bytes((llava / name).read_bytes()[:-1])
    with pytest.raises(UserError) as raised:
        from_llava(llava)
    for words in (f"{third} is cut", f"{fourth} is cut", *(f"{key} is in {FIRST} and in {SECOND}" for key in twice)):
        assert words in str(raised.value)


def test_the_links_of_a_hub_cache_are_followed(llava):
    """There every file is a link to ../../blobs/HASH: what may not leave the folder is what an index names."""
    plain, (blobs, snapshot) = from_llava(llava), (llava.parent / "blobs", llava.parent / "snapshots/main")
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(llava.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert jax.tree.all(jax.tree.map(np.array_equal, from_llava(snapshot)[0], plain[0]))


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "[" * 100_000, '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'],
    ids=lambda content: content[:20],
)
def test_a_damaged_index(llava, content):
    index_of(llava).write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        from_llava(llava)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_cut_shard_is_named(llava, keep):
    shard = llava / SECOND
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{SECOND} is cut or damaged"):
        from_llava(llava)


def test_a_shard_without_permission_is_not_called_damaged(llava, monkeypatch):
    """The refusal is simulated: root, as whom tests may run, reads everything."""
    opens = Path.open

    def refuse(path, *arguments, **options):
        if path.name == SECOND:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opens(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=f"{SECOND} cannot be read: Permission denied"):
        from_llava(llava)


def test_a_huge_header_is_refused(llava):
    shard = llava / SECOND
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    with pytest.raises(UserError, match="cut or damaged"):
        from_llava(llava)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "is of Qwen3ForCausalLM; this reads LlavaForConditionalGeneration"),
        ({"architectures": "LlavaNextForConditionalGeneration"}, "is of LlavaNextForConditionalGeneration; this reads"),
        ({"model_type": "llava_onevision"}, "model_type 'llava_onevision' is not supported, only 'llava'"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy 'default'"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer must be one number"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias False"),
        ({"image_seq_length": 4}, "not the tower's 16 patches"),
        ({"text_config": None}, "text_config is missing"),
    ],
)
def test_llava_configurations_that_do_not_fit_are_refused(llava, values, message):
    edit_json(llava / "config.json", **values)
    with pytest.raises(UserError, match=message):
        from_llava(llava)


def test_no_folder_and_no_configuration(tmp_path):
    with pytest.raises(UserError, match=r"config.json is missing"):
        from_llava(tmp_path / "nowhere")


def test_a_llava_that_transformers_saved_is_read(llava, tmp_path):
    """save_pretrained writes another spelling (no `vision_model.`); the numbers are the same."""
    LlavaForConditionalGeneration.from_pretrained(llava).save_pretrained(tmp_path / "saved")
    ours, model = from_llava(llava)
    theirs, their_model = from_llava(tmp_path / "saved")
    assert model == their_model
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
