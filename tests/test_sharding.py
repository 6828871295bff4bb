"""The mesh and where batches lie; many devices are in tests/multi_device."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from infimed_jax import config, sharding
from infimed_jax.errors import UserError
from infimed_jax.models.infimed import config as infimed


def one_device_mesh():
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


def test_all_axes_exist_and_are_explicit():
    mesh = one_device_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((2, 2, 1), "mesh.data=2 * mesh.fsdp=2 * mesh.tensor=1 = 4, not the 8 devices at hand: change a size, or set"),
        ((16, 1, 0), "mesh.data=16 * mesh.fsdp=1 * mesh.tensor=1 = 16, not the 8 devices at hand: change a size, or"),
        ((1, 3, 0), "mesh.data=1 * mesh.fsdp=3 * mesh.tensor=1 = 3, not the 8 devices at hand: change a size, or set"),
        ((3, -1, 0), "mesh.data=3 * mesh.tensor=1 = 3 does not divide the 8 devices at hand: change a size"),
        ((16, -1, 0), "mesh.data=16 * mesh.tensor=1 = 16 does not divide the 8 devices at hand: change a size"),
        ((1, -1, 3), "mesh.data=1 * mesh.tensor=3 = 3 does not divide the 8 devices at hand: change a size"),
        ((3, 1, -1), "mesh.data=3 * mesh.fsdp=1 = 3 does not divide the 8 devices at hand: change a size"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused_by_the_product_of_what_was_given(sizes, words):
    settled = sharding.settle_mesh(replace(_config(128), mesh=config.Mesh(*sizes)), 8)
    with pytest.raises(UserError, match=re.escape(words)):
        sharding.mesh_sizes(settled, 8)


def test_a_batch_is_split_over_data_and_fsdp_and_keeps_its_values():
    mesh = one_device_mesh()
    batch = {"tokens": np.arange(12).reshape(4, 3), "pixels": np.zeros((4, 2, 5), np.uint8)}
    placed = sharding.place_batch(batch, mesh)
    assert placed["tokens"].sharding.spec == PartitionSpec(("data", "fsdp"))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    np.testing.assert_array_equal(sharding.local_rows(4, mesh), np.arange(4))


def under(mesh, function, *arguments):
    with jax.sharding.use_abstract_mesh(mesh):
        return function(*arguments)


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(UserError, match=r"6 rows does not split over mesh.data \* mesh.fsdp = 4"):
        sharding.local_rows(6, sharding.abstract_mesh(2, 2, 1))


def test_weights_are_stored_over_fsdp_and_used_whole():
    mesh = sharding.abstract_mesh(1, 16, 4)
    axes = ("embed", "heads", None)
    assert under(mesh, sharding.stored_spec, axes, (64, 8, 5)) == PartitionSpec("fsdp", "tensor", None)
    assert under(mesh, sharding.stored_spec, axes, (24, 8, 5)) == PartitionSpec(None, "tensor", None)
    assert sharding.gathered_spec(axes) == PartitionSpec(None, "tensor", None)


def test_a_tensor_axis_must_divide_the_model():
    sharding.check_fits(infimed.Model(), sharding.abstract_mesh(1, 1, 8))
    with pytest.raises(UserError, match=r"mesh.tensor=16 does not divide .*num_kv_heads=8: choose a divisor of 8, and"):
        sharding.check_fits(infimed.Model(), sharding.abstract_mesh(1, 1, 16))


def _config(rows: int, **train) -> config.Config:
    return config.Config(train=config.Train(global_batch=rows, **train))


@pytest.mark.parametrize(
    ("rows", "devices", "expected"),
    [
        (256, 1, 1),
        (256, 32, 1),
        (128, 128, 1),
        (128, 256, 2),  # fewer rows than devices: two of them share a row
        (256, 1024, 4),
        (128, 24, None),  # 24 = 8 * 3, and 3 divides no head
    ],
)
def test_the_default_mesh_follows_from_devices_and_global_batch(rows, devices, expected):
    if expected is None:
        with pytest.raises(UserError, match=r"128 rows .* do not split over 24 devices .* change train.global_batch"):
            sharding.settle_mesh(_config(rows), devices)
    else:
        assert sharding.settle_mesh(_config(rows), devices) == config.Mesh(data=1, fsdp=-1, tensor=expected)


@pytest.mark.parametrize(("sizes", "axis"), [((8, -1), "data"), ((-1, 8), "fsdp")])
def test_too_few_rows_for_a_size_that_was_asked_for_name_that_size(sizes, axis):
    """Another number of devices would not help; what the message says does: a lower size, or more rows."""
    asked = replace(_config(4), mesh=config.Mesh(*sizes))
    words = f"4 rows (train.global_batch / train.micro_batches) do not split over mesh.{axis}=8: lower mesh.{axis}, or"
    for devices in (8, 16):
        with pytest.raises(UserError, match=re.escape(words)):
            sharding.settle_mesh(asked, devices)
    assert sharding.settle_mesh(replace(asked, train=config.Train(global_batch=16)), 8).tensor == 1
    assert sharding.settle_mesh(replace(asked, mesh=replace(asked.mesh, **{axis: 4})), 8).tensor == 2


def test_a_tensor_axis_that_was_asked_for_stays():
    asked = replace(_config(128), mesh=config.Mesh(2, -1, 4))
    assert sharding.settle_mesh(asked, 256) is asked.mesh
    both = replace(_config(128), mesh=config.Mesh(2, 2))
    assert sharding.settle_mesh(both, 8) == config.Mesh(2, 2, 2)
    with pytest.raises(UserError, match=r"mesh.data=2 \* mesh.fsdp=2 \* mesh.tensor=1 = 4, not the 1 devices"):
        sharding.run_mesh(both, jax.devices()[:1])


@given(
    rows=st.integers(1, 64),
    shards=st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 4)]),
    most=st.integers(0, 5),
    pieces=st.integers(1, 4),
)
def test_micro_batches_follow_from_the_rows_that_a_device_holds(rows, shards, most, pieces):
    mesh, count = sharding.abstract_mesh(*shards), shards[0] * shards[1]
    train = config.Train(global_batch=rows * (1 if most else pieces), micro_batches=1 if most else pieces)
    train = replace(train, rows_per_device=most)
    if rows % count:
        with pytest.raises(UserError, match="do not split over"):
            sharding.micro_batches(train, mesh)
        return
    found = sharding.micro_batches(train, mesh)
    if not most:
        assert found == pieces
        return
    fits = [k for k in range(1, rows + 1) if rows % (k * count) == 0 and rows // (k * count) <= most]
    assert found == min(fits)
