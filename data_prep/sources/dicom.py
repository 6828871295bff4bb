"""A folder of DICOM files: pixels and a few coded attributes, nothing else of the header.

Kept are modality, body part and view position, each only if it is one of the standard's own terms, so that no free
text passes; and the patient's, study's and image's identifiers as keyed hashes. Reports name files by their number in
the listing (files before folders, each sorted), because their names may identify the patient.

This does not guarantee anonymity: text may be burned into the pixels (flagged by tag and modality, not searched for),
and a face can be rebuilt from a head scan. How grey values become 8 bits is the user's choice and never guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.reading.faults import DUPLICATE, Unusable
from data_prep.sources.source import Option, Secret, Source, caption_sample, filled, secret_file, text
from infimed_jax.data.images import MAX_PIXELS
from infimed_jax.data.sample import Sample, Skipped
from infimed_jax.errors import UserError

NAME = "dicom"
NOT_DICOM = "not a DICOM file"
NO_PIXELS = "DICOM file without an image"
NO_WINDOW = "DICOM header has no window"
BURNED_IN = "burned-in text risk"
CANNOT_DECODE = "DICOM pixels cannot be decoded"
TOO_MANY_PIXELS = "too many pixels"
DEFLATED = "deflated transfer syntax"

MODALITIES = {
    "CR": "X-ray", "DX": "X-ray", "MG": "Mammography", "CT": "CT", "MR": "MRI", "US": "Ultrasound",
    "IVUS": "Ultrasound", "NM": "Nuclear medicine", "PT": "PET", "XA": "Angiography", "RF": "Fluoroscopy",
    "ES": "Endoscopy", "OP": "Fundus photography", "OPT": "OCT", "OCT": "OCT", "SM": "Microscopy", "GM": "Microscopy",
    "XC": "Photography", "ECG": "ECG", "IO": "Dental X-ray", "PX": "Dental X-ray", "DG": "Diaphanography",
    "OT": "Other", "SC": "Other",
}  # fmt: skip
"""PS3.3 C.7.3.1.1.1, those with images, in words; another value becomes the empty string."""
BODY_PARTS = frozenset((
    "ABDOMEN", "ABDOMENPELVIS", "ANKLE", "AORTA", "ARM", "BLADDER", "BRAIN", "BREAST", "CALF", "CHEST",
    "CHESTABDOMEN", "CLAVICLE", "COCCYX", "COLON", "CSPINE", "DUODENUM", "ELBOW", "ESOPHAGUS", "EXTREMITY",
    "EYE", "FEMUR", "FINGER", "FOOT", "FOREARM", "HAND", "HEAD", "HEADNECK", "HEART", "HIP", "HUMERUS", "JAW",
    "KIDNEY", "KNEE", "LEG", "LIVER", "LSPINE", "LUNG", "MAXILLA", "NECK", "ORBIT", "PANCREAS", "PELVIS",
    "PROSTATE", "RIB", "SACRUM", "SCAPULA", "SHOULDER", "SINUS", "SKULL", "SPINE", "SPLEEN", "SSPINE",
    "STERNUM", "STOMACH", "TESTIS", "THIGH", "THORAX", "THUMB", "THYROID", "TIBIA", "TOE", "TSPINE", "UTERUS",
    "WHOLEBODY", "WRIST", "ZYGOMA",
))  # fmt: skip
"""PS3.16 annex L, the usual ones."""
VIEWS = frozenset((
    "AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO", "MLO", "ML", "LM", "CC", "LMO", "XCCL", "XCCM",
    "LATERAL", "FRONTAL", "OBLIQUE",
))  # fmt: skip
_TEXT_BURNERS = frozenset((
    "US", "IVUS", "ES", "XA", "RF", "OP", "OPT", "OT", "SC", "XC", "GM", "ECG", "DG", "PX", "IO",
))  # fmt: skip
"""Modalities whose devices, or the film scanners used for them, usually write into the picture."""
_PART = 256
"""Files that one worker takes at once: 4 s of work if each has 512 × 512 pixels."""
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DEFLATED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.8.1")


@dataclass(frozen=True)
class Files:
    """Some of a folder's files, by their numbers in the sorted listing."""

    first: int
    stop: int
    """Number of the first one after them."""
    again: frozenset[int]
    """Numbers of those whose image an earlier file of the folder holds."""
    listing: bytes
    """Hash of the whole listing: in another one the numbers mean other files."""


