"""The engine on a (2, 2, 2) mesh of virtual devices equals one device; in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_eight_devices_equal_one():
    done = subprocess.run(
        [sys.executable, "-m", "tests.sampling.sharded_program"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded generate: ok" in done.stdout
