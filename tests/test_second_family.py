"""A family of one file (tests/two_sizes.py) goes through everything: data, training, replies, export, proof, plan."""

import dataclasses
import io
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from data_prep.tokenizer import make_tokenizer
from infimed_jax import config
from infimed_jax.config import Config, Data, Optimizer, Train
from infimed_jax.cost.chips import parse_topology
from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.data.storage import write_samples
from infimed_jax.errors import Interrupted, UserError
from infimed_jax.hf.import_ import open_export
from infimed_jax.hf.names import leaf_shapes
from infimed_jax.hf.verify import verify
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.models.lora import adapted
from infimed_jax.models.params import abstract_params
from infimed_jax.plan.cell import counted
from infimed_jax.plan.table import heading
from infimed_jax.runs.metrics import read_metrics
from infimed_jax.runs.parameters import open_params
from infimed_jax.sampling.policy import Policy
from infimed_jax.train.stage import train
from infimed_jax.trees import flatten, nest
from launch.run import main
from tests.hf.reading import to_hf
from tests.tiny import one_device

FAMILY = str(Path(__file__).with_name("two_sizes.py"))
MODEL = config.model_class(FAMILY)(family=FAMILY)
SIZES = ((16, 16), (16, 40), (30, 20), (12, 24))
"""(height, width); every second one is wide, so of eight visual tokens instead of four."""


def _image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[number % 4], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _samples(count: int) -> list[Chat]:
    answers = ("yes", "no", "left lung", "the heart is large")
    samples = []
    for n in range(count):
        shown = (0, "<image_2>: ", 1) if n % 3 == 0 else (0,)
        turns = (Turn("user", (*shown, f"\nwhat is {n}?")), Turn("assistant", (answers[n % 4],)))
        images = tuple(_image(n + k) for k in range(2 if n % 3 == 0 else 1))
        samples.append(Chat(f"toy/train/{n}", "toy", "train", images, turns))
    return samples


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("two_sizes")
    texts = ["what is the heart? the heart is large", "left lung: yes no", "image"] * 3
    tokenizer = make_tokenizer(texts, folder / "tokenizer", vocab_size=330)
    write_samples(folder / "data", _samples(12), name="toy")
    return Config(
        model=MODEL,
        data=Data(dataset=str(folder / "data"), tokenizer=str(tokenizer), context=96, images_per_row=3),
        optimizer=Optimizer(learning_rate=1e-2),
        train=Train(
            train=("vision", "text"), global_batch=2, steps=24, checkpoint_every=8, compute_dtype="float32",
            remat="none", logit_chunk=32, output=str(folder / "run"),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(cfg):
    return train(cfg)


def _with(cfg: Config, **settings) -> Config:
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **settings))