def shards(folder: Path, split: str, salt: Secret, frames: str, **options: str) -> list[Files]:
    """`Source.shards`; reading all headers takes a few percent of the time that the images take."""
    listed = list(_listing(folder))
    again, seen = set(), set()
    for number, file in listed:
        try:
            _, facts, _ = _opened(file, salt, frames)
        except Unusable:
            continue
        if facts["image_id"] in seen:
            again.add(number)
        elif facts["image_id"]:
            seen.add(facts["image_id"])
    firsts, digest = [number for number, _ in listed[::_PART]] or [1], _digest(listed)
    return [
        Files(first, stop, frozenset(number for number in again if first <= number < stop), digest)
        for first, stop in zip(firsts, [*firsts[1:], sys.maxsize], strict=True)
    ]


def read(
    folder: Path, split: str, part: Files | None = None, *, salt: Secret, window: str, burned_in: str, frames: str
) -> Iterator[Sample | Skipped]:
    """One sample a file or frame. Needs pydicom."""
    seen: set[str] = set()
    listing: Iterable[tuple[int, Path]] = _listing(folder)
    if part is not None:
        listed = list(listing)
        if _digest(listed) != part.listing:
            raise UserError(f"{folder} has changed since its files were listed: run this again when it is complete")
        listing = [(number, file) for number, file in listed if part.first <= number < part.stop]
    for number, file in listing:
        id = f"{NAME}/{split}/{number:06d}"
        try:
            if part is not None and number in part.again:
                raise Unusable(DUPLICATE)
            yield from _samples(file, id, seen, salt, window, burned_in, frames)
        except Unusable as fault:
            yield Skipped(id, fault.reason, f"file {number} of the sorted listing")


def _listing(folder: Path) -> Iterator[tuple[int, Path]]:
    """Files of every kind are counted, so that no number changes with what a file turns out to be."""
    number = 0
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            number += 1
            if file != "DICOMDIR" and os.path.isfile(os.path.join(parent, file)):
                yield number, Path(parent, file)


@contextmanager
def _guarded(reason: str) -> Iterator[None]:
    """Turns any exception of pydicom, which hostile files can provoke, into Unusable for `reason`.

    Its warnings and log lines quote the header's values, so none may reach a screen or a log.
    """
    logger = logging.getLogger("pydicom")  # its children's lines come through it
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [logging.NullHandler()], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Unusable, UserError, MemoryError):
        raise
    except Exception as error:
        raise Unusable(reason) from error
    finally:
        logger.handlers, logger.propagate = before


def _digest(listed: list[tuple[int, Path]]) -> bytes:
    return hashlib.sha256("\0".join(f"{number}:{file}" for number, file in listed).encode(errors="replace")).digest()


def _samples(
    file: Path, id: str, seen: set[str], salt: Secret, window: str, burned_in: str, frames: str
) -> Iterator[Sample]:
    header, facts, numbers = _opened(file, salt, frames)
    uid = facts["image_id"] or id
    if uid in seen:
        raise Unusable(DUPLICATE)
    seen.add(uid)
    if facts["burned_in_risk"] and burned_in == "skip":
        raise Unusable(BURNED_IN)
    meta = filled(**(facts | {"image_id": uid}), window=window, language="en")
    words = ", ".join(meta[key] for key in ("modality", "organ", "view") if key in meta) or "medical image"
    for number in numbers:
        if number is None:
            name, at = id, {}
        else:
            name, at = f"{id}-{number:04d}", {"image_id": f"{uid}-{number}", "frame": str(number)}
        with _guarded(CANNOT_DECODE):
            image = _png(file, header, window, number)
        yield caption_sample(name, (image,), words, meta | at)


