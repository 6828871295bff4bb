"""A worker script on eight virtual devices, in a process of its own: their number is fixed when JAX starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # halves the compile time, most of these tests
    # XLA sizes its thread pool by it. Every collective holds a thread until all devices have come, and independent
    # ones run at the same time: with a pool of eight, two of them can hold all threads and wait for ever.
    "NPROC": "64",
}


def run(module: str) -> dict:
    """The JSON object in the last line that `python -m MODULE` prints."""
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
