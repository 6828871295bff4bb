"""A rollout's bytes are those of the sampler's own arrays; its FLOPs are two a parameter and token."""

import dataclasses

import jax
import numpy as np
import pytest

from infimed_jax import config, sharding
from infimed_jax.models.infimed import abstract_params, param_count
from infimed_jax.plan.rollout import rollout
from infimed_jax.plan.topology import parse_topology
from infimed_jax.sampling.cache import empty_cache
from infimed_jax.sampling.weights import sampler_weights


@pytest.fixture
def cfg(model):
    return config.Config(
        model=model,
        train=config.Train(stage="grpo", compute_dtype="float32"),
        sampling=config.Sampling(slots=8),
        grpo=config.Grpo(prompts=4, update_prompts=4, group_size=6, max_prompt=40, max_response=24),
    )


def test_bytes_are_those_of_the_sampler_s_arrays(cfg):
    found = rollout(cfg, parse_topology("h100x1"), {"data": 1, "fsdp": 1, "tensor": 1}, state=1000)
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])):
        cache = jax.eval_shape(lambda: empty_cache(8, 64, cfg.model.text, "float32"))
        params = abstract_params(cfg.model)
        weights = jax.eval_shape(lambda p: sampler_weights(p, cfg.model, "float32"), params)
    held = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    assert found["cache"] == held(cache)
    assert found["sampler_weights"] == held(weights)
    assert found["needed"] == 1000 + held(cache) + held(weights)


def test_devices_share_the_slots_and_tensor_the_heads(cfg):
    one = rollout(cfg, parse_topology("h100x1"), {"data": 1, "fsdp": 1, "tensor": 1}, 0)
    split = rollout(cfg, parse_topology("h100x8"), {"data": 1, "fsdp": 4, "tensor": 2}, 0)
    assert one["cache"] == 8 * split["cache"]
    assert one["decode_steps"] == split["decode_steps"] == 3 * 24  # 24 completions on 8 slots


def test_decoding_costs_two_flops_a_parameter_and_token():
    cfg = dataclasses.replace(config.Config(), grpo=config.Grpo(max_prompt=1, max_response=256))
    found = rollout(cfg, parse_topology("h100x8"), {"data": 1, "fsdp": 8, "tensor": 1}, 0)
    text = param_count(cfg.model)["text"]  # tied: the table is the head
    np.testing.assert_allclose(found["decode_flops"] / (512 * 8 * 256), 2 * text, rtol=0.02)
    assert found["bound_by"] == "memory"
