"""Packed rows as the model gets them, to look at: images, tokens by loss and sample, and how rows are filled.

An HTML page without scripts or outside links, and the same as a PNG for where no browser is.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from infimed_jax.config import Model
from infimed_jax.data.chat import Tokenizer, render
from infimed_jax.data.images import ImageError, decode_image, visual_tokens
from infimed_jax.data.packing import PackingIndex
from infimed_jax.data.storage import CorruptRecord, Samples
from infimed_jax.errors import UserError
from infimed_jax.files import write_bytes, write_text

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_INK, _SOFT, _LEARNT, _PADDING = "#222222", "#777777", "#b9e5c3", "#e4e4e4"
_SIDE = 224
_WIDTH, _MARGIN, _LINE = 1100, 20, 20
"""Pixels of the picture, of its margin, and from a line of text to the next."""
_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf")
"""Tried in turn, before Pillow's own: only the first has Chinese signs, which others draw as boxes."""
_PIECES = re.compile(r"\n|[^\S\n]+|\w{1,24}|[^\w\s]")
_STYLE = f"""
body {{ font: 14px/1.6 system-ui, sans-serif; max-width: {_WIDTH}px; margin: 2em auto; padding: 0 1em; color: {_INK} }}
.row {{ display: flex; height: 26px; background: {_PADDING}; margin: 4px 0 1em }}
.row div {{ box-sizing: border-box; border-right: 1px solid #fff }}
.sample {{ border-left: 6px solid; padding: 0 0 0 1em; margin: 1em 0; overflow-wrap: anywhere }}
.t {{ white-space: pre-wrap; border-radius: 2px }} .learnt {{ background: {_LEARNT} }}
.v {{ color: {_SOFT}; font-style: italic }}
img {{ max-height: {_SIDE}px; margin: 4px 8px 4px 0; vertical-align: top }}
"""


@dataclass(frozen=True)
class _Shown:
    """One sample of a row."""

    colour: str
    length: int
    name: str
    facts: str
    images: tuple[Image.Image | str, ...]
    """As the model sees them: square; or why there is none."""
    runs: tuple[tuple[str, str], ...]
    """(kind, text) of neighbouring tokens: `v` visual, `t learnt` with loss, `t` without."""


@dataclass(frozen=True)
class _Row:
    title: str
    context: int
    samples: tuple[_Shown, ...]


def write_inspection(
    samples: Samples, index: PackingIndex, tokenizer: Tokenizer, model: Model, file: Path, rows: int
) -> Path:
    """The first `rows` rows as the HTML page `file`, and as a PNG beside it, whose path is returned."""
    if rows < 1:
        raise UserError(f"rows to look at must be at least 1, not {rows}")
    picture = file.with_suffix(".png")
    if picture == file:
        raise UserError(f"{file} is where the picture goes: name the page, such as {file.with_suffix('.html')}")
    shown = [_row(samples, index, tokenizer, model, row) for row in range(min(rows, index.rows))]
    summary = (
        f"{len(index.samples):,} samples in {index.rows:,} rows, filled to {index.fill:.2%}; no packing passes "
        f"{index.fill_bound:.2%}. Bars show the samples of a row; grey is padding."
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(picture, _png(_draw(samples.name, summary, shown)))  # whole: half a picture would be shown
    write_text(file, _page(samples.name, summary, shown))
    return picture


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _row(samples: Samples, index: PackingIndex, tokenizer: Tokenizer, model: Model, number: int) -> _Row:
    context = index.buckets[index.row_bucket[number]][0]
    numbers, lengths = index.row(number)
    shown = tuple(
        _sample(samples, int(n), int(length), _COLOURS[place % len(_COLOURS)], tokenizer, model)
        for place, (n, length) in enumerate(zip(numbers, lengths, strict=True))
    )
    return _Row(f"Row {number}: {int(lengths.sum()):,} of {context:,} tokens", context, shown)


def _sample(samples: Samples, number: int, length: int, colour: str, tokenizer: Tokenizer, model: Model) -> _Shown:
    try:
        sample = samples[number]
    except CorruptRecord:
        return _Shown(colour, length, f"record {number}", "cannot be read", (), ())
    segment = render(sample, tokenizer, visual_tokens(sample.images, model))
    runs: list[tuple[str, list[int]]] = []
    for token, target, visual in zip(segment.tokens, segment.targets, segment.visual, strict=True):
        kind = "v" if visual else "t learnt" if target else "t"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(int(token))
    told = tuple(
        (kind, f"[{len(tokens)} image tokens]" if kind == "v" else tokenizer.decode(tokens)) for kind, tokens in runs
    )
    images = tuple(_image(data) for data in sample.images)
    return _Shown(colour, length, sample.id, f"({sample.kind}, {len(segment)} tokens)", images, told)


def _image(data: bytes) -> Image.Image | str:
    try:
        return Image.fromarray(decode_image(data, _SIDE))
    except ImageError as error:
        return f"image: {error.reason}"


def _page(name: str, summary: str, rows: list[_Row]) -> str:
    """Every text of a sample is escaped."""
    parts = []
    for row in rows:
        bars = "".join(
            f"<div title='{escape(s.name, quote=True)}: {s.length} tokens' "
            f"style='width:{100 * s.length / row.context:.3f}%;background:{s.colour}'></div>"
            for s in row.samples
        )
        parts.append(f"<h2>{row.title}</h2><div class='row'>{bars}</div>")
        for s in row.samples:
            images = "".join(f"<i>{escape(i)}</i>" if isinstance(i, str) else _embedded(i) for i in s.images)
            told = "".join(f"<span class='{kind}'>{escape(text)}</span>" for kind, text in s.runs)
            head = f"<b>{escape(s.name)}</b> {escape(s.facts)}"
            parts.append(
                f"<div class='sample' style='border-color:{s.colour}'>{head}<br>{images}<div>{told}</div></div>"
            )
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>{escape(name)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(name)}</h1><p>{summary} <span class='learnt'>Green tokens carry loss.</span></p>"
        f"{''.join(parts)}</body></html>\n"
    )


