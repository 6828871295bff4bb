"""A rollout's bytes are those of the sampler's own arrays; its FLOPs are two a parameter and token."""

import dataclasses

import jax
import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.cost.chips import parse_topology
from infimed_jax.models.params import abstract_params, param_count
from infimed_jax.plan.rollout import rollout
from infimed_jax.sampling.cache import empty_cache
from infimed_jax.sampling.weights import sampler_weights
from tests.tiny import one_device


@pytest.fixture
def cfg(model):
    return config.Config(
        model=model,
        train=config.Train(stage="grpo", compute_dtype="float32"),
        sampling=config.Sampling(slots=8),
        grpo=config.Grpo(prompts=4, update_prompts=4, group_size=6, max_prompt=40, max_response=24),
    )


def test_bytes_are_those_of_the_sampler_s_arrays(cfg):
    found = rollout(cfg, parse_topology("h100x1"), {"data": 1, "fsdp": 1, "tensor": 1}, state=1000, available=10**6)
    with one_device():
        cache = jax.eval_shape(lambda: empty_cache(8, 64, cfg.model, "float32"))
        params = abstract_params(cfg.model)
        weights = jax.eval_shape(lambda p: sampler_weights(p, cfg.model, "float32"), params)
    held = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    assert found["cache"] == held(cache)
    assert found["sampler_weights"] == held(weights)
    assert found["needed"] == 1000 + held(cache) + held(weights)
    for available, fits in ((found["needed"], True), (found["needed"] - 1, False)):
        again = rollout(cfg, parse_topology("h100x1"), {"data": 1, "fsdp": 1, "tensor": 1}, 1000, available)
        assert again["fits"] is fits


def test_devices_share_the_slots_and_tensor_the_heads(cfg):
    one = rollout(cfg, parse_topology("h100x1"), {"data": 1, "fsdp": 1, "tensor": 1}, 0, 0)
    split = rollout(cfg, parse_topology("h100x8"), {"data": 1, "fsdp": 4, "tensor": 2}, 0, 0)
    assert one["cache"] == 8 * split["cache"]
    assert one["decode_steps"] == split["decode_steps"] == 3 * 24  # 24 completions on 8 slots
    fewer = dataclasses.replace(cfg, sampling=config.Sampling(slots=7))
    last_alone = rollout(fewer, parse_topology("h100x1"), {"data": 1, "fsdp": 1, "tensor": 1}, 0, 0)
    assert last_alone["decode_steps"] == 4 * 24


def test_decoding_costs_two_flops_a_parameter_and_token():
    cfg = dataclasses.replace(config.Config(), grpo=config.Grpo(max_prompt=1, max_response=256))
    found = rollout(cfg, parse_topology("h100x8"), {"data": 1, "fsdp": 8, "tensor": 1}, 0, 0)
    text = param_count(cfg.model)["text"]  # tied: the table is the head
    np.testing.assert_allclose(found["decode_flops"] / (512 * 8 * 256), 2 * text, rtol=0.02)
    assert found["bound_by"] == "memory"


def test_flops_are_a_sum_over_prompts_and_tokens():
    """Token by token: prompts are computed once a group, with one image; a token sees itself and all before it."""
    cfg = dataclasses.replace(
        config.Config(), grpo=config.Grpo(prompts=2, update_prompts=2, group_size=3, max_prompt=1000, max_response=500)
    )
    text, vision = cfg.model.text, cfg.model.vision
    matrices = param_count(cfg.model)["text"] - text.vocab_size * text.hidden_size  # norms with them: below 1e-4
    pair = 4 * text.num_heads * text.head_dim * text.num_layers
    patches = vision.num_patches
    image = 2 * patches * param_count(cfg.model)["vision"] + 4 * patches**2 * vision.hidden_size * vision.num_blocks
    image += 2 * patches * param_count(cfg.model)["projector"]
    prefill = sum(2 * matrices + pair * (t + 1) for t in range(1000)) + image
    head = 2 * text.vocab_size * text.hidden_size
    decode = sum(2 * matrices + head + pair * (1000 + t + 1) for t in range(500))
    found = rollout(cfg, parse_topology("h100x1"), {"data": 1, "fsdp": 1, "tensor": 1}, 0, 0)
    np.testing.assert_allclose(found["prefill_flops"], 2 * prefill, rtol=3e-3)  # position embeddings, biases, norms
    np.testing.assert_allclose(found["decode_flops"], 6 * decode, rtol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_blocks_head_and_cache_but_no_untied_table(cfg, tied):
    text = dataclasses.replace(cfg.model.text, tie_embeddings=tied)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, text=text))
    topology = parse_topology("h100x1")
    found = rollout(cfg, topology, {"data": 1, "fsdp": 1, "tensor": 1}, 0, 0)
    parameters = param_count(cfg.model)["text"] - (0 if tied else text.vocab_size * text.hidden_size)
    read = found["decode_steps"] * (4 * parameters + found["cache"])
    assert found["bound_by"] == "memory"
    assert found["seconds"] == pytest.approx(read / topology.chip.bandwidth)
