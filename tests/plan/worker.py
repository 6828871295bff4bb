"""Run by test_counts.py on eight virtual CPU devices: a two-layer model's step, compiled, read and counted."""

import json
import sys

import jax

from infimed_jax import config, sharding
from infimed_jax.cost.flops import device_flops, products
from infimed_jax.plan.collectives import collectives
from infimed_jax.plan.program import train_program
from tests.plan import hlo

MODEL = {
    "vision": {
        "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 8,
    },
    "projector": {"visual_tokens": 9},
    "text": {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 16,
        "num_kv_heads": 8, "head_dim": 8,
    },
}  # fmt: skip
BASE = {
    "model": MODEL,
    "data": {"context": 64, "images_per_row": 2},
    # float32: XLA's CPU backend widens bfloat16 collectives, which no accelerator does.
    "train": {"global_batch": 16, "attention": "xla", "logit_chunk": 16, "compute_dtype": "float32"},
}


def report(mesh_shape: list[int], settings: dict) -> dict:
    cfg = config.from_dict(config.Config, config.merge(BASE, settings))
    mesh = sharding.make_mesh(config.Mesh(*mesh_shape))
    sizes, rows = dict(mesh.shape), cfg.train.global_batch
    with jax.set_mesh(mesh):
        compiled = train_program(cfg, mesh).lower().compile()
    seen = hlo.count(compiled.as_text())
    counted = {"all-gather": 0.0, "all-reduce": 0.0}
    for item in collectives(cfg, rows, sizes, cfg.train.micro_batches):
        counted[item.kind] += item.sent
    return {
        "flops": [seen.flops, device_flops(products(cfg, rows), sizes)],
        "sent": [seen.sent(), counted],
        "cost_analysis": compiled.cost_analysis()["flops"],
    }


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(report(**case)), flush=True)
