"""Twenty steps on one, two, four and eight devices, each mesh axis in turn: the same losses."""

import numpy as np

from tests.multi_device import worker


def test_every_mesh_gives_the_losses_of_one_device():
    found = worker.run("tests.multi_device.train_worker")
    expected = found.pop("(1, 1, 1)")
    assert (
        len(found) == 3 and len(expected) == 20 and expected[-1] < 0.9 * expected[0]
    )  # twenty updates that do something
    for shape, losses in found.items():
        # Float32 sums in another order, carried through twenty updates of Adam.
        np.testing.assert_allclose(losses, expected, rtol=2e-4, err_msg=shape)
