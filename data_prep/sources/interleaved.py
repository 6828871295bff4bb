"""Web documents of text and images in turn: OBELICS and MMC4.

A chunk of a document is some images and the text after them, so that the renderer can mark its end.
Images that could not be fetched are counted one by one, and the document is kept without them; with no image left,
or ten or more, it is skipped, as in the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from data_prep.reading.archives import is_resource_fork, read_webdataset
from data_prep.reading.faults import (
    DAMAGED_FILE,
    IMAGE_MISSING,
    IMAGE_MISSING_KEPT,
    NO_IMAGE,
    NO_TEXT,
    TOO_MANY_IMAGES,
    Unusable,
)
from data_prep.reading.files import Images, all_files, find_files, from_base64, shard_name
from data_prep.reading.parquet import parquet_rows
from data_prep.reading.parts import parts_of
from data_prep.reading.rows import WHOLE, Part, Row, json_rows
from data_prep.sources.source import Source, filled, language_of, records, text
from data_prep.sources.webdataset import json_member
from infimed_jax.data.sample import Document, Sample, Skipped

MAX_IMAGES = 9

Piece = str | bytes | Unusable
"""Text, an image, or why an image is missing."""


def document(pieces_of: Callable[[Row], Iterable[Piece]], joint: str, id: str, row: Row) -> Iterator[Sample | Skipped]:
    """The row's document, after one Skipped for each missing image. `joint` separates neighbouring texts.

    Raises Unusable if `pieces_of(row)` does, before it yields anything.
    """
    source, split = id.split("/")[:2]
    chunks: list[tuple[list[int], list[str]]] = [([], [])]
    images: list[bytes] = []
    missing = 0
    for piece in list(pieces_of(row)):
        if isinstance(piece, str):
            chunks[-1][1].append(piece)
        elif isinstance(piece, bytes):
            if chunks[-1][1]:
                chunks.append(([], []))
            chunks[-1][0].append(len(images))
            images.append(piece)
        else:
            reason = IMAGE_MISSING_KEPT if piece.reason == IMAGE_MISSING else piece.reason
            yield Skipped(f"{id}-image{len(images) + missing}", reason, piece.detail)
            missing += 1
    if not images:
        yield Skipped(id, NO_IMAGE)
    elif len(images) > MAX_IMAGES:
        yield Skipped(id, TOO_MANY_IMAGES)
    elif not any(words for _, words in chunks):
        yield Skipped(id, NO_TEXT)
    else:
        contents = tuple(
            (*numbers, *(["\n" * bool(numbers) + joint.join(words)] if words else [])) for numbers, words in chunks
        )
        language = language_of(
            "", " ".join(piece for content in contents for piece in content if isinstance(piece, str))
        )
        meta = filled(language=language, images_missing=missing or "")
        yield Document(id, source, split, tuple(images), contents, meta=meta)


def _obelics_files(folder: Path, split: str) -> list[Path]:
    return find_files(folder, "data/train-*.parquet", "train-*.parquet", "opt_out_docs_removed*/train-*.parquet")


def read_obelics(folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    for file in [folder / part.file] if part.file else _obelics_files(folder, split):
        fetched = folder / "images" / file.stem
        make = partial(document, partial(_obelics_pieces, _fetched(fetched), Images(fetched)), "\n\n")
        rows = parquet_rows(file, ("images", "texts"), part)
        yield from records(f"obelics/{split}/{shard_name(folder, file)}", rows, make, part.first)


def _fetched(folder: Path) -> dict[str, str]:
    """URL → file, from the tables that img2dataset writes beside its folders. One shard's, so it fits in memory."""
    names = {}
    for table in sorted(table for table in folder.glob("*.parquet") if not is_resource_fork(table.name)):
        for row in parquet_rows(table, ("url", "key", "status"), batch=1024):
            if isinstance(row, dict) and row["status"] == "success":
                names[row["url"]] = f"{table.stem}/{row['key']}.jpg"
    return names