def test_the_loss_falls_and_resuming_is_exact(cfg, trained, tmp_path):
    assert trained.loss_last < 0.5 * trained.loss_first
    again = _with(cfg, output=str(tmp_path / "run"))
    with pytest.raises(Interrupted, match="stopped after step 11 of"):
        train(again, on_step=lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == 10 else None)
    resumed = train(again)
    losses = {row["step"]: row["loss"] for row in read_metrics(Path(again.train.output))}
    assert losses == {row["step"]: row["loss"] for row in read_metrics(Path(cfg.train.output))}
    for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(trained.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_replies_are_what_the_training_graph_predicts(cfg, trained):
    """Images of both sizes in one batch of prompts; positions go on where the prompt's axes end."""
    policy = Policy.open(cfg.train.output)
    prompts = policy.prompts(_samples(6), reasoning=False)
    assert {int(prompt.visual.sum()) for prompt in prompts} == {4, 8, 12}
    replies = policy.answer(prompts, config.Sampling(temperature=0, max_tokens=6), jax.random.key(0))
    compute = Compute("float32", "none", "xla", 32)
    with jax.set_mesh(policy.mesh):
        params = jax.device_put(trained.params)
        for prompt, reply in zip(prompts, replies, strict=True):
            n = len(reply.tokens)
            tokens = np.concatenate([prompt.tokens, reply.tokens]).astype(np.int32)
            visual = np.concatenate([prompt.visual, np.zeros(n, bool)])
            whole = Segment(tokens, np.zeros(len(tokens), np.float32), visual, prompt.pixels)
            batch = stack_rows([build_row([whole], context=96, images=2, model=cfg.model)])
            hidden = forward.hidden_states(params, batch, cfg.model, compute)
            logits = np.array(forward.logits(params, hidden, cfg.model, compute))[0, len(prompt) - 1 :][:n]
            logits[:, list(policy.tokenizer.unsampled(cfg.model.vocab_size))] = -np.inf
            assert logits.argmax(-1).tolist() == reply.tokens.tolist()


@pytest.fixture(scope="module")
def exported(cfg, trained, tmp_path_factory):
    params, _ = open_params(cfg.train.output)
    return to_hf(params, cfg.model, cfg.data.tokenizer, tmp_path_factory.mktemp("hf") / "out")


def test_the_export_is_fused_and_transposed_and_comes_back(cfg, exported):
    stored = load_file(exported / "model.safetensors")
    params, _ = open_params(cfg.train.output)
    ours = flatten(jax.tree.map(np.asarray, dict(params)))
    q, k, v = (ours[f"text.layers.{name}_proj.kernel"][1].reshape(32, -1).T for name in "qkv")
    np.testing.assert_array_equal(stored["model.layers.1.qkv.weight"], np.concatenate([q, k, v]))
    np.testing.assert_array_equal(stored["model.embed.weight"], ours["text.embed"].T)
    np.testing.assert_array_equal(stored["lm_head.weight"], ours["text.head"].T)
    assert len(stored) == 2 + 1 + 2 * 6 + 1 + 1
    opened = open_export(exported, family=FAMILY)
    assert opened.model == cfg.model
    back = dict(opened.leaves())
    assert back.keys() == ours.keys() and all(np.array_equal(back[path], ours[path]) for path in ours)


def test_an_export_answers_as_its_checkpoint_and_is_imported_by_the_command(cfg, exported, tmp_path):
    policies = (
        Policy.open(cfg.train.output),
        Policy.open(exported, [f"model.family={FAMILY}", "train.compute_dtype=float32"]),
    )
    answered = [
        policy.answer(
            policy.prompts(_samples(3), reasoning=False),
            config.Sampling(temperature=0, max_tokens=4),
            jax.random.key(0),
        )
        for policy in policies
    ]
    for a, b in zip(*answered, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
    checkpoint = tmp_path / "imported"
    options = ["--llava", str(exported), "--family", FAMILY, "--output", str(checkpoint), "--dtype", "float32"]
    assert main(["convert", "from-hf", *options]) == 0
    imported, metadata = open_params(checkpoint)
    assert config.from_dict(Config, metadata["config"]).model == cfg.model
    ours, _ = open_params(cfg.train.output)
    jax.tree.map(np.testing.assert_array_equal, dict(imported), dict(ours))


def test_matching_a_fused_tensor_is_strict(cfg, exported, tmp_path):
    stored = load_file(exported / "model.safetensors")
    folder = tmp_path / "wrong"
    shutil.copytree(exported, folder)
    stored["model.layers.0.qkv.weight"] = stored["model.layers.0.qkv.weight"][:-1].copy()
    stored["model.layers.1.q_proj.weight"] = stored.pop("model.layers.1.qkv.weight")
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        open_export(folder, family=FAMILY)
    for words in (
        "1 not known: model.layers.1.q_proj.weight",
        "model.layers.0.qkv.weight [127, 32] instead of [128, 32]",
        "1 missing: model.layers.1.qkv.weight",
    ):
        assert words in str(error.value)


def test_verify_compares_it_with_torch(cfg, exported):
    params, _ = open_params(cfg.train.output)
    result = verify(params, cfg.model, exported, cfg.data.tokenizer, _samples(4))
    assert result["status"] == "passed", result["failures"]
    assert [case["images"] for case in result["cases"]] == [2, 1, 1, 2]
    assert all(case.keys() >= {"pixels", "vision", "logits"} for case in result["cases"])
    one_off = dict(flatten(jax.tree.map(np.asarray, dict(params))))
    one_off["text.layers.v_proj.kernel"] = one_off["text.layers.v_proj.kernel"] * 1.1
    assert verify(nest(one_off), cfg.model, exported, cfg.data.tokenizer, _samples(2))["status"] == "failed"


def test_plan_counts_it(cfg):
    planned = counted(_with(cfg, remat="full", global_batch=8), parse_topology("v5p:2x2x1"), config.Mesh(1, -1, 1))
    with one_device():
        sizes = {path: leaf.size for path, leaf in flatten(dict(abstract_params(cfg.model))).items()}
    assert planned["parameters"]["total"] == sum(sizes.values())
    counts = {part: sum(size for path, size in sizes.items() if path.split(".")[0] == part) for part in cfg.model.PARTS}
    assert all(f"{part} {count:,}" in heading(planned) for part, count in counts.items())
    assert leaf_shapes(cfg.model).keys() == sizes.keys()
    assert planned["memory"]["batch"] == 2 * (96 * 4 * (5 - 1 + 3) + 3 * (8 * 48 + 2 * 4))


def test_adapters_go_to_linear_layers_that_it_has(cfg):
    with pytest.raises(
        UserError, match=r"train.lora.targets: 'gate_proj' is none of the model's q_proj, k_proj, .*; did you mean"
    ):
        adapted(cfg.model, config.Lora(rank=2))
    own = ("up_proj", "q_proj")
    assert tuple(weight.module for weight in adapted(cfg.model, config.Lora(rank=2, targets=own))) == own
