"""What must not change a run: packing, the attention kernel under either packing, and a kill at any moment."""

import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.data.batch import Segment, build_row, stack_rows, unmask
from infimed_jax.models.compute import Compute
from infimed_jax.models.params import init_params
from infimed_jax.ops.attention import backend_names
from infimed_jax.ops.attention.backends import splash
from infimed_jax.runs.metrics import METRICS, read_metrics
from infimed_jax.train.stage import train
from infimed_jax.train.step import next_token_loss
from tests.tiny import one_device

ROOT = Path(__file__).resolve().parents[2]


def test_packed_losses_are_the_unpacked_ones(stage, tmp_path: Path):
    """Eight questions in two or three rows, or in eight: the same tokens with the same losses, three epochs on."""
    runs = {}
    for packing, rows in (("first_fit_decreasing", 4), ("none", 8)):
        cfg = stage(count=8, steps=3, global_batch=rows, output=str(tmp_path / packing))
        data = dataclasses.replace(cfg.data, packing=packing, context=128, images_per_row=4, buckets=1)
        runs[packing] = train(dataclasses.replace(cfg, data=data)).history
    packed, unpacked = runs.values()
    for a, b in zip(packed, unpacked, strict=True):
        assert [a[name] for name in ("tokens", "loss_tokens", "samples")] == [
            b[name] for name in ("tokens", "loss_tokens", "samples")
        ]
    assert packed[0]["samples"] == 8
    for name in ("loss", "grad_norm"):  # float32 sums in another order, over three updates
        np.testing.assert_allclose([row[name] for row in packed], [row[name] for row in unpacked], rtol=2e-4)


def _rows(text: int, model: config.Model) -> list:
    rng = np.random.default_rng(0)

    def segment(length: int) -> Segment:
        return Segment(
            rng.integers(1, 400, length).astype(np.int32), np.ones(length, np.float32), np.zeros(length, bool)
        )

    lengths = ((30, 50, 20), (text,), (5, 64))
    return [build_row([segment(n) for n in row], context=128, images=0, model=model) for row in lengths]


@pytest.mark.parametrize("masked", [True, False])
def test_both_packings_under_every_attention_kernel(model, monkeypatch, masked: bool):
    """Splash is interpreted here; heads of 128 because it tiles by them."""
    interpreted = functools.partial(splash.splash_attention, interpret=True)
    monkeypatch.setattr(splash, "BACKEND", dataclasses.replace(splash.BACKEND, run=interpreted, only=""))
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_layers=1, head_dim=128))
    batch = stack_rows(_rows(100, model))
    batch = batch if masked else unmask(batch)
    with one_device():
        params = init_params(jax.random.key(0), model)
        losses = {}
        for name in backend_names():
            compute = Compute("float32", "none", name, 128)
            value, grads = jax.value_and_grad(lambda p, c=compute: next_token_loss(model, c)(p, batch)[0])(params)
            losses[name] = float(value), float(np.abs(grads["text"]["embed_tokens"]).sum())
    assert set(losses) == {"xla", "rows", "splash"}
    for name in losses:
        np.testing.assert_allclose(losses[name], losses["xla"], rtol=1e-5, err_msg=name)


def test_the_two_packings_differ(model):
    """Else the test above would compare a setting that does nothing."""
    batch = stack_rows(_rows(100, model))
    with one_device():
        params = init_params(jax.random.key(0), model)
        loss = next_token_loss(model, Compute("float32", "none", "rows", 128))
        masked, unmasked = (float(loss(params, b)[0]) for b in (batch, unmask(batch)))
    assert abs(masked - unmasked) > 5e-5 * masked  # five times the tolerance above


_CHILD = """
import json, sys, time
from infimed_jax import config
from infimed_jax.train.stage import train

train(config.from_dict(config.Config, json.loads(sys.argv[1])), on_step=lambda *_: time.sleep(0.1))
"""


@pytest.mark.timeout(900)
def test_a_kill_at_any_moment_changes_no_loss(stage, tmp_path: Path):
    """A checkpoint a step, so that saves are under way at most moments; the moment is drawn anew each time."""
    whole = stage(steps=8, count=6, checkpoint_every=1, output=str(tmp_path / "whole"))
    parts = dataclasses.replace(whole, train=dataclasses.replace(whole.train, output=str(tmp_path / "parts")))
    expected = train(whole)
    metrics, moment = Path(parts.train.output) / METRICS, random.uniform(0.0, 1.2)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(config.to_dict(parts))],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while child.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.01)
        time.sleep(moment)
    finally:
        child.send_signal(signal.SIGKILL)
        _, errors = child.communicate()
    assert "Error" not in errors, errors
    done = len(read_metrics(parts.train.output))
    result = train(parts)
    losses = [[(row["step"], row["loss"], row["grad_norm"]) for row in r.history] for r in (expected, result)]
    assert losses[0] == losses[1], f"killed {moment:.3f} s after the first step was reported, at step {done}"
    for a, b in zip(jax.tree.leaves(expected.params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_array_equal(a, b)
