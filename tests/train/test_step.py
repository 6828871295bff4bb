"""The compiled step on a toy loss, against AdamW written out in float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from infimed_jax import config, sharding
from infimed_jax.errors import UserError
from infimed_jax.train.optimizer import make_optimizer
from infimed_jax.train.state import TrainState, init_state, split_params
from infimed_jax.train.step import make_train_step

CONFIG = config.Config(
    optimizer=config.Optimizer(learning_rate=0.05, weight_decay=0.1, clip_norm=1.0),
    train=config.Train(train=("projector",), compute_dtype="float32"),
)
OPTIMIZER = make_optimizer(CONFIG.optimizer)


@pytest.fixture(autouse=True)
def _mesh():
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        yield mesh


def _params() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "vision": {"kernel": rng.normal(size=(6, 4)).astype(np.float32)},
        "projector": {"kernel": rng.normal(size=(4, 2)).astype(np.float32), "bias": np.zeros(2, np.float32)},
    }


def _batch(rows: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {
        "x": rng.normal(size=(rows, 6)).astype(np.float32),
        "y": rng.normal(size=(rows, 2)).astype(np.float32),
        # Uneven on purpose: whoever averages micro-batches instead of summing them gets another number.
        "weight": rng.choice([0.0, 0.25, 1.0, 3.0], size=rows, p=[0.2, 0.3, 0.3, 0.2]).astype(np.float32),
    }


def _loss(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    hidden = jnp.tanh(jnp.einsum("bi,ij->bj", batch["x"], params["vision"]["kernel"]))
    error = jnp.einsum("bj,jk->bk", hidden, params["projector"]["kernel"]) + params["projector"]["bias"] - batch["y"]
    rows = jnp.sum(error**2, axis=1)
    weight = batch["weight"]
    return jnp.sum(weight * rows), {"weight": jnp.sum(weight), "error": jnp.sum(weight * jnp.abs(error).sum(1))}


def _place(batch: Any) -> Any:
    return sharding.place_batch(batch, jax.sharding.get_mesh())


def _run(batch: Any, micro_batches: int, steps: int = 4) -> tuple[TrainState, list[dict[str, float]]]:
    step = make_train_step(_loss, OPTIMIZER, micro_batches)
    state = init_state(_params(), CONFIG, OPTIMIZER)
    history = []
    for number in range(steps):
        state, metrics = step(state, _place(batch), 0.05 / (1 + number))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def _numpy_reference(batch: Any, steps: int = 4) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """AdamW, clipping and decay written out, gradient by the chain rule, float64."""
    o = CONFIG.optimizer
    body = np.float64(_params()["vision"]["kernel"])
    head = {name: np.float64(leaf) for name, leaf in _params()["projector"].items()}
    m = {name: np.zeros_like(leaf) for name, leaf in head.items()}
    v = {name: np.zeros_like(leaf) for name, leaf in head.items()}
    x, y, w = (np.float64(batch[name]) for name in ("x", "y", "weight"))
    history = []
    for t in range(1, steps + 1):
        hidden = np.tanh(x @ body)
        error = hidden @ head["kernel"] + head["bias"] - y
        scaled = 2 * w[:, None] * error / w.sum()
        grads = {"kernel": hidden.T @ scaled, "bias": scaled.sum(0)}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        history.append({"loss": (w * (error**2).sum(1)).sum() / w.sum(), "grad_norm": norm})
        for name, grad in grads.items():
            grad = grad * min(1.0, o.clip_norm / norm)
            m[name] = o.beta1 * m[name] + (1 - o.beta1) * grad
            v[name] = o.beta2 * v[name] + (1 - o.beta2) * grad**2
            direction = (m[name] / (1 - o.beta1**t)) / (np.sqrt(v[name] / (1 - o.beta2**t)) + o.eps)
            decay = o.weight_decay if name == "kernel" else 0.0
            head[name] = head[name] - 0.05 / t * (direction + decay * head[name])
    return head, history


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_any_number_of_micro_batches_equals_the_written_out_reference(micro_batches: int):
    batch = _batch()
    state, history = _run(batch, micro_batches)
    head, expected = _numpy_reference(batch)
    for name in head:
        # Float32 against float64 over four updates: a few of the last digits.
        np.testing.assert_allclose(state.trainable["projector"][name], head[name], rtol=2e-5, atol=2e-6)
    for ours, theirs in zip(history, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["weight"] == batch["weight"].sum()
        assert ours["non_finite"] == 0
    assert int(state.step) == 4


def test_the_batch_is_cut_into_every_kth_row_and_each_row_is_used_once():
    seen = []

    def loss(params, batch):
        jax.debug.callback(lambda x: seen.append(x.tolist()), batch["id"], ordered=True)
        return jnp.sum(params["projector"]["kernel"]) * jnp.sum(batch["id"]), {"weight": jnp.float32(1)}

    step = make_train_step(loss, OPTIMIZER, 2)
    step(init_state(_params(), CONFIG, OPTIMIZER), _place({"id": np.arange(6, dtype=np.float32)}), 0.1)
    jax.effects_barrier()
    assert seen == [[0, 2, 4], [1, 3, 5]]


def test_frozen_parts_stay_bit_for_bit_and_have_no_moments():
    state, _ = _run(_batch(), 2)
    assert np.array_equal(state.frozen["vision"]["kernel"], _params()["vision"]["kernel"])
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state.opt))
    assert sizes == [1, 2, 2, 8, 8]  # the count, and two moments of the head alone


def test_frozen_parts_are_kept_in_the_compute_dtype_and_masters_in_float32():
    half = config.Config(train=config.Train(train=("projector",), compute_dtype="bfloat16"))
    state = init_state(_params(), half, OPTIMIZER)
    assert state.frozen["vision"]["kernel"].dtype == jnp.bfloat16
    assert state.trainable["projector"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("poison", ["x", "weight"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_non_finite_update_is_skipped_and_flagged(poison: str, micro_batches: int):
    good, bad = _batch(), _batch()
    bad[poison] = bad[poison].copy()
    bad[poison].flat[3] = np.nan
    step = make_train_step(_loss, OPTIMIZER, micro_batches)
    state, _ = step(init_state(_params(), CONFIG, OPTIMIZER), _place(good), 0.05)
    before = jax.tree.map(np.array, (state.trainable, state.opt))
    state, metrics = step(state, _place(bad), 0.05)
    assert int(metrics["non_finite"]) == 1
    jax.tree.map(np.testing.assert_array_equal, before, (state.trainable, state.opt))
    assert int(state.step) == 2  # the batch is consumed all the same: the position in the data moves on
    state, metrics = step(state, _place(good), 0.05)
    assert int(metrics["non_finite"]) == 0 and np.isfinite(float(metrics["loss"]))


def test_a_batch_without_weight_changes_nothing_and_is_flagged():
    batch = _batch() | {"weight": np.zeros(8, np.float32)}
    state, (metrics,) = _run(batch, 1, steps=1)
    assert metrics["weight"] == 0 and metrics["non_finite"] == 1
    np.testing.assert_array_equal(state.trainable["projector"]["kernel"], _params()["projector"]["kernel"])


def test_the_callers_parameters_survive_the_donated_state():
    params = jax.tree.map(jnp.asarray, _params())
    step = make_train_step(_loss, OPTIMIZER, 1)
    state = init_state(params, CONFIG, OPTIMIZER)
    step(state, _place(_batch()), 0.1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt)))
    jax.tree.map(np.testing.assert_array_equal, params, _params())


def test_the_learning_rate_is_an_argument_of_one_program():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return _loss(params, batch)

    step = make_train_step(loss, OPTIMIZER, 1)
    state = init_state(_params(), CONFIG, OPTIMIZER)
    for rate in (0.1, 0.01, 1e-5):
        state, _ = step(state, _place(_batch()), rate)
    assert len(traces) == 1


def test_micro_batches_keep_the_rows_placement(_mesh):
    def loss(params, batch):
        assert jax.typeof(batch["x"]).sharding.spec == PartitionSpec(("data", "fsdp"), None)
        assert batch["x"].shape == (4, 6)
        return _loss(params, batch)

    make_train_step(loss, OPTIMIZER, 2)(init_state(_params(), CONFIG, OPTIMIZER), _place(_batch()), 0.1)


def test_an_unknown_part_is_refused():
    with pytest.raises(UserError, match=r"'tail'.*projector, vision"):
        split_params(_params(), ("tail",))
