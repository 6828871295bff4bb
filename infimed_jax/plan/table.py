"""The plan as a person reads it: a table, best first, and what the figures assume."""

from __future__ import annotations

from collections.abc import Sequence

from infimed_jax.cost.chips import GIB
from infimed_jax.plan.cell import Cell
from infimed_jax.plan.roofline import ASSUMPTIONS

_COLUMNS = (
    "topology", "mesh d,f,t", "remat", "fits", "GiB", "param", "moment", "grad", "rest", "of", "step s >=", "bound by",
    "tokens/s <=", "peak <=", "PFLOP", "sent GiB",
)  # fmt: skip


def render(cells: Sequence[Cell]) -> str:
    """`cells` as lines; an estimate is marked with ~."""
    rows = [_COLUMNS, *map(_row, cells)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            text.ljust(width) if i < 3 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join([*lines, *(_rollout(cell) for cell in cells if cell["rollout"])])


def _rollout(cell: Cell) -> str:
    """GRPO's other half in a line; its updates are the table's."""
    found = cell["rollout"]
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    return (
        f"{cell['topology']} rollout of {found['completions']:,} completions: {fits} "
        f"({_gib(found['needed'])} GiB with the state: sampler's weights {_gib(found['sampler_weights'])}, "
        f"cache {_gib(found['cache'])}), {(found['prefill_flops'] + found['decode_flops']) / 1e15:.3g} PFLOP, "
        f"{found['seconds']:.3g} s or more, bound by {found['bound_by']}"
    )


def _row(cell: Cell) -> tuple[str, ...]:
    memory, roof, about = cell["memory"], cell["roofline"], "~" if cell["estimate"] else ""
    rest = memory["activations_and_temporaries"]
    return (
        cell["topology"],
        ",".join(str(size) for size in cell["mesh"].values()),
        cell["remat"],
        about + ("yes" if cell["fits"] else "NO"),
        about + _gib(memory["needed"]),
        _gib(memory["parameters"] + memory["reference"]),
        _gib(memory["moments"]),
        _gib(memory["gradients"]),
        about + ("?" if rest is None else _gib(rest)),
        _gib(memory["available"]),
        f"{roof['step_seconds']:.3g}",
        roof["bound_by"],
        f"{roof['tokens_per_second']:,.0f}",
        f"{roof['peak_share']:.0%}",
        f"{cell['flops_a_step']['total'] / 1e15:.3g}",
        _gib(cell["bytes_sent_a_device"]["total"]),
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def heading(cell: Cell) -> str:
    """What is planned, in one line: the same for every topology."""
    counts = cell["parameters"]
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if part != "total")
    return (
        f"{cell['stage']}: {counts['total']:,} parameters ({parts}); "
        f"{cell['rows_a_step']} rows, {cell['tokens_a_step']:,} tokens and "
        f"{cell['images_a_step']:,} images a step in {cell['micro_batches']} micro-batch(es)"
        + (f"; LoRA of rank {cell['lora']}" if cell["lora"] else "")
        + ("; two pieces of an update, the rollout below the table" if cell["rollout"] else "")
    )


def notes() -> str:
    """What each column is, and what the bound assumes."""
    return "\n".join(
        (
            "GiB a device: needed in all; parameters (GRPO: and its reference), moments, gradients, the rest "
            "(activations, gathered weights).",
            "~ counted from the configuration; without it, the TPU compiler's own figure. Sent: by one device, a step.",
            *(f"Assumed: {line}." for line in ASSUMPTIONS),
        )
    )
