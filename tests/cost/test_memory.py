"""What a step keeps: the choice of activations by estimate, and no activation of a frozen tower."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from infimed_jax import config, sharding
from infimed_jax.cost import memory
from infimed_jax.data.batch import Batch
from infimed_jax.models.compute import Compute
from infimed_jax.models.infimed import config as infimed
from infimed_jax.train.optimizer import make_optimizer
from infimed_jax.train.state import abstract_state, merge_params
from infimed_jax.train.step import next_token_loss
from tests.tiny import one_device


@pytest.fixture(autouse=True)
def _mesh():
    with one_device():
        yield jax.sharding.get_mesh()


def _kept(base: config.Model, layers: int, parts: tuple[str, ...], remat: str) -> int:
    """Bytes that the backward pass holds on to, parameters included: the leaves of `jax.vjp`'s function."""
    model = replace(base, vision=replace(base.vision, num_layers=layers))
    train = config.Train(train=parts, compute_dtype="float32", remat=remat, attention="xla")
    cfg = config.Config(model=model, train=train)
    i32, side = jnp.zeros((2, 24), jnp.int32), model.vision.image_size
    batch = Batch(i32, i32, i32[:, None], jnp.zeros((2, 24)), i32, jnp.zeros((2, 1, side, side, 3), jnp.uint8))
    batch = sharding.place_batch(batch, jax.sharding.get_mesh())
    state = abstract_state(cfg, make_optimizer(cfg.optimizer))
    loss = next_token_loss(model, Compute.of(train))

    def backward(trainable, frozen):
        return jax.vjp(lambda learnt: loss(merge_params(learnt, frozen), batch)[0], trainable)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, state.trainable, state.frozen))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_frozen_tower_leaves_nothing_for_the_backward_pass(model, remat):
    """Four times the blocks, not a byte more; where the tower learns, each block costs."""
    frozen = ("projector", "text")
    assert _kept(model, 8, frozen, remat) == _kept(model, 2, frozen, remat)
    assert _kept(model, 8, ("vision", *frozen), remat) > _kept(model, 2, ("vision", *frozen), remat)


def test_a_tower_of_many_images_is_the_peak_of_a_small_text_model():
    """Its dense scores, float32 and bfloat16, exist for all images of a device at once."""
    text = infimed.Text(vocab_size=128, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=1, num_kv_heads=1)
    cfg = config.Config(
        model=infimed.Model(text=text), data=config.Data(images_per_row=24), train=config.Train(remat="full")
    )
    scores = 24 * 16 * 729**2 * (4 + 2)
    assert scores < memory.activation_estimate(cfg, 1, {"data": 1, "fsdp": 1, "tensor": 1}) < 1.5 * scores


def test_dots_bytes_are_what_an_ahead_of_time_compilation_showed():
    """4B, 2 rows of 4096 a chip: 23.8 GiB with dots, 8.6 with full remat (design notes, compiled for v5p)."""
    cfg = config.Config()
    found = cfg.model.text.num_layers * memory.dots_bytes(cfg, 2, 1) / 2**30
    assert found == pytest.approx(23.8 - 8.6, rel=0.05)


@pytest.mark.parametrize(("room", "expected"), [(1e12, "dots"), (1e6, "full")])
def test_auto_keeps_the_products_where_there_is_room(model, monkeypatch, caplog, _mesh, room, expected):
    caplog.set_level("INFO")
    cfg = config.Config(model=model, train=config.Train(global_batch=8))
    state = abstract_state(cfg, make_optimizer(cfg.optimizer))
    assert memory.choose_remat(cfg, state, _mesh, 8, (512, 2), available=room) == expected
    assert not caplog.records, "a plan asks for many machines"
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: room)
    assert memory.choose_remat(cfg, state, _mesh, 8, (512, 2)) == expected
    assert caplog.records[-1].getMessage().startswith(f"activations: {expected} (")
    asked = replace(cfg, train=replace(cfg.train, remat="none"))
    assert memory.choose_remat(asked, state, _mesh, 8, (512, 2)) == "none"


@pytest.mark.parametrize("settings", [{"micro_batches": 2}, {"rows_per_device": 4}])
def test_accumulated_gradients_are_held_twice(model, _mesh, settings):
    """A micro-batch's and the sum so far: with room for one and a half of them, only the undivided batch keeps more."""
    whole = config.Config(model=model, train=config.Train(global_batch=8))
    state = abstract_state(whole, make_optimizer(whole.optimizer))
    kept = replace(
        whole,
        data=replace(whole.data, context=64, images_per_row=1),
        train=replace(whole.train, remat="dots"),
    )
    needed = memory.local_bytes(state) + memory.activation_estimate(kept, 4, dict(_mesh.shape))
    room = (needed + 1.5 * memory.local_bytes(state.trainable)) / 0.8
    divided = replace(whole, train=replace(whole.train, **settings))
    for cfg, expected in ((whole, "dots"), (divided, "full")):
        assert memory.choose_remat(cfg, state, _mesh, 4, (64, 1), available=room) == expected


def test_local_bytes_are_the_states(model):
    cfg = config.Config(model=model, train=config.Train(compute_dtype="float32"))
    state = abstract_state(cfg, make_optimizer(cfg.optimizer))
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(state.frozen))
    assert memory.local_bytes(state) == 4 * (3 * trained + frozen + 2)  # masters, two moments; the count and the step
