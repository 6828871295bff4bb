"""The machines that can be planned for: their chips' figures, and the parsing of `v5p:4x4x8` and `h100x32`."""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass

from infimed_jax.errors import UserError

GIB = 2**30
_DESCRIPTION = 1024
"""Bytes that a device takes at least where a machine is described to a compiler."""


@dataclass(frozen=True)
class Chip:
    """Vendor's figures for one device as JAX shows it."""

    flops: float
    """Peak of dense bfloat16 products, FLOPs a second."""
    memory: int
    """Bytes of HBM."""
    bandwidth: float
    """Bandwidth of HBM, bytes a second."""
    link: float
    """One direction, all links of the device together, within a slice or a node; bytes a second."""
    source: str
    tpu: bool = False
    devices_per_chip: int = 1
    node: int = 0
    """GPUs that share the fast links; 0: all of them (a TPU slice)."""
    node_link: float = 0.0
    """One direction out of the node, a GPU; bytes a second."""


_TPU = "cloud.google.com/tpu/docs/"
_DGX = "NVIDIA data sheet (dense bfloat16) and DGX guide, one 400 Gb/s port a GPU (A100: 200)"
CHIPS = {
    # Google gives the links' two directions together: half of it is one direction.
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, _TPU + "v5e", tpu=True),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, _TPU + "v5p", tpu=True),
    "v6e": Chip(918e12, 32 * GIB, 1600e9, 400e9, _TPU + "v6e", tpu=True),
    # Two devices a chip, each with half of everything.
    "tpu7x": Chip(2307e12 / 2, 96 * GIB, 7380e9 / 2, 300e9, _TPU + "tpu7x", tpu=True, devices_per_chip=2),
    "a100": Chip(312e12, 80 * 10**9, 2039e9, 300e9, _DGX, node=8, node_link=25e9),
    "h800": Chip(989e12, 80 * 10**9, 3350e9, 200e9, _DGX + "; H800 has 400 GB/s of NVLink", node=8, node_link=50e9),
    "h100": Chip(989e12, 80 * 10**9, 3350e9, 450e9, _DGX, node=8, node_link=50e9),
    "h200": Chip(989e12, 141 * 10**9, 4800e9, 450e9, _DGX, node=8, node_link=50e9),
}
"""Device kind → its figures; memory as the vendor counts it."""

_PEAKS = {
    **{"TPU v5 lite": CHIPS["v5e"].flops, "TPU v5e": CHIPS["v5e"].flops},
    **{"TPU v5": CHIPS["v5p"].flops, "TPU v6 lite": CHIPS["v6e"].flops, "TPU v6e": CHIPS["v6e"].flops},
    **{"TPU7x": CHIPS["tpu7x"].flops, "TPU v4": 275e12},
    **{"A100": CHIPS["a100"].flops, "H800": CHIPS["h800"].flops, "H200": CHIPS["h200"].flops},
    **{"H100": CHIPS["h100"].flops, "H100 PCIe": 756e12, "B200": 2250e12},
}
"""JAX's name of a device → its peak in dense bfloat16, FLOPs a second."""

_FORM = re.compile(r"(?P<kind>[a-z0-9]+?)(:(?P<shape>\d+(x\d+){1,2})|x(?P<count>\d+))")


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device as JAX names it; None where no figure is known. The longest name that occurs decides."""
    known = [name for name in _PEAKS if name in device_kind]
    return _PEAKS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class Topology:
    """Devices of one kind, connected."""

    name: str
    """As the user wrote it, and as libtpu reads it."""
    kind: str
    devices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    def link(self, span: int) -> float:
        """Bytes a second, one direction, that a collective can count on, a device, whose group lies in `span` of them.

        The devices of a node are neighbours in the mesh.
        """
        chip = self.chip
        return chip.node_link if chip.node and span > chip.node else chip.link


def parse_topology(name: str) -> Topology:
    """`v5p:4x4x8` (chips along each axis of a TPU slice) or `h100x32` (that many GPUs).

    Raises UserError for another form, an unknown chip, or a slice shape for a GPU.
    """
    found = _FORM.fullmatch(name)
    if not found:
        raise UserError(f"--topology {name!r} must look like v5p:4x4x8 (TPU) or h100x8 (GPUs)")
    kind = found["kind"]
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(CHIPS)}"
        raise UserError(f"--topology {name!r}: no figures for the chip {kind!r}; {hint}")
    chip = CHIPS[kind]
    if chip.tpu != bool(found["shape"]):
        form = f"{kind}:2x2x4, chips along each axis" if chip.tpu else f"{kind}x8, the number of GPUs"
        raise UserError(f"--topology {name!r}: write {form}")
    sides = [int(side) for side in (found["shape"] or found["count"]).split("x")]
    devices = math.prod(sides) * chip.devices_per_chip
    if devices == 0:
        raise UserError(f"--topology {name!r} has no devices")
    if (needed := devices * _DESCRIPTION) > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise UserError(
            f"--topology {name!r}: to describe {devices:,} devices takes {needed / GIB:,.0f} GiB, and this machine has "
            f"{there / GIB:,.0f}: name fewer"
        )
    return Topology(name, kind, devices)
