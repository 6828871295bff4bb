"""Whole runs on a toy model: what is left on the disk, exact resume in new processes, stops, and refusals."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

from data_prep.steps.copy import copy_dataset
from data_prep.steps.mix import Part, mix
from data_prep.tokenizer import make_tokenizer
from infimed_jax import config
from infimed_jax.config import Config, ConfigError
from infimed_jax.data.batch import build_row, stack_rows
from infimed_jax.data.chat import load_tokenizer, render
from infimed_jax.data.loader import Loader, make_loader
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import Interrupted, UserError
from infimed_jax.models.infimed import config as infimed
from infimed_jax.models.params import init_params
from infimed_jax.rl.grpo import grpo
from infimed_jax.runs import checkpoint
from infimed_jax.runs.checkpoint import keep_tokenizer
from infimed_jax.runs.metrics import read_metrics
from infimed_jax.runs.parameters import load_params, save_params
from infimed_jax.sharding import make_mesh
from infimed_jax.train import stage as stages
from infimed_jax.train.stage import describe_row, mean_loss, train

ROOT = Path(__file__).resolve().parents[2]


def _losses(folder: str | Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder)]


def _loader(cfg: Config) -> Loader:
    samples, tokenizer = open_samples(cfg.data.dataset), load_tokenizer(cfg.data.tokenizer)
    return make_loader(cfg, samples=samples, tokenizer=tokenizer, mesh=make_mesh(cfg.mesh))


def _assert_same(left, right) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def _with_train(cfg: Config, **changes) -> Config:
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **changes))


def test_a_run_leaves_its_configuration_metrics_result_and_parameters(stage):
    cfg = stage()
    seen = []
    jax.clear_caches()  # a step that an earlier test has compiled would cost this one no time
    result = train(cfg, on_step=lambda step, total, row: seen.append((step, total, row["loss"])))
    folder = Path(cfg.train.output)
    rows = read_metrics(folder)
    assert seen == [(row["step"], 7, row["loss"]) for row in rows] == [(n, 7, r["loss"]) for n, r in enumerate(rows, 1)]
    assert config.from_dict(Config, yaml.safe_load((folder / "config.yaml").read_text())) == cfg
    stored = json.loads((folder / "result.json").read_text())
    assert stored == json.loads(json.dumps({k: v for k, v in vars(result).items() if k not in ("params", "history")}))
    assert stored["steps"] == 7 and stored["skipped_updates"] == 0
    assert stored["loss_first"] == rows[0]["loss"] and stored["loss_last"] == rows[-1]["loss"]
    assert stored["tokens"] == sum(row["tokens"] for row in rows) > 0
    assert 0 < stored["compile_seconds"] < stored["seconds"]
    assert all(0 <= row["data_wait_share"] <= 1 and row["images"] > 0 for row in rows)
    assert any((folder / "tensorboard").iterdir())
    assert Image.open(folder / "curve.png").width > 400
    assert stored["samples_per_step"] == sum(row["samples"] for row in rows) / 7
    assert stored["tokens_per_step"] == stored["tokens"] / 7
    assert rows[-1]["seconds_left"] == 0 and all(row["memory_gib"] > 0.05 and row["flops"] > 0 for row in rows)
    assert all("peak_share" not in row for row in rows)  # no peak is known for a CPU
    params, metadata = load_params(folder)
    _assert_same(params, result.params)
    kept = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(folder / "tokenizer")))
    assert metadata["config"] == config.to_dict(kept)
    assert [entry["stage"] for entry in metadata["history"]] == ["sft"]


def test_a_finished_run_is_not_run_again(stage):
    cfg = stage(steps=2)
    first = train(cfg)
    second = train(cfg, on_step=lambda *_: pytest.fail("a step ran"))
    _assert_same(first.params, second.params)
    assert {k: v for k, v in vars(second).items() if k != "params"} == {
        k: v for k, v in vars(first).items() if k != "params"
    }
    (Path(cfg.train.output) / "result.json").unlink()  # as if killed between the last checkpoint and the result
    assert train(cfg, on_step=lambda *_: pytest.fail("a step ran")).loss_last == first.loss_last
    assert (Path(cfg.train.output) / "result.json").exists()


_CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from infimed_jax import config
from infimed_jax.errors import Interrupted
from infimed_jax.train.stage import train

cfg = config.from_dict(config.Config, json.loads(sys.argv[1]))
number, at = int(sys.argv[2]), int(sys.argv[3])

def on_step(step, total, row):
    if step == at:
        while not (Path(cfg.train.output) / "checkpoints/3").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

try:
    train(cfg, on_step=on_step)
except Interrupted as stop:
    print(stop)
    sys.exit(75)
"""


