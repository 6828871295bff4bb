"""The mesh and where batches lie; many devices are in tests/multi_device."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from infimed_jax import config, sharding
from infimed_jax.errors import UserError


def one_device_mesh():
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


def test_all_axes_exist_and_are_explicit():
    mesh = one_device_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize("sizes", [(1, 1, 2), (3, 1, 1), (2, -1, 1)])
def test_sizes_that_do_not_multiply_are_refused(sizes):
    with pytest.raises(UserError, match=r"do not multiply to the 1 devices.*set one to -1"):
        sharding.make_mesh(config.Mesh(*sizes), jax.devices()[:1])


def test_a_batch_is_split_over_data_and_fsdp_and_keeps_its_values():
    mesh = one_device_mesh()
    batch = {"tokens": np.arange(12).reshape(4, 3), "pixels": np.zeros((4, 2, 5), np.uint8)}
    placed = sharding.place_batch(batch, mesh)
    assert placed["tokens"].sharding.spec == PartitionSpec(("data", "fsdp"))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    np.testing.assert_array_equal(sharding.local_rows(4, mesh), np.arange(4))


def test_replicate_keeps_values():
    mesh = one_device_mesh()
    tree = {"a": np.arange(3.0), "b": np.float32(2)}
    placed = sharding.replicate(tree, mesh)
    assert placed["a"].sharding.spec == PartitionSpec()
    jax.tree.map(np.testing.assert_array_equal, placed, tree)


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
    sharding.check_fits(config.Model(), sharding.abstract_mesh(1, 1, 8))
    with pytest.raises(UserError, match=r"mesh.tensor=16 does not divide model.text.num_kv_heads=8"):
        sharding.check_fits(config.Model(), sharding.abstract_mesh(1, 1, 16))