def _opened(file: Path, salt: bytes, frames: str) -> tuple[Any, dict[str, str], Sequence[int | None]]:
    """The header, what is kept of it, and the numbers of the wanted frames. Raises Unusable."""
    with _guarded(NOT_DICOM):
        header = _header(file)
        return header, _facts(header, salt), _frames(header, frames)


def _facts(header: Any, salt: bytes) -> dict[str, str]:
    """All that is kept of a header."""
    part, view = (str(header.get(key, "")).upper().strip() for key in ("BodyPartExamined", "ViewPosition"))
    uid = hashed(salt, header.get("SOPInstanceUID", ""))
    return {
        "image_id": f"{NAME}/{uid}" if uid else "",
        "study": hashed(salt, header.get("StudyInstanceUID", "")),
        "patient": hashed(salt, header.get("PatientID", "")),
        "burned_in_risk": burned_in_risk(header),
        "modality": MODALITIES.get(str(header.get("Modality", "")).upper().strip(), ""),
        "organ": part.lower() if part in BODY_PARTS else "",
        "view": view if view in VIEWS else "",
    }


def _header(file: Path) -> Any:
    """Everything before the pixels. Raises Unusable for data that would be unpacked or decoded without bound."""
    try:
        import pydicom
    except ImportError as error:
        raise UserError("source dicom needs pydicom: pip install 'infimed-jax[medical]'") from error
    from pydicom.filereader import read_file_meta_info

    syntax = str(read_file_meta_info(file).get("TransferSyntaxUID", ""))
    if syntax in _DEFLATED:  # pydicom inflates the whole file at once, whatever comes out
        raise Unusable(DEFLATED)
    header = pydicom.dcmread(file, stop_before_pixels=True)
    rows, columns = int(header.get("Rows", 0)), int(header.get("Columns", 0))
    if rows <= 0 or columns <= 0 or "PhotometricInterpretation" not in header:
        raise Unusable(NO_PIXELS)
    if rows * columns > MAX_PIXELS:
        raise Unusable(TOO_MANY_PIXELS)
    return header


def hashed(salt: bytes, identifier: Any) -> str:
    """128 bits of HMAC-SHA256: without the salt, no list of identifiers reveals it. Empty stays empty."""
    plain = str(identifier).strip()
    return hmac.digest(salt, plain.encode(), hashlib.sha256).hex()[:32] if plain else ""


def burned_in_risk(header: Any) -> str:
    """Why the picture may contain text: `tag`, `secondary capture`, `modality`, `recognizable features`, or nothing.

    A tag that says NO is believed only if modality and origin do not contradict it.
    """
    if text(str(header.get("BurnedInAnnotation", ""))).upper() == "YES":
        return "tag"
    if str(header.get("SOPClassUID", "")).startswith(_SECONDARY_CAPTURE) or header.get("ConversionType"):
        return "secondary capture"
    modality = str(header.get("Modality", "")).upper()
    if modality in _TEXT_BURNERS or modality not in MODALITIES:
        return "modality"
    if str(header.get("RecognizableVisualFeatures", "")).upper() == "YES":
        return "recognizable features"
    return ""