def _child(cfg: Config, number: signal.Signals, at: int, cache: Path) -> subprocess.CompletedProcess:
    """A run in a new process that gets the signal when step `at` is reported."""
    environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # whatever this model takes
    return subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(config.to_dict(cfg)), str(int(number)), str(at)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def _step_programs(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("jit_step-*-cache")}


@pytest.mark.timeout(600)
def test_a_killed_and_a_stopped_run_continue_bit_for_bit_in_new_processes(stage, tmp_path: Path):
    """Three steps an epoch, a checkpoint every three: the kill resumes at an epoch's edge, the stop within one."""
    whole = stage(steps=8, count=6, output=str(tmp_path / "whole"))
    assert _loader(whole).steps_per_epoch == 3
    parts = _with_train(whole, output=str(tmp_path / "parts"))
    expected = train(whole)
    killed = _child(parts, signal.SIGKILL, 5, tmp_path / "cache")
    assert killed.returncode == -signal.SIGKILL
    compiled = _step_programs(tmp_path / "cache")
    assert compiled
    stopped = _child(parts, signal.SIGTERM, 6, tmp_path / "cache")
    assert stopped.returncode == 75, stopped.stderr
    assert _step_programs(tmp_path / "cache") == compiled, "the second start compiled the step again"
    assert "stopped after step 7 of 8" in stopped.stdout and "the same command continues" in stopped.stdout
    result = train(parts)
    assert _losses(parts.train.output) == _losses(whole.train.output)
    _assert_same(result.params, expected.params)
    assert (result.loss_first, result.loss_last, result.tokens) == (
        expected.loss_first,
        expected.loss_last,
        expected.tokens,
    )


def test_ctrl_c_finishes_the_step_saves_and_gives_the_handlers_back(stage):
    cfg = stage()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 3 of 7"):
        train(cfg, on_step=lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None)
    assert signal.getsignal(signal.SIGINT) is before
    assert train(cfg).steps == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cfg: _with_train(cfg, global_batch=4), "train.global_batch was 2, is 4"),
        (
            lambda cfg: dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, beta2=0.5)),
            "optimizer.beta2 was 0.999, is 0.5",
        ),
    ],
)
def test_another_runs_folder_is_refused_by_what_differs(stage, change, message: str):
    cfg = stage(steps=1)
    train(cfg)
    with pytest.raises(UserError, match=message):
        train(change(cfg))


def test_other_data_is_refused_and_moved_data_is_not(stage, dataset, tmp_path: Path):
    cfg = stage(steps=1)
    train(cfg)
    moved = tmp_path / "elsewhere"
    write_samples(moved, list(open_samples(dataset())), name="toy")
    train(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset=str(moved))))
    with pytest.raises(UserError, match=r"data\.dataset=.* holds other samples"):
        train(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset=str(dataset("question", 11)))))
    other = make_tokenizer(["what else is the heart? yes no"] * 3, tmp_path / "tokenizer", vocab_size=300)
    with pytest.raises(UserError, match=r"data\.tokenizer=.* is another tokenizer"):
        train(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(other))))


