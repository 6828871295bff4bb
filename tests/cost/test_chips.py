"""Names of machines: what they mean, and what a mistake is answered with."""

import pytest

from infimed_jax.cost.chips import parse_topology
from infimed_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "kind", "devices"),
    [
        ("v5p:4x4x8", "v5p", 128),
        ("v6e:16x16", "v6e", 256),
        ("tpu7x:2x2x1", "tpu7x", 8),  # two devices a chip
        ("h100x8", "h100", 8),
        ("h800x32", "h800", 32),
    ],
)
def test_devices_of_a_topology(name, kind, devices):
    topology = parse_topology(name)
    assert (topology.kind, topology.devices) == (kind, devices)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("v5p", "v5p:4x4x8"),
        ("", "v5p:4x4x8"),
        ("v5q:2x2x2", "v5p"),
        ("b9x8", "known:"),
        ("h100:2x2", "h100x8"),
        ("v6ex8", "v6e:2x2x4"),
        ("h100x0", "no devices"),
        ("v5p:2x2x2x2", "v5p:4x4x8"),
    ],
)
def test_a_mistake_names_the_mend(name, word):
    with pytest.raises(UserError, match=word):
        parse_topology(name)


def test_groups_that_leave_a_node_count_on_the_slower_links():
    gpus = parse_topology("h100x16")
    assert gpus.link(8) == 9 * gpus.link(16)
    assert parse_topology("v5p:8x8x8").link(512) == parse_topology("v5p:2x2x1").link(4)
