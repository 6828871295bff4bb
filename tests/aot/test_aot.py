"""Every published stage compiled for the TPU pod that it names, without a TPU: `make test-aot`.

Not part of `make test`: the foundation models take a minute of CPU and up to 3 GB each.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from infimed_jax import config
from infimed_jax.cost.chips import GIB, parse_topology
from infimed_jax.plan.cell import compiled, counted
from infimed_jax.plan.collectives import collectives
from infimed_jax.plan.compile import ENVIRONMENT, find_libtpu
from infimed_jax.plan.program import for_platform
from tests.plan import hlo
from tests.plan.stages import distinct, load, pod

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(find_libtpu() is None, reason="libtpu is not installed: make test-aot installs it")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "stage"), distinct())
def test_every_stage_fits_the_pod_it_names(model, stage):
    cfg = load(model, stage)
    cell = compiled(counted(cfg, parse_topology(pod(model)), cfg.mesh), cfg, find_libtpu())
    memory = cell["memory"]
    print(f"\n{model} {stage} on {cell['topology']}, remat {cell['remat']}: {memory['needed'] / GIB:.2f} GiB a chip")
    assert cell["fits"]
    # State and batch are exact but for the device's layout, which pads the last two dimensions to its tiles.
    state = memory["parameters"] + memory["moments"] + memory["batch"]
    assert state * 0.99 < cell["compiled"]["arguments"]
    if model != "tiny":
        assert cell["compiled"]["arguments"] < state * 1.05


_DUMP = """
import json, sys
import jax
from jax.experimental import topologies
from infimed_jax import config, sharding
from infimed_jax.plan.program import train_program
cfg, topology = config.from_dict(config.Config, json.loads(sys.argv[1])), sys.argv[2]
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = sharding.make_mesh(cfg.mesh, devices)
with jax.set_mesh(mesh):
    train_program(cfg, mesh).lower().compile()
"""


@pytest.mark.timeout(1800)
def test_the_tpu_s_own_program_sends_what_is_counted(tmp_path):
    """The compiled TPU program cannot be read back, but XLA writes it down where it is told to."""
    cfg = for_platform(load("tiny", "pretrain"), "tpu")
    cfg = dataclasses.replace(
        cfg,
        mesh=config.Mesh(1, 8, 1),
        train=dataclasses.replace(cfg.train, attention="xla", remat="full", global_batch=16, compute_dtype="bfloat16"),
    )
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    environment = os.environ | ENVIRONMENT | {"TPU_LIBRARY_PATH": find_libtpu(), "XLA_FLAGS": flags}
    command = [sys.executable, "-c", _DUMP, json.dumps(config.to_dict(cfg)), "v5p:2x2x2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = max(tmp_path.glob("*after_optimizations.txt"), key=lambda file: file.stat().st_size).read_text()
    assert "reduce-scatter" not in text
    layers, chunks = cfg.model.text.num_layers, -(-cfg.data.context // cfg.train.logit_chunk)
    trips = {"SiglipTower": cfg.model.vision.num_blocks, "Qwen3": layers, "head": chunks}
    seen = hlo.count(text, lambda rest: next(n for name, n in trips.items() if re.search(rf"{name}\)*/while", rest)))
    counted_bytes: Counter[str] = Counter()
    for item in collectives(cfg, 16, dict(data=1, fsdp=8, tensor=1), 1):
        counted_bytes[item.kind] += item.sent
    # A TPU gathers short vectors (biases) by an all-reduce, twice the bytes; all of them are a few kilobytes here.
    for kind in ("all-gather", "all-reduce"):
        assert abs(seen.sent()[kind] - counted_bytes[kind]) < 0.03 * counted_bytes[kind], kind
