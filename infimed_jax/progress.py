"""How a long step reports its progress, and the numbers of a report as text for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Report = Callable[[int, int, str], None]
"""Called with (done, total, note). `total` is 0 while the end is unknown; an empty note shows the two numbers."""


def progress_line(step: int, total: int, row: Mapping[str, Any]) -> str:
    """`step 40/120  loss 1.2345  …`: what the row of metrics.jsonl has of loss, reward, speed, memory and time left."""
    parts = [f"step {step}/{total}"]
    for name, form in _FORMS.items():
        if name in row:
            parts.append(form(row[name]))
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """3:07, or 2:03:07 from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def gigabytes(done: int, total: int) -> str:
    """`1.2 of 8.0 GB`."""
    return f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"


_FORMS: dict[str, Callable[[Any], str]] = {
    "loss": lambda x: f"loss {x:.4f}",
    "reward": lambda x: f"reward {x:.4f}",
    "accuracy": lambda x: f"accuracy {x:.4f}",
    "tokens_per_second": lambda x: f"{x:,.0f} tokens/s",
    "images_per_second": lambda x: f"{x:,.1f} images/s",
    "peak_share": lambda x: f"{x:.1%} of peak",
    "data_wait_share": lambda x: f"{x:.0%} waiting for data",
    "memory_gib": lambda x: f"{x:.1f} GiB",
    "seconds_left": lambda x: f"{clock(x)} left",
}
