"""A page that shows packed rows as the model gets them: images, tokens by loss and segment, and how rows are filled."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from infimed_jax.data.chat import Tokenizer, render
from infimed_jax.data.images import ImageError, decode_image
from infimed_jax.data.packing import PackingIndex
from infimed_jax.data.storage import CorruptRecord, Samples
from infimed_jax.files import write_text

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_SIDE = 224
_STYLE = """
body { font: 14px/1.6 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
.row { display: flex; height: 26px; background: #e4e4e4; margin: 4px 0 1em } .row div { border-right: 1px solid #fff }
.sample { border-left: 6px solid; padding: 0 0 0 1em; margin: 1em 0; overflow-wrap: anywhere }
.t { white-space: pre-wrap; border-radius: 2px } .learnt { background: #b9e5c3 } .v { color: #777; font-style: italic }
img { max-height: 224px; margin: 4px 8px 4px 0; vertical-align: top }
"""


def write_inspection(
    samples: Samples, index: PackingIndex, tokenizer: Tokenizer, visual_tokens: int, file: Path, rows: int
) -> None:
    """The first `rows` rows as one HTML file without scripts or outside links. Every text is escaped."""
    parts = [_row(samples, index, tokenizer, visual_tokens, row) for row in range(min(rows, index.rows))]
    text = (
        f"<!doctype html><html><head><meta charset='utf-8'><title>{escape(samples.name)}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{escape(samples.name)}</h1><p>{len(index.samples):,} samples in "
        f"{index.rows:,} rows, filled to {index.fill:.2%}; no packing passes {index.fill_bound:.2%}. "
        "<span class='learnt'>Green tokens carry loss.</span> Bars show the samples of a row; grey is padding.</p>"
        f"{''.join(parts)}</body></html>\n"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def _row(samples: Samples, index: PackingIndex, tokenizer: Tokenizer, visual_tokens: int, row: int) -> str:
    context = index.buckets[index.row_bucket[row]][0]
    bars, bodies = [], []
    for place, (number, length) in enumerate(zip(*index.row(row), strict=True)):
        colour = _COLOURS[place % len(_COLOURS)]
        title = f"sample {int(number)}: {int(length)} tokens"
        bars.append(f"<div title='{title}' style='width:{100 * length / context:.3f}%;background:{colour}'></div>")
        body = _sample(samples, int(number), tokenizer, visual_tokens)
        bodies.append(f"<div class='sample' style='border-color:{colour}'>{body}</div>")
    used = int(index.row(row)[1].sum())
    return f"<h2>Row {row}: {used:,} of {context:,} tokens</h2><div class='row'>{''.join(bars)}</div>{''.join(bodies)}"


def _sample(samples: Samples, number: int, tokenizer: Tokenizer, visual_tokens: int) -> str:
    try:
        sample = samples[number]
    except CorruptRecord:
        return f"record {number} cannot be read"
    segment = render(sample, tokenizer, visual_tokens)
    runs: list[tuple[str, list[int]]] = []
    for token, target, visual in zip(segment.tokens, segment.targets, segment.visual, strict=True):
        kind = "v" if visual else "t learnt" if target else "t"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(int(token))
    told = [
        f"<span class='v'>[{len(tokens)} image tokens]</span>"
        if kind == "v"
        else f"<span class='{kind}'>{escape(tokenizer.decode(tokens))}</span>"
        for kind, tokens in runs
    ]
    images = "".join(_image(data) for data in sample.images)
    head = f"<b>{escape(sample.id)}</b> ({escape(sample.kind)}, {len(segment)} tokens)"
    return f"{head}<br>{images}<div>{''.join(told)}</div>"


def _image(data: bytes) -> str:
    """As the model sees it: square, and small enough for a page."""
    try:
        pixels = decode_image(data, _SIDE)
    except ImageError as error:
        return f"<i>image: {escape(error.reason)}</i>"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return f"<img src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