def test_moved_runs_go_on_and_are_read_where_they_are(stage, tokenizer_folder, tmp_path: Path, monkeypatch):
    """From disk to disk, with the run before and without the tokenizer's first folder; named by a relative path."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tokenizer_folder, "tokenizer")

    def run_in(folder: str, tokenizer: str, **more) -> Config:
        cfg = stage(output=f"{folder}/second", init_from=f"{folder}/first", checkpoint_every=2, **more)
        return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=tokenizer))

    here = run_in("scratch", "tokenizer")
    train(dataclasses.replace(here, train=dataclasses.replace(here.train, output="scratch/first", init_from="")))
    train(_with_train(here, output="scratch/whole"))
    with pytest.raises(Interrupted):
        train(here, on_step=lambda step, *_: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    os.rename("scratch", "archive")
    os.rename("tokenizer", "gone")
    os.mkdir("work")
    os.chdir("work")
    for name in ("first", "second", "second/checkpoints", "second/checkpoints/4"):
        _, metadata = load_params(f"../archive/{name}")
        kept = load_tokenizer(metadata["config"]["data"]["tokenizer"])
        assert kept.fingerprint == load_tokenizer(tokenizer_folder).fingerprint, name
    moved = run_in("../archive", str(kept.folder))
    train(moved)
    assert _losses("../archive/second") == _losses("../archive/whole")
    with pytest.raises(UserError, match=r"train\.init_from was '\.\./archive/first', is '\.\./archive/whole'; restore"):
        train(_with_train(moved, init_from="../archive/whole"))
    with pytest.raises(UserError, match="no checkpoint at"):
        train(_with_train(moved, init_from="nowhere"))


def test_the_kept_tokenizer_is_the_runs(stage, tokenizer_folder, tmp_path: Path):
    """Not that of a run which ended in the folder before its first checkpoint; what is the same stays."""
    other = load_tokenizer(make_tokenizer(["what else"] * 3, tmp_path / "other", vocab_size=300))
    ours = load_tokenizer(tokenizer_folder)
    for tokenizer in (other, ours):
        keep_tokenizer(tokenizer, tmp_path)
        assert load_tokenizer(tmp_path / "tokenizer").fingerprint == tokenizer.fingerprint
    names = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert names == {path.name for path in tokenizer_folder.iterdir()} and not (tmp_path / ".tokenizer.part").exists()
    (tmp_path / "tokenizer/mine").touch()
    keep_tokenizer(load_tokenizer(tmp_path / "tokenizer"), tmp_path)
    assert (tmp_path / "tokenizer/mine").exists()


def test_samples_that_fit_no_row_are_counted_with_the_advice(stage, caplog):
    cfg = stage(steps=1, kind="question", logit_chunk=16)
    lengths = sorted(_loader(cfg)._reader.index.lengths)
    context = int(lengths[-1]) - 1
    caplog.set_level("INFO")
    train(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, context=context)))
    dropped = sum(length > context for length in lengths)
    assert f"left out: {dropped} too long, to keep what no row holds raise data.context or data.images" in caplog.text


def test_a_run_resumes_between_a_view_and_its_copy(stage, dataset, tmp_path: Path):
    mix([Part(dataset("question", 12), share=0.7)], tmp_path / "view", 1)
    copy_dataset(tmp_path / "view", tmp_path / "copy")
    assert not list((tmp_path / "view").glob("*.array_record*"))

    def cfg(data: str, output: str) -> Config:
        made = stage(steps=6, output=str(tmp_path / output))
        return dataclasses.replace(made, data=dataclasses.replace(made.data, dataset=str(tmp_path / data)))

    whole = train(cfg("view", "whole"))
    for first, second in (("view", "copy"), ("copy", "view")):
        with pytest.raises(Interrupted, match="after step 3 of 6"):
            train(cfg(first, first), on_step=lambda n, *_: os.kill(os.getpid(), signal.SIGINT) if n == 2 else None)
        _assert_same(train(cfg(second, first)).params, whole.params)
        assert _losses(tmp_path / first) == _losses(tmp_path / "whole")


def test_settings_that_change_no_result_may_change_on_resume(stage):
    cfg = stage(steps=3)
    with pytest.raises(Interrupted):
        train(cfg, on_step=lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None)
    train(_with_train(cfg, log_every=1, checkpoint_every=1, keep_checkpoints=1))


@pytest.mark.parametrize("kind", ["document", "question", "reasoning"])
def test_each_stage_overfits_one_batch(stage, kind: str):
    visual_tokens = 4 if kind == "document" else 16
    cfg = stage(
        kind=kind, count=4, visual_tokens=visual_tokens, global_batch=4, steps=120, rate=1e-2, checkpoint_every=500
    )
    result = train(cfg)
    assert result.loss_first > 4  # untrained: about ln 330 = 5.8
    assert result.loss_last < 0.05


def test_stages_follow_each_other_and_the_frozen_tower_stays_bit_for_bit(stage, tmp_path: Path):
    first = stage(kind="document", visual_tokens=4, steps=2, output=str(tmp_path / "pretrain"), stage="pretrain")
    train(first)
    before, _ = load_params(first.train.output)
    second = stage(steps=2, output=str(tmp_path / "sft"), init_from=first.train.output, stage="sft", train=("text",))
    result = train(second)
    _assert_same(before["vision"], result.params["vision"])
    _assert_same(before["projector"], result.params["projector"])
    changed = jax.tree.map(
        lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), before["text"], result.params["text"]
    )
    assert all(jax.tree.leaves(changed)), "every text parameter learns"
    assert [entry["stage"] for entry in load_params(second.train.output)[1]["history"]] == ["pretrain", "sft"]


def test_parameters_that_learnt_another_tokenizer_are_refused(stage, tmp_path: Path):
    first = stage(steps=1, output=str(tmp_path / "first"))
    train(first)
    other = make_tokenizer(["what else is the heart? yes no"] * 3, tmp_path / "tokenizer", vocab_size=300)
    second = stage(steps=1, output=str(tmp_path / "second"), init_from=first.train.output)
    second = dataclasses.replace(second, data=dataclasses.replace(second.data, tokenizer=str(other)))
    with pytest.raises(UserError, match=r"first was trained with another tokenizer than data\.tokenizer="):
        train(second)


def test_micro_batches_give_the_same_losses(stage, tmp_path: Path):
    whole = train(stage(global_batch=4, steps=3, output=str(tmp_path / "1")))
    pieces = train(stage(global_batch=4, steps=3, rows_per_device=1, output=str(tmp_path / "4")))
    # Float32 sums in another order, over three updates.
    np.testing.assert_allclose(
        [row["loss"] for row in whole.history], [row["loss"] for row in pieces.history], rtol=2e-5
    )


def _random_params(cfg: Config) -> dict:
    with jax.set_mesh(make_mesh(cfg.mesh)):
        return init_params(jax.random.key(5), cfg.model)


def test_given_parameters_are_the_start_and_stay_whole(stage):
    cfg = stage(steps=1, rate=0.0)
    params = _random_params(cfg)
    result = train(cfg, params=params)
    _assert_same(result.params, params)
    with pytest.raises(UserError, match="choose one"):
        train(_with_train(cfg, init_from="somewhere"), params=params)


def test_a_folder_that_cannot_be_made_is_refused_with_the_advice(stage):
    refused = r"cannot write to the folder /proc/x: .*; name another folder"
    with pytest.raises(UserError, match=refused):
        train(stage(output="/proc/x"))
    with pytest.raises(UserError, match=r"cannot write to the folder /proc: .*; name another folder"):
        save_params("/proc/x", [("a", np.zeros(1))], {})


def test_non_finite_updates_end_the_run_and_name_the_samples(stage, caplog):
    cfg = stage(max_skipped_updates=3)
    params = jax.tree.map(np.array, _random_params(cfg))
    params["text"]["norm"]["scale"][0] = np.nan
    with pytest.raises(UserError, match=r"3 updates in a row .* step 3 on samples toy/train/"):
        train(cfg, params=params)
    rows = read_metrics(cfg.train.output)
    assert [row["skipped"] for row in rows] == [1, 1, 1] and np.isnan([row["loss"] for row in rows]).all()
    written = (Path(cfg.train.output) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in written] == [None] * 3
    assert all(len(row["skipped_ids"]) == row["samples"] > 0 for row in rows)
    assert "step 1: loss or gradient not finite, update skipped; samples toy/train/" in caplog.text


def test_skipped_updates_push_no_checkpoint_out(stage):
    """The first update of 1e30 is finite, no loss after it is: the checkpoints before stay, and the error names one."""
    cfg = stage(rate=1e30, steps=20, checkpoint_every=1, keep_checkpoints=2, max_skipped_updates=5)
    kept = Path(cfg.train.output) / "checkpoints"
    with pytest.raises(UserError, match=r"5 updates in a row .* another train\.output and --init-from .*/2, with"):
        train(cfg)
    assert [row["skipped"] for row in read_metrics(cfg.train.output)] == [0, 0, 1, 1, 1, 1, 1]
    assert sorted(path.name for path in kept.iterdir()) == ["1", "2"]


def test_a_checkpoint_that_a_skipped_update_put_off_comes_after_it(stage, monkeypatch):
    """Step 3, whose checkpoint is due, is skipped."""
    cfg = stage(steps=5, keep_checkpoints=9)
    made, calls = stages.make_train_step, []

    def spoiled(*arguments):
        step = made(*arguments)

        def call(state, batch, rate):
            calls.append(rate)
            poison = float("nan") if len(calls) == 3 else 1.0
            return step(state, dataclasses.replace(batch, loss_weights=batch.loss_weights * poison), rate)

        return call

    monkeypatch.setattr(stages, "make_train_step", spoiled)
    assert [row["skipped"] for row in train(cfg).history] == [0, 0, 1, 0, 0]
    kept = Path(cfg.train.output) / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["4", "5"]


def test_the_last_checkpoint_is_read_back_and_compared(stage, monkeypatch):
    load, name = checkpoint.ocp.load, "trainable.text.norm.scale"

    def change(path, abstract):
        loaded = load(path, abstract)
        return loaded | {name: loaded[name] * 2}

    monkeypatch.setattr(checkpoint.ocp, "load", change)
    with pytest.raises(UserError, match=rf"checkpoints/2 is damaged at {name}"):
        train(stage(steps=2))


def test_a_batch_with_nothing_to_learn_is_an_error_not_a_loss_of_zero(stage, dataset, tmp_path: Path):
    """Every image is damaged and every share of damage allowed: the rows become padding."""
    damaged = [dataclasses.replace(sample, images=(b"no image",)) for sample in open_samples(dataset())]
    write_samples(tmp_path / "damaged", damaged, name="toy")
    cfg = stage()
    data = dataclasses.replace(cfg.data, dataset=str(tmp_path / "damaged"), max_bad_records=1.0)
    with pytest.raises(UserError, match="step 1: no token of the batch carries loss"):
        train(dataclasses.replace(cfg, data=data))


@pytest.mark.parametrize("info", [{"training_allowed": False}, {"derived_from": {"training_allowed": False}}])
def test_data_for_evaluation_only_is_refused_before_anything_is_written(stage, dataset, tmp_path: Path, info):
    write_samples(tmp_path / "only", list(open_samples(dataset())), name="toy", info=info)
    cfg = stage()
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset=str(tmp_path / "only")))
    for learn in (train, lambda cfg: grpo(cfg, params=_random_params(cfg))):
        with pytest.raises(UserError, match="only holds toy/train, for evaluation only: train on a dataset without it"):
            learn(cfg)
    assert [path.name for path in tmp_path.iterdir()] == ["only"]


def test_settings_that_cannot_be_are_refused_before_anything_is_written(stage, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"train\.output"):
        train(stage(output=""))
    with pytest.raises(UserError, match=r"train\.train must be one of .*, not 'tail'"):
        train(stage(train=("tail",)))
    with pytest.raises(UserError, match="does not exist"):
        train(stage(init_from=str(tmp_path / "nowhere"), output=str(tmp_path / "other")))


def test_the_printed_sample_shows_places_and_what_is_learnt(tokenizer_folder: Path):
    tokenizer = load_tokenizer(tokenizer_folder)
    turns = (Turn("user", (0, "\nwhat is the heart?")), Turn("assistant", ("large",)))
    sample = Chat("toy/train/0", "toy", "train", (b"",), turns)
    segment = render(sample, tokenizer, 4, [np.zeros((8, 8, 3), np.uint8)])
    model = infimed.Model(infimed.Vision(image_size=8, patch_size=4), infimed.Projector(visual_tokens=4))
    shape = {"context": 96, "images": 1, "model": model}
    batch = stack_rows([build_row([], **shape), build_row([segment, segment], **shape)])
    text = describe_row(batch, tokenizer)
    assert text == (
        "<|im_start|>user\n[4 image places]\nwhat is the heart?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n«large<|im_end|>»\n"
    )


def test_mean_loss_takes_a_twentieth_and_no_skipped_update():
    rows = [{"loss": float(step), "skipped": 0} for step in range(1, 41)]
    assert mean_loss(rows) == 1.5 and mean_loss(rows, last=True) == 39.5
    rows[0] = {"loss": float("nan"), "skipped": 1}
    assert mean_loss(rows) == 2.5
    assert mean_loss(rows[2:3]) == 3
    assert np.isnan(mean_loss([])) and mean_loss(rows[1:], last=True) == pytest.approx(39.5)
