"""Adaptive average pooling against torch."""

import numpy as np
import pytest
import torch

from infimed_jax.ops.pooling import adaptive_average_pool, averaging_matrix


@pytest.mark.parametrize(
    ("side", "grid"), [(27, 12), (27, 27), (27, 1), (27, 26), (24, 12), (6, 4), (6, 5), (6, 6), (5, 3), (7, 2), (16, 9)]
)
def test_pooling_is_torchs(side, grid):
    x = np.random.default_rng(side * 31 + grid).normal(size=(2, side * side, 5)).astype(np.float32)
    square = torch.from_numpy(x).reshape(2, side, side, 5).permute(0, 3, 1, 2)
    expected = torch.nn.AdaptiveAvgPool2d(grid)(square).permute(0, 2, 3, 1).reshape(2, grid * grid, 5)
    np.testing.assert_allclose(adaptive_average_pool(x, grid), expected.numpy(), atol=1e-6)


def test_every_matrix_is_torchs():
    for size in range(1, 30):
        for bins in range(1, size + 1):
            expected = torch.nn.AdaptiveAvgPool1d(bins)(torch.eye(size)).numpy().T
            np.testing.assert_allclose(averaging_matrix(size, bins), expected, atol=1e-7, err_msg=f"{size} to {bins}")


def test_the_papers_bins():
    """recipe: 27 to 12, every bin three wide."""
    matrix = averaging_matrix(27, 12)
    assert [int(row.argmax()) for row in matrix] == [0, 2, 4, 6, 9, 11, 13, 15, 18, 20, 22, 24]
    assert [int((row > 0).sum()) for row in matrix] == [3] * 12
