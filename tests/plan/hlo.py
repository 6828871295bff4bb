"""Reads a compiled program's text: FLOPs of its dots and bytes of its collectives, loops multiplied by their trips.

Independent of `infimed_jax.plan`: it knows HLO and nothing of the model. XLA's own cost analysis counts a loop's body
once, whatever its trips.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass
class Computation:
    shapes: dict[str, str] = field(default_factory=dict)
    lines: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(name, shape, opcode, rest)"""


@dataclass(frozen=True)
class Counts:
    flops: int
    dots: dict[str, int]
    """op_name of each dot → its FLOPs."""
    collectives: dict[tuple[str, int], int]
    """(kind, devices of a group) → bytes of the whole array: what is gathered, reduced or exchanged."""

    def sent(self) -> dict[str, float]:
        """Bytes that a device sends, by kind, where rings do it: (n-1)/n of the array, twice in an all-reduce."""
        total: Counter[str] = Counter()
        for (kind, size), whole in self.collectives.items():
            total[kind] += whole * (size - 1) / size * (2 if kind == "all-reduce" else 1)
        return dict(total)


def count(text: str, trips: Callable[[str], int] | None = None) -> Counts:
    """Of one device's program, as `compiled.as_text()` gives it; `trips` tells those of a loop that does not itself."""
    computations, entry = _parse(text)
    dots: Counter[str] = Counter()
    collectives: Counter[tuple[str, int]] = Counter()

    def walk(name: str, times: int) -> None:
        computation = computations[name]
        for _, shape, opcode, rest in computation.lines:
            if opcode == "dot":
                dots[_op_name(rest)] += times * _dot_flops(shape, rest, computation)
            kind = opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                size, whole = _group(rest), _bytes(shape)
                if opcode == "all-gather-start":  # (operand, result)
                    whole -= whole // (size + 1)
                if kind == "reduce-scatter":
                    whole *= size
                collectives[kind, size] += times * whole
            for called, each in _calls(opcode, rest, trips):
                walk(called, times * each)

    walk(entry, 1)
    return Counts(sum(dots.values()), dict(dots), dict(collectives))


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[1], Computation())
            entry = header[1] if line.startswith("ENTRY") else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            name, shape, opcode, rest = found.groups()
            current.shapes[name] = shape
            current.lines.append((name, shape, opcode, rest))
    return computations, entry


def _calls(opcode: str, rest: str, trips: Callable[[str], int] | None) -> list[tuple[str, int]]:
    if opcode == "while":
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
        assert known or trips, f"a loop of unknown length: {rest[:200]}"
        return [(re.search(r"body=%?([\w.\-]+)", rest)[1], int(known[1]) if known else trips(rest))]
    if opcode == "conditional":  # the branch that computes: the other returns zeros
        branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
        names = (
            [name.strip().lstrip("%") for name in branches[1].split(",")]
            if branches
            else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
        )
        return [(name, 1) for name in names]
    return [(name, 1) for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)]


def _dot_flops(shape: str, rest: str, computation: Computation) -> int:
    left = re.match(r"(?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+)", rest)[1]
    dims = _dims(computation.shapes[left])
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
    inner = math.prod(dims[int(axis)] for axis in contracted.split(",") if axis)
    return 2 * math.prod(_dims(shape)) * inner


def _dims(shape: str) -> list[int]:
    return [int(size) for size in _ARRAY.search(shape)[2].split(",") if size]


def _bytes(shape: str) -> int:
    return sum(
        BYTES[kind] * math.prod(int(size) for size in dims.split(",") if size) for kind, dims in _ARRAY.findall(shape)
    )


def _group(rest: str) -> int:
    """Devices of one group, in any of the three ways of writing replica groups."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", rest)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(size) if size else sizes[name] for name, size in parts)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    assert listed, f"replica groups in a form unknown here: {rest[:300]}"
    return len(listed[1].split(","))


def _op_name(rest: str) -> str:
    found = re.search(r'op_name="([^"]*)"', rest)
    return found[1] if found else ""