def _obelics_pieces(names: dict[str, str], images: Images, row: Row) -> Iterator[Piece]:
    urls, texts = row["images"] or [], row["texts"] or []
    if len(urls) != len(texts):
        raise Unusable(DAMAGED_FILE, "images and texts of different length")
    for url, words in zip(urls, texts, strict=True):
        if words is not None:
            yield words
        elif url is not None:
            yield _image(images, names.get(url, ""))


def _image(images: Images, name: str) -> bytes | Unusable:
    try:
        return images.read(name)
    except Unusable as fault:
        return fault


def _mmc4_files(folder: Path, split: str) -> list[Path]:
    return all_files(folder, ".jsonl", ".tar", ".tar.gz")


def read_mmc4(folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    for file in [folder / part.file] if part.file else _mmc4_files(folder, split):
        images = Images(folder / "images" / file.stem, folder / "images")
        make = partial(document, partial(_mmc4_pieces, images), " ")
        rows = json_rows(file, part) if file.suffix == ".jsonl" else _tar_documents(file)
        yield from records(f"mmc4/{split}/{shard_name(folder, file)}", rows, make, part.first)


def _tar_documents(file: Path) -> Iterator[Row | Unusable]:
    for group in read_webdataset(file):
        try:
            yield group if isinstance(group, Unusable) else json_member(group)
        except Unusable as fault:
            yield fault


def _mmc4_pieces(images: Images, row: Row) -> Iterator[Piece]:
    """Each image before the sentence that it was matched with."""
    sentences, infos = row.get("text_list"), row.get("image_info")
    if not isinstance(sentences, list) or not isinstance(infos, list):
        raise Unusable(NO_TEXT)
    for number, sentence in enumerate(sentences):
        for info in infos:
            if isinstance(info, dict) and info.get("matched_text_index") == number:
                yield _mmc4_image(info, images)
        if words := text(sentence):
            yield words
    for info in infos:  # nothing is lost silently
        if not isinstance(info, dict) or info.get("matched_text_index") not in range(len(sentences)):
            yield Unusable(DAMAGED_FILE, "an image without its sentence")


def _mmc4_image(info: Row, images: Images) -> bytes | Unusable:
    encoded = info.get("image_base64")
    if not isinstance(encoded, str) or not encoded:
        return _image(images, text(info.get("image_name")))
    if encoded.startswith("b'"):  # OpenFlamingo's converter writes Python's spelling of the bytes
        encoded = encoded[2:-1]
    try:
        return from_base64(encoded)
    except Unusable as fault:
        return fault


SOURCES: Sequence[Source] = (
    Source(
        name="obelics",
        title="OBELICS: interleaved web documents",
        licence="CC-BY-4.0",
        size="141,047,697 documents",
        layout="data/train-*.parquet; images/STEM/ of each: img2dataset's output (--output_format files) for its URLs",
        columns=("images", "texts"),
        obtain="HuggingFaceM4/OBELICS on the Hugging Face Hub; it has URLs only, so img2dataset must fetch the images",
        notes="the licence is the card's, for the collection; texts and images keep their own. The place of the images "
        "is our choice, as none is published; the columns of img2dataset's tables (url, key, status) are not verified",
        read=read_obelics,
        shards=parts_of(_obelics_files),
        splits=("train",),
    ),
    Source(
        name="mmc4",
        title="MMC4: interleaved web documents",
        licence="ODC-By-1.0",
        size="about 101 million documents (core: 7 million)",
        layout="*.jsonl with images in images/ or images/STEM/; or tars of JSON with image_base64 (OpenFlamingo's way)",
        columns=("text_list", "image_info[]: image_name, matched_text_index, image_base64"),
        obtain="the links of allenai/mmc4; the images are fetched by URL",
        notes="licence and size as the project states them, not verified here",
        read=read_mmc4,
        shards=parts_of(_mmc4_files),
        splits=("train",),
    ),
)
