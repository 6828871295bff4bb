"""A GRPO step on eight devices (data, fsdp and tensor split) does what it does on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_eight_devices_equal_one(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    worker = subprocess.run(
        [sys.executable, str(HERE / "mesh_worker.py"), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert worker.returncode == 0, worker.stderr[-3000:]
    one, eight = json.loads(worker.stdout.splitlines()[-1])
    for name in ("reward", "response_tokens", "truncated", "no_variance", "tokens", "loss_tokens", "skipped"):
        assert one[name] == eight[name], name
    assert one["no_variance"] < 1 and one["grad_norm"] > 1e-3  # otherwise the comparison below would be of noise
    for name in ("entropy", "grad_norm"):
        assert eight[name] == pytest.approx(one[name], rel=1e-4), name
    for row in (one, eight):  # the policy is still the reference, and the sampler's
        assert row["ratio"] == pytest.approx(1) and row["kl"] < 1e-8 and row["logprob_gap"] < 1e-4
