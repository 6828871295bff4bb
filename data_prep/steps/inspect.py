"""Packed rows as the model gets them, to look at: images, tokens by loss and sample, and how rows are filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from infimed_jax.config import Model
from infimed_jax.data.chat import Tokenizer, render
from infimed_jax.data.images import ImageError, decode_image, visual_tokens
from infimed_jax.data.packing import PackingIndex
from infimed_jax.data.storage import CorruptRecord, Samples
from infimed_jax.errors import UserError
from infimed_jax.report.page import data_url, write_page
from infimed_jax.report.plot import SERIES

_SIDE = 224


def write_inspection(
    samples: Samples, index: PackingIndex, tokenizer: Tokenizer, model: Model, file: Path, rows: int
) -> None:
    """The first `rows` rows as the HTML page `file`."""
    if rows < 1:
        raise UserError(f"rows to look at must be at least 1, not {rows}")
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "name": samples.name,
        "samples": len(index.samples),
        "index": index,
        "rows": [_row(samples, index, tokenizer, model, row) for row in range(min(rows, index.rows))],
    }
    write_page(file, Path(__file__).with_name("inspect.html.jinja"), values)


def _row(samples: Samples, index: PackingIndex, tokenizer: Tokenizer, model: Model, number: int) -> dict[str, Any]:
    numbers, lengths = index.row(number)
    shown = [
        _sample(samples, int(n), tokenizer, model)
        | {"share": length / index.buckets[index.row_bucket[number]][0], "colour": SERIES[place % len(SERIES)]}
        for place, (n, length) in enumerate(zip(numbers, lengths, strict=True))
    ]
    context = index.buckets[index.row_bucket[number]][0]
    return {"number": number, "tokens": int(lengths.sum()), "context": context, "samples": shown}


def _sample(samples: Samples, number: int, tokenizer: Tokenizer, model: Model) -> dict[str, Any]:
    """Name, facts, images as the model sees them (square) or why there is none, and runs of neighbouring tokens:
    (kind, text), where kind is `visual`, `learnt` with loss, or `context` without."""
    try:
        sample = samples[number]
    except CorruptRecord:
        return {"name": f"record {number}", "facts": "cannot be read", "images": [], "errors": [], "runs": []}
    segment = render(sample, tokenizer, visual_tokens(sample.images, model))
    runs: list[tuple[str, list[int]]] = []
    for token, target, visual in zip(segment.tokens, segment.targets, segment.visual, strict=True):
        kind = "visual" if visual else "learnt" if target else "context"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(int(token))
    images, errors = [], []
    for data in sample.images:
        try:
            images.append(data_url(Image.fromarray(decode_image(data, _SIDE))))
        except ImageError as error:
            errors.append(f"image: {error.reason}")
    return {
        "name": sample.id,
        "facts": f"({sample.kind}, {len(segment)} tokens)",
        "images": images,
        "errors": errors,
        "runs": [(k, f"[{len(t)} image tokens]" if k == "visual" else tokenizer.decode(t)) for k, t in runs],
    }
