"""AdamW against torch and float64 NumPy, the decay mask, the schedule against optax and Hugging Face."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from infimed_jax import config
from infimed_jax.train.optimizer import (
    decay_mask,
    learning_rate,
    make_optimizer,
    scale_by_adam_bfloat16,
    stochastic_bfloat16,
    warmup_steps,
)

SETTINGS = config.Optimizer(learning_rate=3e-2, weight_decay=0.1, clip_norm=0.5, beta2=0.99)


def _trees(rng: np.random.Generator) -> dict:
    return {
        "projector": {"kernel": rng.normal(size=(5, 3)).astype(np.float32), "bias": np.float32(rng.normal(size=3))},
        "text": {"norm": rng.normal(size=(3,)).astype(np.float32)},
    }


def test_direction_equals_torch_adamw_with_clipping_and_masked_decay():
    rng = np.random.default_rng(0)
    params = _trees(rng)
    decayed = [torch.nn.Parameter(torch.tensor(params["projector"]["kernel"], dtype=torch.float64))]
    others = [
        torch.nn.Parameter(torch.tensor(leaf, dtype=torch.float64))
        for leaf in (params["projector"]["bias"], params["text"]["norm"])
    ]
    theirs = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=SETTINGS.learning_rate,
        betas=(SETTINGS.beta1, SETTINGS.beta2),
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
    )
    optimizer = make_optimizer(SETTINGS)
    ours = jax.tree.map(jnp.asarray, params)
    opt = optimizer.init(ours)
    for _ in range(5):
        grads = _trees(rng)
        for parameter, grad in zip(
            decayed + others,
            (grads["projector"]["kernel"], grads["projector"]["bias"], grads["text"]["norm"]),
            strict=True,
        ):
            parameter.grad = torch.tensor(grad, dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_(decayed + others, SETTINGS.clip_norm)
        theirs.step()
        direction, opt = optimizer.update(jax.tree.map(jnp.asarray, grads), opt, ours)
        ours = jax.tree.map(lambda p, d: p - SETTINGS.learning_rate * d, ours, direction)
    # torch clips by norm / (norm + 1e-6), hence 1e-5 and not float32's last digit.
    np.testing.assert_allclose(ours["projector"]["kernel"], decayed[0].detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours["projector"]["bias"], others[0].detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours["text"]["norm"], others[1].detach(), rtol=1e-5, atol=1e-6)


def test_decay_spares_biases_and_norms_though_layers_are_stacked():
    layers, width = 4, 8
    params = {
        "vision": {
            "position_embedding": np.zeros((9, width)),
            "blocks": {
                "layer_norm1": {"scale": np.zeros((layers, width)), "bias": np.zeros((layers, width))},
                "q_proj": {"kernel": np.zeros((layers, width, width)), "bias": np.zeros((layers, 2, width // 2))},
            },
        },
        "projector": {"linear_1": {"kernel": np.zeros((width, width)), "bias": np.zeros(width)}},
        "text": {
            "embed_tokens": np.zeros((16, width)),
            "layers": {"q_norm": np.zeros((layers, 4)), "gate_proj": np.zeros((layers, width, width))},
            "norm": np.zeros(width),
        },
    }
    assert decay_mask(params) == {
        "vision": {
            "position_embedding": True,
            "blocks": {"layer_norm1": {"scale": False, "bias": False}, "q_proj": {"kernel": True, "bias": False}},
        },
        "projector": {"linear_1": {"kernel": True, "bias": False}},
        "text": {"embed_tokens": True, "layers": {"q_norm": False, "gate_proj": True}, "norm": False},
    }


@pytest.mark.parametrize("total", [1, 7, 100, 333])
@pytest.mark.parametrize("final_fraction", [0.0, 0.1])
def test_schedule_equals_optax(total: int, final_fraction: float):
    cfg = config.Optimizer(learning_rate=5e-5, warmup_fraction=0.03, final_fraction=final_fraction)
    theirs = optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, warmup_steps(cfg, total), max(total, 2), end_value=cfg.learning_rate * final_fraction
    )
    ours = [learning_rate(cfg, step, max(total, 2)) for step in range(total)]
    # optax computes in float32: 1e-6 of the peak is a few of its last digits.
    np.testing.assert_allclose(ours, [float(theirs(step)) for step in range(total)], rtol=1e-5, atol=5e-11)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedule_equals_hugging_face(schedule: str):
    cfg = config.Optimizer(learning_rate=1.0, warmup_fraction=0.1, schedule=schedule)
    total = 45
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = {
        "cosine": lambda warmup: transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total),
        "constant": lambda warmup: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
    }[schedule]
    theirs = make(warmup_steps(cfg, total))
    for step in range(total):
        assert learning_rate(cfg, step, total) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_equal_settings_share_one_optimizer_and_so_one_program():
    longer_warmup = config.Optimizer(learning_rate=1e-6, warmup_fraction=0.5)
    assert make_optimizer(config.Optimizer()) is make_optimizer(longer_warmup)
    assert make_optimizer(config.Optimizer()) is not make_optimizer(config.Optimizer(weight_decay=0.01))


def test_bfloat16_moments_follow_float32_where_rounding_to_nearest_stands_still():
    """A constant gradient over 1,500 updates: the second moment's increments are 0.1 % of what is missing."""
    gradient = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1.0, 4096), jnp.float32)
    half = scale_by_adam_bfloat16(b1=0.9, b2=0.999, eps=1e-8)

    @jax.jit
    def run():
        nearest = jnp.zeros_like(gradient, jnp.bfloat16)

        def update(carry, _):
            state, nearest = carry
            _, state = half.update(gradient, state)
            nearest = (0.999 * nearest.astype(jnp.float32) + 0.001 * gradient**2).astype(jnp.bfloat16)
            return (state, nearest), None

        return jax.lax.scan(update, (half.init(gradient), nearest), length=1500)[0]

    state, nearest = run()
    exact = np.asarray(gradient) ** 2 * (1 - 0.999**1500)
    ratio = np.asarray(state.nu, np.float32) / exact
    assert state.mu.dtype == state.nu.dtype == jnp.bfloat16
    # Unbiased; each element walks by half a unit of bfloat16's last place (0.4 %) an update, pulled back by 1 - b2.
    assert abs(ratio.mean() - 1) < 0.01 and np.abs(ratio - 1).max() < 0.5
    assert (np.asarray(nearest, np.float32) / exact).mean() < 0.9
    first = np.asarray(state.mu, np.float32) / np.asarray(gradient)
    assert abs(first.mean() - 1) < 0.002 and np.abs(first - 1).max() < 0.1


def test_the_first_update_with_bfloat16_moments_is_that_of_float32():
    params, grads = (jax.tree.map(jnp.asarray, _trees(np.random.default_rng(seed))) for seed in (0, 1))
    directions = []
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(SETTINGS, moments_dtype=dtype))
        directions.append(optimizer.update(grads, optimizer.init(params), params)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *directions)


def test_stochastic_rounding_gives_a_neighbour_and_keeps_the_mean():
    x = jnp.full(20_000, 1.0 + 1 / 512)  # a quarter of the way between two neighbours in bfloat16
    rounded = np.asarray(stochastic_bfloat16(x, jax.random.key(1)), np.float32)
    assert set(rounded.tolist()) == {1.0, 1.0 + 1 / 128}
    assert abs((rounded > 1).mean() - 0.25) < 0.02  # six standard deviations
    exact = jnp.asarray([0.0, 1.0, 2.5, 1e-30], jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(stochastic_bfloat16(exact, jax.random.key(2)).astype(jnp.float32), exact)
