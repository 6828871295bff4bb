"""Eight virtual devices in a process of their own: a run that began on one device goes on there with equal losses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.config import Mesh
from infimed_jax.errors import Interrupted
from infimed_jax.runs.metrics import read_metrics
from infimed_jax.runs.parameters import load_params
from infimed_jax.train.stage import train

ROOT = Path(__file__).resolve().parents[2]

_CHILD = """
import json, sys
import jax
from infimed_jax import config
from infimed_jax.runs.checkpoint import Checkpoints
from infimed_jax.train.stage import train

states = []
save = Checkpoints.save
Checkpoints.save = lambda self, step, state, metadata: (states.append(state), save(self, step, state, metadata))
result = train(config.from_dict(config.Config, json.loads(sys.argv[1])))
kernel = lambda tree: tree["text"]["layers"]["mlp"]["gate_proj"]["kernel"]
print(json.dumps({
    "devices": jax.device_count(),
    "kernel": str(kernel(states[-1].trainable).sharding.spec),
    "moment": str(kernel(states[-1].opt[1].mu).sharding.spec),
    "part": kernel(states[-1].trainable).addressable_shards[0].data.size / kernel(states[-1].trainable).size,
}))
"""


@pytest.mark.timeout(600)
def test_eight_devices_continue_what_one_began_with_equal_losses(stage, tmp_path: Path):
    whole = stage(steps=4, global_batch=8, micro_batches=2, output=str(tmp_path / "whole"))
    expected = train(whole)
    begun = dataclasses.replace(whole, train=dataclasses.replace(whole.train, output=str(tmp_path / "begun")))
    with pytest.raises(Interrupted, match="after step 2"):
        train(begun, on_step=lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None)
    spread = config.merge(config.to_dict(begun), {"mesh": config.to_dict(Mesh(data=2, fsdp=2, tensor=2))})
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(spread)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    facts = json.loads(child.stdout.splitlines()[-1])
    assert facts["devices"] == 8
    assert facts["kernel"] == facts["moment"] and facts["part"] == 1 / 4
    losses = [[(row["loss"], row["grad_norm"]) for row in read_metrics(run.train.output)] for run in (whole, begun)]
    # Float32 sums over eight devices run in another order; two updates on.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    params, _ = load_params(begun.train.output)
    np.testing.assert_allclose(params["text"]["embed_tokens"], expected.params["text"]["embed_tokens"], atol=2e-4)
