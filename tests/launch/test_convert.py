"""`convert` from the shell: released folders in, every stage's checkpoint out, and what a mistake looks like."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipVisionModel

from data_prep.tokenizer import make_tokenizer
from infimed_jax.errors import UserError
from infimed_jax.runs.checkpoint import find_checkpoint, open_checkpoint
from infimed_jax.runs.parameters import load_params
from tests.hf.reading import from_hf
from tests.launch.hf_sources import PATCHES, command, write_datasets, write_sources

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("import", "pretrain", "sft", "lora", "grpo")


def equal(a, b) -> bool:
    """Same tree, types and bits."""
    one, two = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
    return len(one) == len(two) and all(
        path == other
        and np.asarray(x).dtype == np.asarray(y).dtype
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for (path, x), (other, y) in zip(one, two, strict=True)
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def stages(sources, tmp_path_factory):
    """Folder of each stage: import, then one or two steps of pretraining (pooled), tuning (also LoRA) and GRPO."""
    folder = tmp_path_factory.mktemp("stages")
    text, vision = sources
    assert command("convert", "from-hf", "--text", text, "--vision", vision, "--output", folder / "import",
                   "--visual-tokens", 4) == 0  # fmt: skip
    documents, questions = write_datasets(folder)
    model = json.loads((folder / "import.json").read_text())["model"]
    assert model.pop("family") == "infimed"
    settings = [f"model.{part}.{name}={value}" for part in model for name, value in model[part].items()]
    settings += [f"data.tokenizer={text}", "data.context=128", "data.images_per_row=2", "train.compute_dtype=float32"]
    settings += ["train.remat=none", "train.logit_chunk=32", "train.global_batch=2", "train.train=[projector,text]"]
    settings += ["optimizer.warmup_fraction=0", "optimizer.learning_rate=0.01"]

    def run(kind, name, previous, *more):
        output = [f"train.stage={name}", f"train.output={folder / name}", f"train.init_from={folder / previous}"]
        assert command(kind, *settings, *output, *more) == 0

    run("train", "pretrain", "import", f"data.dataset={documents}", "train.steps=1")
    run("train", "sft", "pretrain", f"data.dataset={questions}", "train.steps=2", "model.projector.visual_tokens=16")
    run("train", "lora", "sft", f"data.dataset={questions}", "train.steps=1", "model.projector.visual_tokens=16",
        "train.lora.rank=2")  # fmt: skip
    run("grpo", "grpo", "sft", f"data.dataset={questions}", "model.projector.visual_tokens=16", "grpo.steps=1",
        "grpo.prompts=2", "grpo.update_prompts=2", "grpo.group_size=2", "grpo.max_prompt=100", "grpo.max_response=4",
        "sampling.slots=4", "sampling.burst=4")  # fmt: skip
    return folder


def test_an_import_is_the_sources_in_bfloat16(sources, stages):
    text, vision = sources
    params, metadata = load_params(stages / "import")
    expected, model = from_hf(text=text, vision=vision, visual_tokens=4, dtype="bfloat16")
    assert equal(params, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert metadata["config"]["model"]["text"]["rope_theta"] == model.text.rope_theta == 5e6
    (entry,) = metadata["history"]
    assert entry["max_positions"] == 1234 and entry["fresh_projector_seed"] == 0
    assert sum(map(len, entry["dropped"].values())) == 3  # the last block, the final norm, the head
    assert json.loads((stages / "import.json").read_text())["parameters"]["total"] == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    assert sorted(p.name for p in stages.iterdir() if "import" in p.name) == ["import", "import.json"]


def test_an_import_keeps_its_tokenizer(sources, stages, tmp_path):
    moved = shutil.copytree(stages / "import", tmp_path / "import")
    kept = Path(load_params(moved)[1]["config"]["data"]["tokenizer"])
    assert kept == moved / "tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (kept / name).read_bytes() == (sources[0] / name).read_bytes()


def test_training_starts_from_it_in_float32(stages):
    """One step at a learning rate that moves every part: what did not learn is still the import's bits."""
    trained, before = load_params(stages / "pretrain")[0], load_params(stages / "import")[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained["text"])} == {"float32"}
    frozen = jax.tree.map(lambda leaf: leaf.astype(np.float32), before["vision"])
    assert equal(trained["vision"], frozen)
    assert not np.array_equal(trained["text"]["lm_head"], before["text"]["lm_head"].astype(np.float32))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_comes_back_bit_for_bit(stages, tmp_path, stage):
    pooled = stage in ("import", "pretrain")
    more = ["--visual-tokens", PATCHES] if pooled else []
    assert command("convert", "to-hf", "--checkpoint", stages / stage, "--output", tmp_path / "hf", "--dtype",
                   "float32", *more) == 0  # fmt: skip
    assert command("convert", "from-hf", "--llava", tmp_path / "hf", "--output", tmp_path / "back", "--dtype",
                   "float32") == 0  # fmt: skip
    params, _ = load_params(stages / stage)
    assert equal(load_params(tmp_path / "back")[0], jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


def test_a_pooled_checkpoint_is_refused_with_the_reason(stages, tmp_path, capsys):
    assert command("convert", "to-hf", "--checkpoint", stages / "pretrain", "--output", tmp_path / "hf") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pools to 4 visual tokens" in line and "no pooling" in line and "--visual-tokens 16" in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def export(sources, stages, tmp_path_factory):
    """The aligned model in bfloat16, with the tower's spare tensors, and an evaluation's result."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "phantom").mkdir()
    summary = {"accuracy": 0.5, "interval": [0.4, 0.6], "n": 1200, "protocol": "strict", "reasoning": True}
    (folder / "phantom/summary.json").write_text(json.dumps(summary))
    assert command("convert", "to-hf", "--checkpoint", stages / "grpo", "--output", folder / "hf", "--vision",
                   sources[1], "--evaluation", folder / "phantom") == 0  # fmt: skip
    return folder / "hf"


def test_transformers_loads_the_export_without_remote_code(sources, export):
    model, loading = AutoModelForImageTextToText.from_pretrained(export, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.image_seq_length == PATCHES and model.config.vision_feature_layer == -2
    assert model.config.text_config.max_position_embeddings == 1234
    assert model.dtype == torch.bfloat16
    tower, source = model.model.vision_tower.state_dict(), SiglipVisionModel.from_pretrained(sources[1]).state_dict()
    assert tower.keys() == source.keys()
    assert all(torch.equal(tower[key], source[key].to(torch.bfloat16)) for key in source)
    assert type(AutoProcessor.from_pretrained(export)).__name__ == "LlavaProcessor"
    assert json.loads((export / "export.json").read_text())["initialised"] == []


def test_the_card_says_where_the_model_comes_from(export):
    card = (export / "README.md").read_text()
    for words in (
        "Qwen3-tiny (Qwen3ForCausalLM, text weights): licence apache-2.0",
        "siglip-tiny (SiglipVisionModel, vision weights): licence not stated",
        "- pretrain: 1 steps, 2 rows of at most 128 tokens a step; learning rate 0.01; 4 visual tokens",
        "- sft: 2 steps",
        "- grpo: 1 steps, GRPO, 2 prompts of 2 completions a step",
        "| open | CC BY 4.0 | yes |",
        "| closed | CC BY-NC 4.0 | no |",
        "Not for commercial use, because of the training data: closed; and of the base models: siglip-tiny.",
        "phantom (strict, with reasoning): 50.0% [40.0%, 60.0%], n = 1,200",
        "must not be used for diagnosis",
    ):
        assert words in card, words


def test_a_checkpoint_alone_tells_its_whole_chain(stages, export, tmp_path):
    """Moved away from its run, with the runs before and all data gone; only its tokenizer is then asked for."""
    moved = shutil.copytree(find_checkpoint(stages / "grpo"), tmp_path / "checkpoint")
    os.rename(stages, stages.with_name("elsewhere"))
    try:
        tokenizer = open_checkpoint(moved).metadata["config"]["data"]["tokenizer"]
        assert (
            command("convert", "to-hf", "--checkpoint", moved, "--output", tmp_path / "hf", "--tokenizer", tokenizer)
            == 0
        )
    finally:
        os.rename(stages.with_name("elsewhere"), stages)
    assert _facts(tmp_path / "hf/README.md") == _facts(export / "README.md")


def test_a_history_outlives_the_way_through_hugging_face(export, tmp_path):
    """Else a model that learnt from non-commercial data would come back as one that may be sold."""
    for source, back, again in ((export, "ckpt", "hf"), (tmp_path / "hf", "ckpt2", "hf2")):
        assert command("convert", "from-hf", "--llava", source, "--output", tmp_path / back) == 0
        assert command("convert", "to-hf", "--checkpoint", tmp_path / back, "--output", tmp_path / again) == 0
        text = (tmp_path / again / "README.md").read_text()
        assert _facts(tmp_path / again / "README.md") == _facts(export / "README.md")
        assert "because of the training data: closed; and of the base models: siglip-tiny." in text
        assert "Qwen3-tiny (Qwen3ForCausalLM, text weights): licence apache-2.0" in text
        assert "# InfiMed model, imported" in text and "None was measured" in text


def test_an_export_whose_history_was_edited_is_refused(export, tmp_path, capsys):
    shutil.copytree(export, tmp_path / "hf")
    (tmp_path / "hf/export.json").write_text('{"card": {"stages": []}}')
    assert command("convert", "from-hf", "--llava", tmp_path / "hf", "--output", tmp_path / "ckpt") == 2
    assert "export.json is not as to-hf wrote it: move it away" in capsys.readouterr().err
    assert not (tmp_path / "ckpt").exists()


def _facts(card):
    """The card's stages and sources."""
    return [line for line in card.read_text().splitlines() if line.startswith(("- pretrain", "- sft", "- grpo", "| "))]


def test_adapters_for_peft(sources, stages, tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    asked = ("convert", "to-hf", "--lora", "peft", "--vision", sources[1], "--output", tmp_path / "hf", "--checkpoint")
    assert command(*asked, stages / "sft") == 2
    assert "sft holds no adapters (train.lora.rank is 0): leave out --lora peft" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert command(*asked, stages / "lora") == 0
    assert sorted(file.name for file in (tmp_path / "hf/adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "the text model by LoRA adapters of rank 2" in (tmp_path / "hf/README.md").read_text()
    assert command("convert", "verify", "--checkpoint", stages / "lora", "--hf", tmp_path / "hf") == 0
    assert "peft" in json.loads((tmp_path / "hf/verify.json").read_text())["versions"]


def test_verify_passes_and_says_so(stages, export, capsys):
    assert command("convert", "verify", "--checkpoint", stages / "grpo", "--hf", export) == 0
    assert "passed" in capsys.readouterr().out
    result = json.loads((export / "verify.json").read_text())
    assert [case["images"] for case in result["cases"]] == [0, 1, 3]
    for case in result["cases"]:
        assert {"max_abs", "mean_abs", "kl_mean", "kl_max", "top1_agreement"} <= case["logits"].keys()


def test_verify_of_another_model_exits_with_1(stages, export, tmp_path, capsys):
    shutil.copytree(export, tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["language_model.model.layers.0.mlp.up_proj.weight"][3, 5] += 1
    save_file(weights, tmp_path / "hf/model.safetensors", {"format": "pt"})
    assert command("convert", "verify", "--checkpoint", stages / "grpo", "--hf", tmp_path / "hf") == 1
    assert "FAILED  verify/text: logits differ" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf/verify.json").read_text())["status"] == "failed"
    values = json.loads((export / "config.json").read_text())
    values["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "hf/config.json").write_text(json.dumps(values))
    assert command("convert", "verify", "--checkpoint", stages / "grpo", "--hf", tmp_path / "hf") == 1
    assert "text.num_layers is 2, config.json says 3" in capsys.readouterr().out


def _spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how in ("absent", "outside"):
        name = {"absent": "gone.safetensors", "outside": "../model.safetensors"}[how]
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    elif how == "architecture":
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"architectures": ["LlamaForCausalLM"]}))
    elif how == "tensors":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        tensors["extra.weight"] = torch.zeros(1)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int32)
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("pickle", ("pytorch_model.bin", "safetensors", "save_pretrained")),
        ("cut", ("model.safetensors", "cut or damaged")),
        ("absent", ("gone.safetensors", "missing")),
        ("outside", ("../model.safetensors", "not a safetensors file of that folder")),
        ("architecture", ("LlamaForCausalLM", "Qwen3ForCausalLM")),
        (
            "tensors",
            ("1 missing: model.norm.weight", "1 not known: extra.weight", "layers.0.mlp.up_proj.weight [2, 2]",
             "layers.1.mlp.up_proj.weight I32"),
        ),
    ],
)  # fmt: skip
def test_a_bad_source_is_one_line_and_leaves_nothing(sources, tmp_path, capsys, how, words):
    text, vision = sources
    shutil.copytree(text, tmp_path / "text")
    _spoil(tmp_path / "text", how)
    out = tmp_path / "out"
    code = command("convert", "from-hf", "--text", tmp_path / "text", "--vision", vision, "--output", out / "ckpt",
                   "--visual-tokens", 4)  # fmt: skip
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and line.startswith("error: ") and all(word in line for word in words), line
    assert not out.exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(sources, tmp_path, capsys):
    text, vision = sources
    make_tokenizer([f"{a}{b}{c} " * 4 for a in "abcdefg" for b in "hijklm" for c in "nopqrs"], tmp_path / "large", 900)
    assert command("convert", "from-hf", "--text", text, "--vision", vision, "--output", tmp_path / "ckpt",
                   "--visual-tokens", 4, "--tokenizer", tmp_path / "large") == 2  # fmt: skip
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the model's vocab_size is 448: name the model's own by --tokenizer" in line
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("number", [0, -4, 10])
def test_visual_tokens_must_be_a_square(sources, tmp_path, capsys, number):
    text, vision = sources
    assert command("convert", "from-hf", "--text", text, "--vision", vision, "--output", tmp_path / "ckpt",
                   "--visual-tokens", number) == 2  # fmt: skip
    assert f"visual_tokens must be a square number, not {number}" in capsys.readouterr().err