def _embedded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"<img src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _draw(name: str, summary: str, rows: list[_Row]) -> Image.Image:
    """Twice over the same steps: once to see how high it gets, once on a canvas of that height."""
    height = _fill(Image.new("RGB", (1, 1)), name, summary, rows)
    canvas = Image.new("RGB", (_WIDTH, height), "white")
    _fill(canvas, name, summary, rows)
    return canvas


def _fill(canvas: Image.Image, name: str, summary: str, rows: list[_Row]) -> int:
    draw, inner = ImageDraw.Draw(canvas), _WIDTH - 2 * _MARGIN
    small, large = _font(14), _font(20)
    y = _words(draw, small, _MARGIN, _MARGIN, [("t", f"{name}: {summary} "), ("t learnt", "Green tokens carry loss.")])
    for row in rows:
        draw.text((_MARGIN, y + 12), row.title, _INK, large)
        y, x = y + 44, float(_MARGIN)
        draw.rectangle((x, y, x + inner, y + 26), _PADDING)
        for s in row.samples:
            end = x + inner * s.length / row.context
            draw.rectangle((x, y, end - 2, y + 26), s.colour)
            x = end
        y += 40
        for s in row.samples:
            top, left = y, _MARGIN + 16
            y = _words(draw, small, left, y, [("t", f"{s.name} {s.facts}")])
            y = _pictures(canvas, draw, small, left, y + 4, s.images)
            y = _words(draw, small, left, y, s.runs)
            draw.rectangle((_MARGIN, top, _MARGIN + 5, y), s.colour)
            y += 14
    return y + _MARGIN


def _pictures(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, left: int, y: int,
    images: tuple[Image.Image | str, ...],
) -> int:  # fmt: skip
    x, below = left, y
    for image in images:
        if x + _SIDE > _WIDTH - _MARGIN:
            x, y = left, below
        if isinstance(image, str):
            draw.text((x, y), image, _SOFT, font)
            below = max(below, y + _LINE)
        else:
            canvas.paste(image, (x, y))
            below = max(below, y + _SIDE + 8)
        x += _SIDE + 8
    return below


def _words(
    draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, left: int, y: int, runs: Sequence[tuple[str, str]]
) -> int:
    """Text from `left` on, broken where the line is full, on green where it carries loss; where the next line begins.

    Long words are broken too, as Chinese text, which has no blanks, must be.
    """
    x = float(left)
    for kind, text in runs:
        for piece in _PIECES.findall(text):
            piece = piece if piece == "\n" or not piece.isspace() else _blanks(piece)
            width = font.getlength(piece) if piece != "\n" else 0.0
            if piece == "\n" or x + width > _WIDTH - _MARGIN:
                x, y = float(left), y + _LINE
            if piece == "\n":
                continue
            if kind == "t learnt":
                draw.rectangle((x, y + 2, x + width, y + _LINE), _LEARNT)
            draw.text((x, y), piece, _SOFT if kind == "v" else _INK, font)
            x += width
    return y + _LINE


def _blanks(space: str) -> str:
    """White space as blanks: fonts draw tabs as boxes."""
    return " " * len(space.expandtabs(4))


def _font(size: int) -> ImageFont.ImageFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
