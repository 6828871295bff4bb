"""The run: it learns what is rewarded, learns nothing from a constant, and goes on exactly where it stopped."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from data_prep.steps.copy import copy_dataset
from data_prep.steps.mix import Part, mix
from infimed_jax.config import ConfigError, Lora, to_dict
from infimed_jax.data.storage import write_samples
from infimed_jax.errors import Interrupted, UserError
from infimed_jax.rl.grpo import grpo
from infimed_jax.rl.rewards import Reward
from infimed_jax.runs.parameters import load_params, save_params
from infimed_jax.trees import flatten
from tests.rl.conftest import each


def configure(tiny, folder, *, train=None, optimizer=None, **settings):
    cfg = tiny.cfg
    return replace(
        cfg,
        train=replace(cfg.train, output=str(folder), **(train or {})),
        optimizer=replace(cfg.optimizer, **(optimizer or {})),
        grpo=replace(cfg.grpo, **settings),
    )


def align(tiny, cfg, **kwargs):
    return grpo(cfg, params=None if cfg.train.init_from else tiny.params, **kwargs)


def says_bright(reply, finished, sample, settings):
    """A bandit: 1 for any letter `b` in the reply."""
    right = float("b" in reply)
    return Reward(right, {"accuracy": right, "format": 0.0})


def leaves_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# Two settings, so that all tests here share two compiled updates.
ON_POLICY = {"kl_coefficient": 0.0}
OFF_POLICY = {"update_prompts": 2, "kl_coefficient": 0.05, "clip_low": 0.05, "clip_high": 0.05}


def test_it_learns_what_is_rewarded(tiny, tmp_path):
    cfg = configure(tiny, tmp_path, steps=15, train={"checkpoint_every": 100}, **ON_POLICY)
    seen = []
    result = align(tiny, cfg, reward=each(says_bright), on_step=lambda step, total, row: seen.append((step, total)))
    rewards = [row["reward"] for row in result.history]
    assert rewards[0] < 0.3 and np.mean(rewards[-2:]) > 0.9
    assert result.reward_first == np.mean(rewards[:2]) and result.reward_last == np.mean(rewards[-2:])
    assert seen == [(i + 1, 15) for i in range(15)]
    for row in result.history:
        if row["no_variance"] == 1:  # nothing to learn, so nothing was computed
            assert row["computed"] == 0 and "ratio" not in row
            continue
        assert row["logprob_gap"] < 1e-4  # the sampler's log-probabilities are the trainer's, in float32
        assert (
            row["ratio"] == pytest.approx(1) and row["clip_fraction"] == 0 and row["skipped"] == 0 and "kl" not in row
        )
        assert 1 <= row["response_tokens"] <= 6 and row["loss_tokens"] == row["response_tokens"] * 32
        assert row["seconds"] > 0 and row["tokens"] > row["loss_tokens"]
    assert result.history[-1]["entropy"] < result.history[0]["entropy"]  # the policy settles
    stored, metadata = load_params(tmp_path)
    leaves_equal(stored, result.params)
    assert metadata["config"]["grpo"]["steps"] == 15
    lines = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert len(lines) == 15 * 8 and {line["reward"]["total"] for line in lines} == {0.0, 1.0}
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 15


def test_a_constant_reward_moves_nothing(tiny, tmp_path):
    """No group has variance: loss and gradient are exactly 0, and so is the update."""
    result = align(tiny, configure(tiny, tmp_path, steps=3, reward="constant", **ON_POLICY))
    for row in result.history:
        assert row["reward"] == 1 and row["no_variance"] == 1 and row["loss"] == 0 and row["grad_norm"] == 0
        assert row["skipped"] == 0 and row["accuracy"] == 0 and row["computed"] == 0 and row["entropy"] > 0
    leaves_equal(result.params, tiny.params)


TOY = """
from infimed_jax.rl.rewards import Reward

def reward(attempts, grpo):
    found = [float("b" in a.reply) for a in attempts]
    return [Reward(b, {"brightness": b, "batch": len(attempts)}) for b in found]
