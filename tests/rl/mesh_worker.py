"""Run by test_grpo_mesh.py on eight virtual CPU devices: one line of JSON, a GRPO step's metrics on each mesh."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
from conftest import each, make_tiny

from infimed_jax.config import Mesh
from infimed_jax.rl.grpo import grpo
from infimed_jax.rl.rewards import Reward
from infimed_jax.runs import loop
from infimed_jax.sharding import make_mesh


def even_length(reply, finished, sample, settings):
    """Whatever the random model says, about half of a group earns it: there is a gradient to compare."""
    right = float(len(reply) % 2 == 0)
    return Reward(right, {"accuracy": right, "format": 0.0})


def on_mesh(shape, tiny, params, folder):
    loop.run_mesh = lambda cfg: make_mesh(cfg.mesh, jax.devices()[: shape[0] * shape[1] * shape[2]])
    cfg = replace(
        tiny.cfg,
        mesh=Mesh(*shape),
        train=replace(tiny.cfg.train, output=str(folder), micro_batches=1),  # half the compilation
        grpo=replace(tiny.cfg.grpo, steps=1, kl_coefficient=0.05),
    )
    result = grpo(cfg, params=params, reward=each(even_length))
    return result.history[0]


def main():
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        tiny = make_tiny(folder)
        params = jax.device_get(tiny.params)
    shapes = [(1, 1, 1), (2, 2, 2)]
    print(json.dumps([on_mesh(shape, tiny, params, folder / str(shape)) for shape in shapes]))


if __name__ == "__main__":
    main()
