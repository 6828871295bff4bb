"""Twenty steps on one, two, four and eight devices, each mesh axis in turn: the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def test_every_mesh_gives_the_losses_of_one_device():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of this test is compiling
    }
    command = [sys.executable, "-m", "tests.multi_device.train_worker"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = found.pop("(1, 1, 1)")
    assert (
        len(found) == 3 and len(expected) == 20 and expected[-1] < 0.9 * expected[0]
    )  # twenty updates that do something
    for shape, losses in found.items():
        # Float32 sums in another order, carried through twenty updates of Adam.
        np.testing.assert_allclose(losses, expected, rtol=2e-4, err_msg=shape)
