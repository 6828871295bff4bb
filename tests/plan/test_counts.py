"""FLOPs and bytes on the network equal what the compiler makes of a two-layer model, product by product."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    {
        "mesh_shape": [2, 2, 2],
        "settings": {"train": {"train": ["vision", "projector", "text"], "remat": "full"}},
    },
    {
        "mesh_shape": [1, 4, 2],
        "settings": {"train": {"remat": "none", "micro_batches": 2}, "model": {"text": {"tie_embeddings": False}}},
    },
    {
        "mesh_shape": [2, 2, 2],
        "settings": {"train": {"remat": "full", "lora": {"rank": 4}}},
    },
]


@pytest.fixture(scope="module")
def reports():
    """A process of its own: the number of devices is fixed when JAX starts."""
    command = [sys.executable, "-m", "tests.plan.worker", json.dumps(CASES)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_flops_of_a_device_are_the_compiled_program_s(reports, case):
    seen, counted = reports[case]["flops"]
    assert counted == seen


@pytest.mark.parametrize("case", range(len(CASES)))
def test_bytes_sent_are_the_compiled_program_s(reports, case):
    seen, counted = reports[case]["sent"]
    assert set(seen) <= {"all-gather", "all-reduce"}, "a collective that the plan does not know of"
    assert counted["all-gather"] == seen.get("all-gather", 0)
    # Left out of the count: scalars of the metrics and of the gradient's norm, some hundred bytes in all.
    assert 0 <= seen["all-reduce"] - counted["all-reduce"] < 1000


def test_the_compiler_s_own_count_takes_a_loop_once(reports):
    """Why the test reads the program itself: `cost_analysis` does not multiply a scanned body by its layers."""
    assert reports[0]["cost_analysis"] < 0.7 * reports[0]["flops"][0]
