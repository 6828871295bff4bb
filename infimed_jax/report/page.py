"""HTML pages without outside references: one style (`base.html.jinja`), values escaped, files written whole."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from infimed_jax.files import write_text


def write_page(path: Path, template: Path, values: Mapping[str, Any]) -> None:
    """Render `template`, which extends `base.html.jinja`, with `values`; a name that it misses is an error."""
    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    write_text(path, environment.get_template(template.name).render(values))


def thumbnail(image: bytes, side: int) -> str:
    """`data_url` of the encoded image, its longer side at most `side` pixels."""
    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((side, side))
    return data_url(picture)


def data_url(picture: Image.Image) -> str:
    """The picture as an `img` element's source: JPEG, or PNG where its longer side is at most 96 pixels."""
    kind = "png" if max(picture.size) <= 96 else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
