"""Decoding against transformers' SigLIP processor, and hostile files against fixed reasons."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infimed_jax.data import images
from infimed_jax.data.images import REASONS, ImageError, decode_image

VQA_RAD = Path(__file__).resolve().parents[2].parent / "shared/data/vqa_rad"
RNG = np.random.default_rng(0)


def smooth(height: int, width: int, channels: int) -> np.ndarray:
    """A picture with structure, so that resampling errors show."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (3 + c) + y / (5 - c)) + 0.3 * RNG.standard_normal((height, width)) for c in range(channels)]
    return np.clip(127 + 80 * np.stack(waves, -1), 0, 255).astype(np.uint8)


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def processor_pixels(data: bytes, size: int) -> np.ndarray:
    """f32[S,S,3] as transformers loads, converts, resizes and normalises."""
    import tempfile

    from transformers.image_utils import load_image
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        loaded = load_image(file.name) if b"Exif" in data[:64] else Image.open(io.BytesIO(data))
        processor = SiglipImageProcessorPil(size={"height": size, "width": size})
        return processor(loaded, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


def assert_equal_to_processor(data: bytes, size: int) -> None:
    ours = decode_image(data, size)
    assert ours.shape == (size, size, 3)
    assert ours.dtype == np.uint8
    theirs = processor_pixels(data, size)
    np.testing.assert_array_equal(ours, np.rint((theirs * 0.5 + 0.5) * 255).astype(np.uint8))
    # 2e-7 is one float32 rounding of values up to 1: the processor rescales before it normalises
    np.testing.assert_allclose(ours / np.float32(127.5) - 1, theirs, atol=2e-7)


RGB = Image.fromarray(smooth(60, 91, 3))
RGBA = Image.merge("RGBA", [*RGB.split(), Image.fromarray(smooth(60, 91, 1)[..., 0])])
PALETTE = RGB.quantize(16)
EXIF = Image.Exif()
EXIF[274] = 6
FILES = {
    "jpeg": save(RGB, "JPEG"),
    "png": save(RGB, "PNG"),
    "webp": save(RGB, "WEBP"),
    "bmp": save(RGB, "BMP"),
    "tiff": save(RGB, "TIFF"),
    "gif": save(PALETTE, "GIF"),
    "grey": save(RGB.convert("L"), "JPEG"),
    "bilevel": save(RGB.convert("1"), "PNG"),
    "cmyk": save(RGB.convert("CMYK"), "JPEG"),
    "alpha": save(RGBA, "PNG"),
    "grey alpha": save(RGBA.convert("LA"), "PNG"),
    "palette": save(PALETTE, "PNG"),
    "transparent colour": save(PALETTE, "PNG", transparency=3),
    "one pixel": save(RGB.crop((0, 0, 1, 1)), "PNG"),
    "thin": save(RGB.crop((0, 0, 91, 1)), "PNG"),
}


@pytest.mark.parametrize("size", [48, 96])
@pytest.mark.parametrize("name", FILES)
def test_pixels_are_the_siglip_processors(name, size):
    assert_equal_to_processor(FILES[name], size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_transformers_does(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    assert_equal_to_processor(save(RGB, "JPEG", exif=exif), 48)


def test_real_radiographs():
    files = sorted(VQA_RAD.rglob("*.jpg"))
    if not files:
        pytest.skip("VQA-RAD is not at hand")
    for file in files[::40]:
        assert_equal_to_processor(file.read_bytes(), 384)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (decode_image(save(clear, "PNG"), 4) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_stretched(kind):
    ramp = np.linspace(100, 3000, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode_image(save(Image.fromarray(ramp), kind), 64)
    expected = np.rint((ramp - 100.0) * 255 / 2900)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, -1))


def test_float_tiff_is_stretched_and_must_be_finite():
    values = np.array([[-1.0, 0.0], [0.5, 1.0]], np.float32)
    assert decode_image(save(Image.fromarray(values), "TIFF"), 2)[..., 0].tolist() == [[0, 128], [191, 255]]
    assert not decode_image(save(Image.fromarray(np.full((2, 2), 7.0, np.float32)), "TIFF"), 2).any()
    values[0, 0] = np.nan
    with pytest.raises(ImageError, match="truncated or corrupt"):
        decode_image(save(Image.fromarray(values), "TIFF"), 2)


def test_first_frame_of_an_animation():
    frames = [Image.new("L", (9, 9), level) for level in (10, 200)]
    data = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(data, 4) == 10).all()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 12_000, 2**16, 2**30])
def test_bombs_are_seen_in_the_header(side, monkeypatch):
    def never(*_args):
        raise AssertionError("decoded a bomb")

    monkeypatch.setattr(images.Image.Image, "load", never)
    with pytest.raises(ImageError) as caught:
        decode_image(png_header(side, side), 48)
    assert caught.value.reason == "too many pixels"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\0" * 1000, "not a supported image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a supported image"),
        (save(RGB, "PPM"), "not a supported image"),
        (FILES["jpeg"][: len(FILES["jpeg"]) // 2], "truncated or corrupt"),
        (FILES["png"][:-40], "truncated or corrupt"),
        (FILES["webp"][: len(FILES["webp"]) // 2], "truncated or corrupt"),
        (png_header(64, 64), "truncated or corrupt"),
    ],
)
def test_bad_files_have_a_fixed_reason(data, reason):
    with pytest.raises(ImageError) as caught:
        decode_image(data, 48)
    assert caught.value.reason == reason
    assert reason in REASONS


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=5),
    st.floats(0, 1),
)
def test_damage_gives_pixels_or_a_reason_and_nothing_else(name, flips, cut):
    data = bytearray(FILES[name])
    for place, value in flips:
        data[int(place * len(data))] = value
    try:
        pixels = decode_image(bytes(data[: int(cut * len(data)) + 1]), 16)
    except ImageError as error:
        assert error.reason in REASONS
    else:
        assert pixels.shape == (16, 16, 3)