"""


def test_a_reward_from_a_file_is_asked_about_all_attempts_at_once(tiny, tmp_path):
    (tmp_path / "toy_reward.py").write_text(TOY)
    cfg = configure(tiny, tmp_path / "run", steps=1, reward=str(tmp_path / "toy_reward.py"), **ON_POLICY)
    (row,) = align(tiny, cfg).history
    assert row["brightness"] == row["reward"] and row["batch"] == cfg.grpo.prompts * cfg.grpo.group_size
    assert "accuracy" not in row
    first = json.loads((tmp_path / "run/replies.jsonl").read_text().splitlines()[0])["reward"]
    assert first == {"total": first["brightness"], "brightness": first["brightness"], "batch": row["batch"]}


def test_rewards_that_cannot_be_used_are_named(tiny, tmp_path):
    with pytest.raises(UserError, match=r"grpo\.reward must be one of constant, verifiable, not 'verifiabel'"):
        align(tiny, configure(tiny, tmp_path / "a", reward="verifiabel"))
    for reward, message in (
        (lambda attempts, grpo: [Reward(1.0, {})], "1 rewards for 32 attempts"),
        (lambda attempts, grpo: [Reward(1.0, {f"p{i % 2}": 1.0}) for i in range(len(attempts))], "of different parts"),
        (each(lambda *_: Reward(1.0, {"entropy": 1.0})), "a part 'entropy', which is a metric already"),
    ):
        with pytest.raises(UserError, match=message):
            align(tiny, configure(tiny, tmp_path / message[:3], steps=1, **ON_POLICY), reward=reward)


def test_a_phase_that_hangs_is_named(tiny, tmp_path, caplog):
    """A reward that waits until it hears the watchdog speak of it: without one, pytest's own limit ends this."""

    def waits(reply, finished, sample, settings):
        while "hung: step 1: scoring" not in caplog.text:
            time.sleep(0.01)
        return Reward(1.0, {"accuracy": 1.0, "format": 0.0})

    align(tiny, configure(tiny, tmp_path, train={"step_timeout": 0.2}, steps=1, **ON_POLICY), reward=each(waits))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_reward_that_is_not_finite_ends_the_run(tiny, tmp_path):
    """From the second rollout on every loss is infinite: updates are skipped, then the run stops and says on what.

    Checkpoints of skipped updates would push out the one from before.
    """
    cfg = configure(
        tiny,
        tmp_path / "broken",
        steps=9,
        train={"max_skipped_updates": 2, "checkpoint_every": 1, "keep_checkpoints": 1},
        **ON_POLICY,
    )
    seen = []

    def odd(reply, finished, sample, settings):
        return Reward(float(len(reply) % 2), {})

    def broken(reply, finished, sample, settings):
        seen.append(reply)
        well = len(seen) <= cfg.grpo.prompts * cfg.grpo.group_size
        return odd(reply, finished, sample, settings) if well else Reward(np.inf if len(reply) % 2 else 0.0, {})

    with pytest.raises(UserError, match=r"2 updates in a row .* step 3 on samples tiny/train/.* --init-from .*/1, "):
        align(tiny, cfg, reward=each(broken))
    rows = [json.loads(line) for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    stored, _ = load_params(tmp_path / "broken")
    once = configure(tiny, tmp_path / "once", steps=1, train={"checkpoint_every": 1}, **ON_POLICY)
    align(tiny, once, reward=each(odd))
    leaves_equal(stored, load_params(tmp_path / "once")[0])


def test_a_stopped_run_goes_on_exactly(tiny, tmp_path):
    """With several updates a rollout, clipping and a reference: everything that a state could forget."""
    cfg = configure(tiny, tmp_path / "whole", steps=4, **OFF_POLICY)
    whole = align(tiny, cfg, reward=each(says_bright))
    for row in whole.history:
        assert row["logprob_gap"] < row["logprob_gap_max"] < 1e-4
        assert row["ratio"] != 1 and row["kl"] > 0
    assert 0 < max(row["clip_fraction"] for row in whole.history) < 1

    def stop(step, total, row):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    cfg = configure(tiny, tmp_path / "parts", steps=4, train={"checkpoint_every": 100}, **OFF_POLICY)
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        align(tiny, cfg, reward=each(says_bright), on_step=stop)
    parts = align(tiny, cfg, reward=each(says_bright))
    leaves_equal(parts.params, whole.params)
    assert timeless(parts.history) == timeless(whole.history)
    assert (tmp_path / "parts/replies.jsonl").read_text() == (tmp_path / "whole/replies.jsonl").read_text()

    again = align(tiny, cfg, reward=each(says_bright), on_step=lambda *_: pytest.fail("a finished run stepped"))
    assert again.history == parts.history
    with pytest.raises(UserError, match=r"grpo.clip_high was 0.05, is 0.4"):
        align(tiny, replace(cfg, grpo=replace(cfg.grpo, clip_high=0.4)), reward=each(says_bright))
    write_samples(tmp_path / "fewer", tiny.samples[:-1], name="tiny")
    with pytest.raises(UserError, match=r"data\.dataset=.*fewer holds other questions; restore that or name another"):
        align(tiny, replace(cfg, data=replace(cfg.data, dataset=str(tmp_path / "fewer"))))


def test_a_run_resumes_between_a_view_and_its_copy(tiny, tmp_path):
    mix([Part(Path(tiny.cfg.data.dataset), share=0.8)], tmp_path / "view", 1)
    copy_dataset(tmp_path / "view", tmp_path / "copy")

    def cfg(data, output):
        made = configure(tiny, tmp_path / output, steps=2, **ON_POLICY)
        return replace(made, data=replace(made.data, dataset=str(tmp_path / data)))

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    whole = align(tiny, cfg("view", "whole"), reward=each(says_bright))
    for first, second in (("view", "copy"), ("copy", "view")):
        with pytest.raises(Interrupted, match="after step 1 of 2"):
            align(tiny, cfg(first, first), reward=each(says_bright), on_step=stop)
        parts = align(tiny, cfg(second, first), reward=each(says_bright))
        leaves_equal(parts.params, whole.params)
        assert timeless(parts.history) == timeless(whole.history)


def test_a_run_goes_on_after_it_and_its_start_were_moved(tiny, tmp_path):
    """What binds it is the parameters that it starts from, not their path."""
    for number, name in enumerate(("start", "other")):
        named = flatten(jax.tree.map(lambda leaf, n=number: np.asarray(leaf) + np.float32(n), tiny.params))
        save_params(tmp_path / "scratch" / name, named.items(), {"config": to_dict(tiny.cfg)})

    def run_in(folder, start="start"):
        train = {"init_from": str(folder / start)}
        return configure(tiny, folder / "run", steps=2, train=train, **ON_POLICY)

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 1 of 2"):
        align(tiny, run_in(tmp_path / "scratch"), reward=each(says_bright), on_step=stop)
    swapped = [("start", "aside"), ("other", "start")]
    for old, new in swapped:
        os.rename(tmp_path / "scratch" / old, tmp_path / "scratch" / new)
    with pytest.raises(UserError, match=r"train.init_from=.*start holds other parameters than when the run began"):
        align(tiny, run_in(tmp_path / "scratch"), reward=each(says_bright))
    for old, new in reversed(swapped):
        os.rename(tmp_path / "scratch" / new, tmp_path / "scratch" / old)
    os.rename(tmp_path / "scratch", tmp_path / "archive")
    with pytest.raises(UserError, match=r"train.init_from was '.*start', is '.*other'; restore that or name"):
        align(tiny, run_in(tmp_path / "archive", "other"), reward=each(says_bright))
    moved = run_in(tmp_path / "archive")
    assert align(tiny, moved, reward=each(says_bright)).steps == 2
    assert load_params(tmp_path / "archive/run")[1]["config"]["data"]["tokenizer"] == moved.train.output + "/tokenizer"


def timeless(history):
    clocked = ("second", "peak_share", "memory")
    return [{n: value for n, value in row.items() if not any(word in n for word in clocked)} for row in history]


def test_a_run_needs_a_folder(tiny):
    with pytest.raises(ConfigError, match=r"train.output"):
        align(tiny, tiny.cfg)
    with pytest.raises(UserError, match=r"cannot write to the folder /proc/x: .*; name another folder"):
        align(tiny, configure(tiny, "/proc/x"))


def test_adapters_learn_what_is_rewarded_and_come_merged(tiny, tmp_path):
    """LoRA in GRPO: the sampler sees the merged model, otherwise the gap to its log-probabilities would grow."""
    lora = Lora(rank=4, alpha=8.0)
    cfg = configure(tiny, tmp_path, steps=4, train={"checkpoint_every": 100, "lora": lora}, kl_coefficient=0.05)
    result = align(tiny, cfg, reward=each(says_bright))
    assert result.history[0]["kl"] < 1e-8  # B is zero at first: the policy is the reference
    assert all(row["logprob_gap"] < 1e-4 for row in result.history if "logprob_gap" in row)
    assert result.history[-1]["kl"] > result.history[0]["kl"]
    layers = jax.device_get((tiny.params["text"]["layers"], result.params["text"]["layers"]))
    assert jax.tree.structure(layers[0]) == jax.tree.structure(layers[1])
    assert np.any(layers[0]["mlp"]["up_proj"]["kernel"] != layers[1]["mlp"]["up_proj"]["kernel"])
    np.testing.assert_array_equal(layers[0]["input_layernorm"]["scale"], layers[1]["input_layernorm"]["scale"])
    # The checkpoint's adapters are merged on the host: float32 in another order.
    loaded, merged = jax.device_get((load_params(tmp_path)[0], result.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), loaded, merged)
