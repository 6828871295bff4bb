"""The bound: bytes of products against the shapes of one device, and each unit at its peak."""

import pytest

from infimed_jax import config
from infimed_jax.cost.chips import parse_topology
from infimed_jax.cost.flops import Product, products
from infimed_jax.ops.attention import backend
from infimed_jax.plan.collectives import GATHER, REDUCE, Collective
from infimed_jax.plan.roofline import roofline


@pytest.mark.parametrize(
    ("split", "operands"),
    [
        ("outer", ((24, 64), (64, 16), (24, 16))),  # columns of the kernel
        ("inner", ((24, 32), (32, 32), (24, 32))),  # rows of the kernel: the result is a sum over devices
        ("rows", ((12, 64), (64, 32), (12, 32))),  # heads of the scores
        ("", ((24, 64), (64, 32), (24, 32))),
    ],
)
def test_a_product_reads_and_writes_its_device_s_shapes(split, operands):
    item = Product("text", "any", 96, 64, 32, count=3, recomputed=1, backward=2, split=split)
    assert item.bytes(batch_shards=4, tensor=2) == 2 * sum(a * b for a, b in operands) * 3 * 4
    fused = Product("text", "scores", 96, 64, 32, split=split, fused=True)
    assert fused.bytes(4, 2) == 2 * sum(a * b for a, b in operands[:2])


def test_bytes_of_a_row_parallel_product_shrink_with_its_input():
    """down_proj over `tensor`: the kernel and the wide input are split, the narrow result is not."""
    down = next(item for item in products(config.Config(), rows=8) if item.name == "down_proj")
    whole, split = down.bytes(8, 1), down.bytes(8, 8)
    wide, narrow, kernel = 4096 * 9728, 4096 * 2560, 9728 * 2560
    assert whole / split == (wide + kernel + narrow) / ((wide + kernel) / 8 + narrow)


@pytest.mark.parametrize(("length", "block"), [(4096, 512), (512, 512), (768, 256), (384, 128), (100, 100)])
def test_causal_keys_are_those_of_the_blocks_that_are_computed(length, block):
    computed = sum(k // block <= q // block for q in range(0, length, block) for k in range(0, length, block))
    assert backend("splash").causal_keys(length) == computed * block**2 / length


def test_the_slowest_unit_bounds_the_step():
    topology, mesh = parse_topology("h100x8"), {"data": 1, "fsdp": 8, "tensor": 1}
    work = [Product("text", "any", 800, 64, 32, backward=2)]
    moved = [Collective("weights", "text", GATHER, 800, 8, 5), Collective("gradients", "text", REDUCE, 80, 8, 1)]
    bound = roofline(config.Config(), topology, mesh, work, moved, masters=1000, moments=500)
    assert bound.arithmetic == 2 * 100 * 64 * 32 * 3 / 989e12
    # Gradient read, master read and written; both moments, whatever their type, read and written.
    assert bound.memory == (work[0].bytes(8, 1) + 3 * 1000 + 2 * 500) / 3350e9
    assert bound.network == pytest.approx((7 / 8 * 800 * 5 + 2 * 7 / 8 * 80) / 450e9)
    assert bound.step == max(bound.arithmetic, bound.memory, bound.network) == getattr(bound, bound.bound)
    assert bound.peak_share == pytest.approx(2 * 800 * 64 * 32 * 3 / (bound.step * 989e12 * topology.devices))


def test_collectives_within_a_node_go_over_its_own_links():
    """16 GPUs in nodes of 8: a mesh whose fsdp groups are a node gathers weights nine times as fast."""
    topology = parse_topology("h100x16")
    weights = Collective("weights", "text", GATHER, 10**9, 8, 1)
    gradients = Collective("gradients", "text", REDUCE, 10**6, 16, 1)
    activations = Collective("activations", "text", REDUCE, 10**9, 2, 1)

    def network(data, fsdp, tensor, *moved):
        mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
        return roofline(config.Config(), topology, mesh, [], moved, masters=0, moments=0).network

    out = 2 * 15 / 16 * 10**6 / 50e9
    assert network(2, 8, 1, weights, gradients) == pytest.approx(max(7 / 8 * 10**9 / 450e9, out))
    assert network(1, 8, 2, weights, gradients) == pytest.approx(7 / 8 * 10**9 / 50e9 + out)
    assert network(1, 8, 2, activations) == pytest.approx(10**9 / 450e9)
    assert network(2, 8, 1, gradients) == pytest.approx(out)
