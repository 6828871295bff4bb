"""The inspection page: whole, without outside links, and with hostile text shown as text."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data_prep.steps.inspect import write_inspection
from data_prep.tokenizer import make_tokenizer
from infimed_jax import config
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.data.packing import build_index
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from infimed_jax.models.infimed import config as infimed

MODEL = infimed.Model(
    vision=infimed.Vision(image_size=16, patch_size=4, hidden_size=8, num_heads=2),
    projector=infimed.Projector(visual_tokens=4),
)
HOSTILE = "<script>alert(1)</script><img src=http://x.y/z>&"


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.learnt, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)
        if self.tags and self.tags[-1] == ("span", {"class": "learnt"}):
            self.learnt.append(data)


def test_page(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(buffer, "PNG")
    rows = [
        Chat(f"{HOSTILE}{i}", "toy", "train", (buffer.getvalue(), b"broken"),
             (Turn("user", (0, HOSTILE, 1)), Turn("assistant", (f"{HOSTILE} learnt",))))
        for i in range(3)
    ]  # fmt: skip
    write_samples(tmp_path / "set", rows, name="toy")
    samples = open_samples(tmp_path / "set")
    tokenizer = load_tokenizer(make_tokenizer(["learnt"] * 3, tmp_path / "tok", vocab_size=330))
    index = build_index(samples, tokenizer, config.Data(context=1024, images_per_row=6), MODEL, tmp_path / "p")
    write_inspection(samples, index, tokenizer, MODEL, tmp_path / "page.html", rows=9)
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(f"{HOSTILE} learnt" in text for text in page.learnt) == 3
    bars = [attrs["style"] for tag, attrs in page.tags if tag == "div" and attrs.get("title", "").startswith(HOSTILE)]
    assert len(bars) == 3 and len(set(bars)) > 1  # neighbours differ in colour
    for source in images:
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        assert shown.shape == (224, 224, 3) and np.abs(shown - (1.0, 2, 3)).max() <= 4  # the JPEG's error
    assert sum("truncated" in text or "not a supported image" in text for text in page.texts) == 3


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        write_inspection(None, None, None, MODEL, tmp_path / "page.html", rows=0)
    assert not any(tmp_path.iterdir())