def test_faults_of_both_sources_come_together(sources, tmp_path, capsys):
    text, vision = (shutil.copytree(source, tmp_path / source.name) for source in sources)
    for folder, key in ((text, "model.norm.weight"), (vision, "post_layernorm.weight")):
        tensors = load_file(folder / "model.safetensors")
        tensors |= {f"{key}.copy": tensors[next(k for k in tensors if k.endswith(key))].clone()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert command("convert", "from-hf", "--text", text, "--vision", vision, "--output", tmp_path / "ckpt",
                   "--visual-tokens", 4) == 2  # fmt: skip
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "model.norm.weight.copy" in line and "post_layernorm.weight.copy" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "a"), "give --text and --vision, or --llava alone"),
        (("--text", "a", "--vision", "b", "--llava", "c"), "or --llava alone"),
        (("--llava", "/no/such"), "/no/such/config.json is missing"),
        (("--text", "a", "--vision", "b", "--seed", "-1"), "--seed must not be negative"),
        (("--llava", "a", "--seed", "1"), "--llava brings its own"),
    ],
)
def test_what_to_read_must_be_said(tmp_path, capsys, arguments, words):
    assert command("convert", "from-hf", *arguments, "--output", tmp_path / "ckpt") == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


CHILD = """
import os, resource, signal, sys
from infimed_jax.runs import parameters
from launch import run

mode, save, count = sys.argv[1], parameters.ocp.partial.save, 0

def slow(*arguments, **options):
    global count
    count += 1
    if count == 9:
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    return save(*arguments, **options)

parameters.ocp.partial.save = slow
sys.exit(run.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("mode", ["kill", "full"])
def test_an_import_that_is_stopped_leaves_no_checkpoint(sources, tmp_path, mode):
    text, vision = sources
    output = tmp_path / "ckpt"
    arguments = ["convert", "from-hf", "--text", text, "--vision", vision, "--output", output, "--visual-tokens", 4]
    child = [sys.executable, "-c", CHILD, mode, *map(str, arguments)]
    ended = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    with pytest.raises(UserError):
        load_params(output)
    if mode == "kill":
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert any(tmp_path.iterdir())  # it was in the middle
    else:
        assert ended.returncode == 2, ended.stderr
        (line,) = ended.stderr.strip().splitlines()
        assert f"parameters in {output} were not written: file too large" in line
        assert list(tmp_path.iterdir()) == []
    assert command(*arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "ckpt.json"]
    assert re.fullmatch("import", load_params(output)[1]["history"][0]["stage"])


def test_a_full_disk_stops_an_export_without_a_trace(stages, tmp_path, capsys):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        code = command("convert", "to-hf", "--checkpoint", stages / "sft", "--output", tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and "cannot write" in line and str(tmp_path / "hf") in line
    assert list(tmp_path.iterdir()) == []
