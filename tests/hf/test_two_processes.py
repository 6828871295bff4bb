"""An import read onto a mesh of two processes over loopback: each reads its part of the file and holds nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.hf import names
from infimed_jax.runs import parameters
from tests import tiny, two_processes

MODEL = tiny.model(vocab_size=16_384, hidden_size=512)
EMBEDDING = "text.embed_tokens"

_CHILD = """
import json, sys
import jax
import numpy as np
number, port, folder, expected, values = *map(int, sys.argv[1:3]), *sys.argv[3:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
from infimed_jax import config
from infimed_jax.models.params import abstract_params
from infimed_jax.sharding import make_mesh
from infimed_jax.runs.parameters import load_params
from infimed_jax.sharding import on_mesh

def bytes_read():
    lines = open("/proc/self/io").read().split()
    return int(lines[lines.index("rchar:") + 1])

model = config.from_dict(config.Config, json.loads(values)).model
with jax.set_mesh(make_mesh(config.Mesh())):
    abstract = on_mesh(abstract_params(model))
    load_params(folder, abstract)  # so that the next reads no module and compiles nothing
    before = bytes_read()
    params, _ = load_params(folder, abstract)
    read = bytes_read() - before
shards = params["text"]["embed_tokens"].addressable_shards
table = np.load(expected, mmap_mode="r")
print(json.dumps({
    "read": read,
    "held": sum(shard.data.size for shard in shards),
    "dtype": str(params["text"]["embed_tokens"].dtype),
    "equal": all(np.array_equal(shard.data, table[shard.index]) for shard in shards),
    "first": [str(shard.index) for shard in shards],
}))
"""


def test_each_process_reads_its_own_part(tmp_path, monkeypatch):
    if not Path("/proc/self/io").exists():
        pytest.skip("needs /proc/self/io, which counts the bytes that a process reads")
    rng = np.random.default_rng(0)
    shapes = names.leaf_shapes(MODEL)
    leaves = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    np.save(tmp_path / "expected.npy", leaves[EMBEDDING])
    chunked = parameters._chunked

    def small_chunks():  # as a leaf of a real model has many
        context = chunked()
        context.array.saving.storage_options.chunk_byte_size = 1 << 20
        return context

    monkeypatch.setattr(parameters, "_chunked", small_chunks)
    values = config.to_dict(config.Config(model=MODEL))
    parameters.save_params(tmp_path / "ckpt", leaves.items(), {"config": values, "history": [{"stage": "import"}]})
    arguments = [str(tmp_path / "ckpt"), str(tmp_path / "expected.npy"), json.dumps(values)]
    children = two_processes.run(_CHILD, tmp_path / "cache", *arguments)
    assert [code for code, *_ in children] == [0, 0], children[0][2][-2000:] + children[1][2][-2000:]
    results = [json.loads(output.splitlines()[-1]) for _, output, _ in children]
    size = leaves[EMBEDDING].size  # all else is small
    assert results[0]["first"] != results[1]["first"]
    for result in results:
        assert result["equal"] and result["held"] == size // 2 and result["dtype"] == "float32"
        assert 0.4 * 4 * size < result["read"] < 0.6 * 4 * size, result
