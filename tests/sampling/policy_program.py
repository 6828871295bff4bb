"""Run by test_policy.py in a process with two virtual devices; prints "policy on a mesh: ok"."""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from infimed_jax.config import Config, Mesh, to_dict
from infimed_jax.runs.parameters import save_params
from infimed_jax.sampling.policy import Policy
from infimed_jax.sharding import make_mesh
from infimed_jax.trees import flatten
from tests.rl.conftest import make_tiny


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        tiny = make_tiny(folder)
        leaves = flatten(jax.tree.map(np.asarray, tiny.params))
    cfg = to_dict(Config(tiny.cfg.model, train=tiny.cfg.train, sampling=tiny.cfg.sampling))
    cfg["data"]["tokenizer"] = str(tiny.tokenizer.folder)
    save_params(folder / "run", leaves.items(), {"config": cfg})

    answers = []
    for settings in (["mesh.fsdp=2", "mesh.data=1"], ["mesh.tensor=2", "mesh.fsdp=1"]):
        policy = Policy.open(folder / "run", settings)
        prompts = policy.prompts(tiny.samples[:6], reasoning=True)
        answers.append(policy.answer(prompts, policy.config.sampling, jax.random.key(0)))
    assert [reply.tokens.tolist() for reply in answers[0]] == [reply.tokens.tolist() for reply in answers[1]]

    text = policy.decoder.weights["text"]
    halves = [text["lm_head"]] if "lm_head" in text else []
    for layer in text["layers"]:
        halves += [kernel["kernel"] for part in ("self_attn", "mlp") for kernel in layer[part].values()
                   if "kernel" in kernel]  # fmt: skip
    assert len(halves) >= 7 * tiny.cfg.model.text.num_layers
    for kernel in halves:
        assert 2 * kernel.addressable_shards[0].data.size == kernel.size, kernel.sharding
    print("policy on a mesh: ok")


if __name__ == "__main__":
    main()
