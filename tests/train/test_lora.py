"""Stages with adapters: what learns, what a checkpoint gives to those who read it, exact resume, chaining."""

import dataclasses
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from infimed_jax.config import Lora
from infimed_jax.errors import Interrupted
from infimed_jax.models.params import abstract_params
from infimed_jax.runs.checkpoint import open_checkpoint
from infimed_jax.runs.parameters import load_params
from infimed_jax.sharding import make_mesh, on_mesh
from infimed_jax.train.stage import train

ADAPTERS = Lora(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))


def _equal(left, right) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def _close(left, right) -> None:
    """The host and the devices merge in float32, each in its own order."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), left, right)


def test_a_stage_with_adapters_from_start_to_the_next_stage(stage, tmp_path: Path):
    base = stage(steps=1, output=str(tmp_path / "base"), stage="base")
    before = jax.tree.map(np.asarray, train(base).params)
    tuned = stage(
        steps=4, checkpoint_every=2, output=str(tmp_path / "lora"), lora=ADAPTERS, init_from=base.train.output
    )
    straight = dataclasses.replace(tuned, train=dataclasses.replace(tuned.train, output=str(tmp_path / "straight")))
    expected = train(straight)
    with pytest.raises(Interrupted):
        train(tuned, on_step=lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None)
    result = train(tuned)
    assert [row["loss"] for row in result.history] == [row["loss"] for row in expected.history]
    _equal(result.params, expected.params)

    # Only the adapted kernels and the projector have moved; adapters have moments, the text model has none.
    params, metadata = load_params(tuned.train.output)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, params)  # float32: kernels stored as they were
    layers = moved["text"].pop("layers")
    assert not any(jax.tree.leaves((moved["vision"], moved["text"])))
    assert all(jax.tree.leaves(moved["projector"]))
    assert layers["self_attn"].pop("q_proj")["kernel"] and layers["mlp"].pop("down_proj")["kernel"]
    assert not any(jax.tree.leaves(layers))
    stored = open_checkpoint(tuned.train.output).leaves
    moments = [name for name in stored if name.startswith("opt") and ".mu." in name]
    assert any("lora_a" in name for name in moments)
    assert not any("text" in name and "lora" not in name for name in moments)

    # Whoever reads the checkpoint gets a plain model, on the host and in shardings alike.
    _close(params, result.params)
    with jax.set_mesh(make_mesh(tuned.mesh)):
        placed, _ = load_params(tuned.train.output, on_mesh(abstract_params(tuned.model)))
    _equal(placed, result.params)
    chained = train(stage(steps=1, rate=0.0, output=str(tmp_path / "next"), init_from=tuned.train.output, stage="next"))
    _equal(chained.params["text"], result.params["text"])
    assert [entry["stage"] for entry in metadata["history"]] == ["base", "sft"]
