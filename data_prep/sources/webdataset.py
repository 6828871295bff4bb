"""Captioned images in WebDataset tars, as img2dataset writes them: `KEY.jpg`, `KEY.txt`, `KEY.json` side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.reading.archives import read_webdataset
from data_prep.reading.faults import NO_IMAGE, NO_TEXT, NOT_JSON, NOT_UNICODE, Unusable
from data_prep.reading.files import all_files, shard_name
from data_prep.reading.parts import parts_of
from data_prep.reading.rows import WHOLE, Part
from data_prep.sources.source import Source, caption_sample, filled, language_of, records
from infimed_jax.data.sample import Sample, Skipped
from infimed_jax.files import to_json

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


def files_of(folder: Path, split: str) -> list[Path]:
    return all_files(folder, ".tar", ".tar.gz", ".tgz")


def read(name: str, folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    for file in [folder / part.file] if part.file else files_of(folder, split):
        yield from records(f"{name}/{split}/{shard_name(folder, file)}", read_webdataset(file), _sample)


def _sample(id: str, group: dict[str, bytes]) -> Sample:
    try:
        return _pair(id, group)
    except Unusable as fault:  # the number alone would not locate it in the tar
        raise Unusable(fault.reason, group["__key__"].decode(errors="replace")[:200]) from fault


def _pair(id: str, group: dict[str, bytes]) -> Sample:
    image = next((group[suffix] for suffix in _IMAGE_SUFFIXES if suffix in group), None)
    if image is None:
        raise Unusable(NO_IMAGE)
    info = json_member(group) if "json" in group else {}
    try:
        caption = group["txt"].decode() if "txt" in group else info.get("caption")
        key = group["__key__"].decode()
    except UnicodeDecodeError as error:
        raise Unusable(NOT_UNICODE) from error
    if not isinstance(caption, str):
        raise Unusable(NO_TEXT)
    meta = filled(source_id=info.get("uid") or key, language=language_of("", caption))
    return caption_sample(id, (image,), caption.strip(), meta)


def json_member(group: dict[str, bytes]) -> dict[str, Any]:
    """The sample's JSON object. Raises Unusable."""
    try:
        value = json.loads(group.get("json", b""))
        to_json(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise Unusable(NOT_UNICODE) from error
    except (ValueError, RecursionError) as error:
        raise Unusable(NOT_JSON) from error
    if not isinstance(value, dict):
        raise Unusable(NOT_JSON)
    return value


_LAYOUT = "*.tar or *.tar.gz, in folders or not: KEY.jpg, KEY.txt (or the caption in KEY.json)"
_COLUMNS = ("jpg", "txt", "json.caption", "json.uid")
SOURCES = (
    Source(
        name="datacomp",
        title="DataComp (DFN and MLM-filter subsets)",
        licence="CC-BY-4.0",
        splits=("train",),
        size="the pool's medium scale is 128 million pairs; the subsets are the filters' choice of it",
        layout=_LAYOUT,
        columns=_COLUMNS,
        obtain="DataComp's metadata with img2dataset, or weizhiwang/Open-Qwen2VL-Data on the Hugging Face Hub",
        notes="the licence is that of links and captions; each image keeps its own. Layout as img2dataset writes it",
        read=partial(read, "datacomp"),
        shards=parts_of(files_of),
    ),
    Source(
        name="ccs",
        title="CCS: CC3M, CC12M and SBU captions",
        licence="mixed: CC3M and CC12M free with acknowledgement, SBU not stated",
        splits=("train",),
        size="as filtered by CapFilt; not verified here",
        layout=_LAYOUT,
        columns=_COLUMNS,
        obtain="img2dataset on BLIP's filtered list, or weizhiwang/Open-Qwen2VL-Data on the Hugging Face Hub",
        notes="licence not verified here; each image keeps its own. Layout as img2dataset writes it",
        read=partial(read, "ccs"),
        shards=parts_of(files_of),
    ),
)
