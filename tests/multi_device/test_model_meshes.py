"""Eight virtual devices compute what one computes, on every mesh axis, with every array where it was declared."""

import numpy as np
import pytest

from tests.multi_device import worker

SHARDS = {
    "(8, 1, 1) xla True": {"q_proj": [2, 32, 16, 4], "embed": [96, 32]},
    "(1, 8, 1) xla True": {"q_proj": [2, 4, 16, 4], "embed": [96, 4]},
    "(1, 1, 8) xla True": {"q_proj": [2, 32, 2, 4], "embed": [12, 32]},
    "(2, 2, 2) xla False": {"q_proj": [2, 16, 8, 4], "embed": [48, 16]},
    "(2, 2, 2) auto True": {"q_proj": [2, 16, 8, 4], "embed": [48, 16]},
}
"""Mesh (data, fsdp, tensor), attention, tied embeddings → the shapes that one device holds."""


@pytest.fixture(scope="module")
def results():
    return worker.run("tests.multi_device.model_worker")


@pytest.mark.parametrize("case", SHARDS)
def test_loss_and_gradients_equal_one_device(results, case):
    result = results["cases"][case]
    np.testing.assert_allclose(*result["loss"], rtol=1e-6)
    np.testing.assert_allclose(*result["entropy"], rtol=1e-6)
    assert result["grad_gap"] < 1e-5  # gradients are of order 0.1: sums in another order
    assert result["init_gap"] == 0.0  # the same key gives the same model on any mesh


@pytest.mark.parametrize("case", SHARDS)
def test_everything_is_placed_as_declared(results, case):
    result = results["cases"][case]
    assert result["shards"] == SHARDS[case]
    assert result["grads_placed"], "a gradient does not lie where its parameter lies"
    assert result["abstract_placed"], "jax.eval_shape(init) gives other shardings than init"


@pytest.mark.parametrize("mesh", ["(8, 1, 1)", "(2, 2, 2)"])
def test_the_visual_merge_has_no_collective(results, mesh):
    found = results["merge"][mesh]
    assert found["ours"] == []
    assert found["across rows"], "the control must show what this test looks for"
