"""Kept images: the same pixels and scan bytes as the source's, without what the source wrote around them."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data_prep.reading.image_bytes import keep_image
from infimed_jax.data.images import decode_image

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
SECRET = "JOHN DOE 1946"


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010E] = SECRET
    tags[0x0112] = orientation
    tags.get_ifd(0x8825)[2] = (48.0, 8.0, 30.0)  # GPS latitude
    return tags


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", SECRET)
    info.add_itxt("XML:com.adobe.xmp", SECRET)
    return info


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"comment": SECRET, "xmp": SECRET.encode()}),
        ("JPEG", {"progressive": True, "icc_profile": b"profile" * 9}),
        ("PNG", {"pnginfo": png_text()}),
        ("WEBP", {"xmp": SECRET.encode(), "lossless": True}),
    ],
)
def test_metadata_goes_and_the_picture_stays_upright(kind, options, orientation):
    data = encoded(kind, exif=exif(orientation), **options)
    assert SECRET.encode() in data
    kept = keep_image(data)
    assert (kept.fault, kept.metadata) == ("", "")
    assert SECRET.encode() not in kept.data and len(kept.data) < len(data)
    np.testing.assert_array_equal(decode_image(kept.data, 24), decode_image(data, 24))
    left = Image.open(io.BytesIO(kept.data))
    assert dict(left.getexif()) == ({} if orientation == 1 else {0x0112: orientation})
    assert left.info.get("icc_profile") == options.get("icc_profile")
    assert keep_image(kept.data).data == kept.data


def test_a_jpegs_scan_is_not_encoded_again():
    plain, marked = encoded("JPEG"), encoded("JPEG", exif=exif(1), comment=SECRET)
    assert keep_image(plain).data is plain
    assert keep_image(marked).data == plain
    assert keep_image(plain + b"trailer " + SECRET.encode()).data == plain


@pytest.mark.parametrize("progressive", [False, True])
def test_a_second_image_behind_the_first_goes(progressive):
    """As cameras and phones append previews, with EXIF of their own."""
    first = encoded("JPEG", progressive=progressive)
    assert keep_image(first + encoded("JPEG", exif=exif(1))).data == first


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpeg_modes(mode):
    data = encoded("JPEG", Image.fromarray(PIXELS).convert(mode), comment=SECRET)
    np.testing.assert_array_equal(decode_image(keep_image(data).data, 24), decode_image(data, 24))


@pytest.mark.parametrize("kind", ["TIFF", "GIF"])
def test_formats_that_are_not_stripped_are_named(kind):
    data = encoded(kind)
    assert keep_image(data) == type(keep_image(data))(data, metadata=kind)


def test_faults_have_the_decoders_names():
    jpeg = encoded("JPEG")
    frame = jpeg.index(b"\xff\xc0")
    wide = jpeg[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + jpeg[frame + 9 :]
    for data, fault in {
        b"": "empty file",
        b"<html>": "not a supported image",
        jpeg[:-2]: "truncated or corrupt",
        jpeg[: frame + 4]: "truncated or corrupt",
        wide: "too many pixels",
        encoded("PNG")[:-40]: "truncated or corrupt",
    }.items():
        assert keep_image(data).fault == fault
    thumbnail = exif(1)
    thumbnail[0x9286] = jpeg  # an end mark inside the metadata is not the image's
    assert keep_image(encoded("JPEG", exif=thumbnail)[:-2]).fault == "truncated or corrupt"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.data())
def test_damaged_files_give_a_verdict_and_no_exception(kind, data):
    whole = bytearray(encoded(kind, exif=exif(6)))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(3, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(3, len(whole)))])
    kept = keep_image(damaged)
    if kept.fault:
        assert kept.data == damaged
