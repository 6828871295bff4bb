"""A bound on a step's time: the slowest of arithmetic, memory and network, each at its vendor's peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infimed_jax import config
from infimed_jax.cost.chips import Topology
from infimed_jax.cost.flops import Product, device_flops
from infimed_jax.plan.collectives import Collective, span

ASSUMPTIONS = (
    "every unit at its peak; arithmetic, memory and network wholly overlapped",
    "full rows: every image slot and every token used; every chunk of the loss computed",
    "HBM: operands and results of matrix products in bfloat16, and the optimizer's arrays; nothing else",
    "network: rings over all links of a device, one direction; what spans GPUs of several nodes at the node's links",
    "share of peak: without recomputation and masked scores, the frozen encoder's forward pass counted",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds; `step` is the largest, the others are what it is the largest of."""

    arithmetic: float
    memory: float
    network: float
    model_flops: float
    """FLOPs of a step over the pod, without recomputation."""
    peak: float
    """FLOPs a second of all devices."""

    @property
    def step(self) -> float:
        return max(self.arithmetic, self.memory, self.network)

    @property
    def bound(self) -> str:
        return max(("arithmetic", "memory", "network"), key=lambda name: getattr(self, name))

    @property
    def peak_share(self) -> float:
        """Model FLOPs at the bound, as a share of peak: no run can show more."""
        return self.model_flops / (self.step * self.peak)


def roofline(
    cfg: config.Config,
    topology: Topology,
    mesh: dict[str, int],
    work: Sequence[Product],
    moved: Sequence[Collective],
    masters: int,
    moments: int,
) -> Roofline:
    """`masters` and `moments`: bytes of what learns, and of its optimizer's state, on one device."""
    chip, shards = topology.chip, mesh["data"] * mesh["fsdp"]
    optimizer = 3 * masters + 2 * moments  # the gradient is read, masters and moments are read and written
    traffic = sum(item.bytes(shards, mesh["tensor"]) for item in work) + optimizer
    return Roofline(
        arithmetic=device_flops(work, mesh) / chip.flops,
        memory=traffic / chip.bandwidth,
        network=_network(topology, mesh, moved),
        model_flops=sum(item.model_flops for item in work),
        peak=chip.flops * topology.devices,
    )


def _network(topology: Topology, mesh: dict[str, int], moved: Sequence[Collective]) -> float:
    """Seconds of the busier kind of link: those within a node and those out of it work side by side."""
    busy: dict[float, float] = {}
    for item in moved:
        link = topology.link(span(item, mesh))
        busy[link] = busy.get(link, 0.0) + item.sent / link
    return max(busy.values(), default=0.0)