def _frames(header: Any, frames: str) -> Sequence[int | None]:
    count = int(header.get("NumberOfFrames") or 1)
    if count <= 1:
        return [None]
    return range(count) if frames == "all" else [count // 2]


def _png(file: Path, header: Any, window: str, frame: int | None) -> bytes:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    colour = header.PhotometricInterpretation
    pixels = stored = pixel_array(file, index=frame or 0)  # YBR is turned into RGB
    if colour == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
        pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    elif pixels.ndim == 2:
        pixels = apply_modality_lut(pixels, header)
    if pixels.ndim == 3:
        if pixels.dtype != np.uint8:
            raise Unusable(CANNOT_DECODE)
        return _encode(pixels)
    inverted = colour == "MONOCHROME1"  # the lowest value is white
    if window == "none":
        return _encode(_sixteen_bits(stored, inverted))
    low, high, shift = _window(header, window, pixels, stored)
    grey = np.clip((pixels.astype(np.float64) - low) / (high - low) if high > low else pixels > shift, 0, 1)
    return _encode(np.rint(255 * (1 - grey if inverted else grey)).astype(np.uint8))


def _sixteen_bits(stored: np.ndarray, inverted: bool) -> np.ndarray:
    """Stored values as unsigned 16 bits, signed ones from their type's lowest value on."""
    if stored.dtype.itemsize > 2:
        raise Unusable(CANNOT_DECODE)
    wide = stored.astype(np.int32) - (int(np.iinfo(stored.dtype).min) if stored.dtype.kind == "i" else 0)
    top = 65535 if stored.dtype.itemsize == 2 else 255
    return (top - wide if inverted else wide).astype(np.uint16)


def _window(header: Any, window: str, pixels: np.ndarray, stored: np.ndarray) -> tuple[float, float, float]:
    """The values that become black and white, and the threshold between them if the two are equal."""
    if window == "full":
        padding = header.get("PixelPaddingValue")
        known = pixels[stored != padding] if padding is not None else pixels
        known = known if known.size else pixels
        return float(known.min()), float(known.max()), float(known.min())
    if window == "header":
        centre, width = (header.get(key) for key in ("WindowCenter", "WindowWidth"))
        if centre is None or width is None:
            raise Unusable(NO_WINDOW)
        # the first of several windows
        centre, width = (float(v[0] if hasattr(v, "__len__") else v) for v in (centre, width))
        exact = str(header.get("VOILUTFunction", "LINEAR")).upper() == "LINEAR_EXACT"
    else:
        centre, width = (float(part) for part in window.split(":"))
        exact = False
    if not (np.isfinite(centre) and np.isfinite(width) and width >= 1):
        raise Unusable(NO_WINDOW)
    if exact:
        return centre - width / 2, centre + width / 2, centre
    # PS3.3 C.11.2.1.2.1: width counts the values, from the lowest to the highest there are width - 1 steps
    return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2, centre - 0.5


def _encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def window_option(value: str) -> str:
    """`header`, `full`, `none` or CENTRE:WIDTH."""
    if value in ("header", "full", "none"):
        return value
    try:
        _, width = (float(part) for part in value.split(":"))
    except ValueError as error:
        raise UserError(f"it must be header, full, none or CENTRE:WIDTH such as 40:400, not {value!r}") from error
    if not width >= 1:
        raise UserError(f"the width of a window must be at least 1, not {width:g}")
    return value


SOURCE = Source(
    name=NAME,
    title="A folder of DICOM files",
    licence="unknown",
    splits=("all",),
    layout="DICOM files in any folders",
    columns=("Modality", "BodyPartExamined", "ViewPosition", "the pixels; uids and PatientID hashed"),
    obtain="your own files; pip install 'infimed-jax[medical]'",
    notes="no promise of anonymity. No text comes with DICOM: a sample's is its modality, body part and view. "
    "Files in JPEG-LS or lossless JPEG need a plugin of pydicom's, such as pylibjpeg",
    read=read,
    shards=shards,
    options=(
        Option("salt", "a file of at least 16 random bytes, kept apart from the data", secret_file, required=True),
        Option(
            "window",
            "how grey values become 8 bits: header (the file's own window), full (lowest to highest value), "
            "CENTRE:WIDTH in the image's units such as 40:400, or none (16-bit PNG of the stored values)",
            window_option,
            required=True,
        ),
        Option(
            "burned_in",
            "skip or keep images with a risk of burned-in text [skip]",
            choices=("skip", "keep"),
            default="skip",
        ),
        Option("frames", "of several frames: middle or all [middle]", choices=("middle", "all"), default="middle"),
    ),
)
