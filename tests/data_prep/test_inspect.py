"""The inspection page: whole, without outside links, and with hostile text shown as text."""

from __future__ import annotations

import errno
import io
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from data_prep.steps.inspect import _draw, _Row, _Shown, write_inspection
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
        if self.tags[-1] == ("span", {"class": "t learnt"}):
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
    picture = write_inspection(samples, index, tokenizer, MODEL, tmp_path / "page.html", rows=9)
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(f"{HOSTILE} learnt" in text for text in page.learnt) == 3
    colours = Counter(Image.open(picture).convert("RGB").get_flattened_data())
    for colour in ("#4477aa", "#ee6677", "#228833", "#b9e5c3", "#e4e4e4"):  # three samples, loss, padding
        assert colours[ImageColor.getrgb(colour)] > 300
    assert colours[1, 2, 3] == 3 * 224 * 224  # every pixel of the three images
    assert sum("truncated" in text or "not a supported image" in text for text in page.texts) == 3
    style = (tmp_path / "page.html").read_text(encoding="utf-8").partition(".row div {")[2].partition("}")[0]
    assert "border-box" in style or "border" not in style  # else the borders of many samples push out the padding


def test_the_picture_shows_tabs_as_blanks():
    def drawn(text: str) -> bytes:
        shown = _Shown("#4477aa", 3, "a", "", (), (("t learnt", text),))
        return _draw("toy", "", [_Row("Row 0", 9, (shown,))]).tobytes()

    assert drawn("lungs\tand heart") == drawn("lungs    and heart") != drawn("lungs and heart")


def test_what_cannot_be_written_leaves_the_old_page_and_picture(tmp_path, monkeypatch):
    write_samples(
        tmp_path / "set",
        [Chat("a", "toy", "train", (), (Turn("user", ("why",)), Turn("assistant", ("so",))))],
        name="toy",
    )
    samples = open_samples(tmp_path / "set")
    tokenizer = load_tokenizer(make_tokenizer(["so"] * 3, tmp_path / "tok", vocab_size=330))
    index = build_index(samples, tokenizer, config.Data(context=64, images_per_row=1), MODEL, tmp_path / "p")
    file = tmp_path / "out/page.html"
    write_inspection(samples, index, tokenizer, MODEL, file, rows=1)
    before = {part.name: part.read_bytes() for part in file.parent.iterdir()}

    def full(self, content):
        self.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, number, words in (
        ("page.png", 1, r"page\.png is where the picture goes"),
        ("page.html", 0, "at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            write_inspection(samples, index, tokenizer, MODEL, file.with_name(name), rows=number)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_inspection(samples, index, tokenizer, MODEL, file, rows=1)
    assert {part.name: part.read_bytes() for part in file.parent.iterdir()} == before
