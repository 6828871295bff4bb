"""LLaVA-style conversations: a JSON list, or JSON lines, of `{"id", "image", "conversations": [{"from", "value"}]}`.

One reader serves MAmmoTH-VL, LLaVA-Med, PubMedVision and anyone's own files. Each source has the split `train`
(conversations) and `documents` (the same as pretraining text; of captioning sources, the caption alone).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.reading.faults import BAD_TURNS, IMAGE_MARKS, NO_TEXT, VIDEO, Unusable
from data_prep.reading.files import Images, find_files
from data_prep.reading.parts import json_parts
from data_prep.reading.rows import WHOLE, Part, Row, json_rows
from data_prep.sources.source import Option, Source, caption_sample, filled, records, text
from infimed_jax.data.sample import Chat, Sample, Skipped, Turn

_MARK = re.compile(r"(<image>)")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_COLUMNS = ("id", "image", "conversations[].from", "conversations[].value")


@dataclass(frozen=True)
class Layout:
    """The files of a dataset of this form."""

    name: str
    file: str
    """Patterns of its annotations, separated by |, in which `{split}` stands for the split."""
    places: tuple[str, ...]
    """The folders and zip files that image names are relative to."""
    captioning: bool = False
    """Whether only the last turn is the pretraining text."""
    flat: bool = False
    """Whether images are looked up by their bare file names."""


def read(
    layout: Layout,
    folder: Path,
    split: str,
    part: Part = WHOLE,
    annotations: str | None = None,
    images: str | None = None,
) -> Iterator[Sample | Skipped]:
    """The samples of a split; `annotations` and `images` replace the layout's own places."""
    places = (images,) if images else layout.places
    files = Images(*(folder / place for place in places), flat=layout.flat)
    make = partial(_sample, files, split == "documents", layout.captioning)
    rows = json_rows(_file(layout.file, folder, split, annotations), part=part)
    yield from records(f"{layout.name}/{split}", rows, make, part.first)


def _file(file: str, folder: Path, split: str, annotations: str | None) -> Path:
    pattern = annotations or file.format(split=split)
    return find_files(folder, *pattern.split("|"))[0]


def parts(file: str, folder: Path, split: str, annotations: str | None = None, images: str | None = None) -> list[Part]:
    """`Source.shards`, to which the place of the images does not matter."""
    return json_parts(_file(file, folder, split, annotations))


def _sample(images: Images, document: bool, captioning: bool, id: str, row: Row) -> Sample:
    source, split = id.split("/")[:2]
    names = row.get("image") or row.get("images") or []
    if not isinstance(names, list):
        names = [names] if names == names else []  # NaN is how tables that became JSON say that there is none
    if row.get("video"):
        raise Unusable(VIDEO)
    # the misspelt key is in published LLaVA-Med copies
    turns = conversation(row.get("conversations") or row.get("conversatons"), len(names))
    encoded = tuple(images.read(text(name)) for name in names)
    meta = filled(
        source_id=row.get("id"),
        image_id=f"{source}/{names[0]}" if len(names) == 1 else "",
        modality=row.get("modality"),
        organ=text(row.get("body_part")).lower(),
        language="en",
    )
    if not document:
        return Chat(id, source, split, encoded, turns, meta=meta)
    words = [turn.text.strip() for turn in (turns[-1:] if captioning else turns)]
    return caption_sample(id, encoded, "\n".join(words), meta)


def conversation(turns: Any, images: int) -> tuple[Turn, ...]:
    """LLaVA's turns as ours: each `<image>` becomes the next image; without any mark, the images come first.

    Raises Unusable: no such list, roles that do not alternate from user to assistant, an empty turn, or another
    number of marks than of images.
    """
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable(BAD_TURNS)
    roles = [_ROLES.get(text(turn.get("from") or turn.get("role")).lower(), "") for turn in turns]
    values = [turn.get("value", turn.get("content")) for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise Unusable(BAD_TURNS)
    if not all(isinstance(value, str) and _MARK.sub("", value).strip() for value in values):
        raise Unusable(NO_TEXT)
    marks = sum(value.count("<image>") for value in values)
    if marks not in (0, images):
        raise Unusable(IMAGE_MARKS)
    made, number = [], 0
    for role, value in zip(roles, values, strict=True):
        pieces: list[str | int] = []
        for piece in _MARK.split(value):
            if piece == "<image>":
                pieces.append(number)
                number += 1
            elif piece:
                pieces.append(piece)
        if role == "user" and images and not marks and not any(turn.role == "user" for turn in made):
            pieces = [*range(images), f"\n{value}"]
        made.append(Turn(role, tuple(pieces)))
    return tuple(made)


def _source(
    title: str,
    form: Layout,
    licence: str,
    obtain: str,
    size: str = "",
    notes: str = "",
    layout: str = "",
    columns: tuple[str, ...] = _COLUMNS,
) -> Source:
    where = " or ".join(place or "." for place in form.places)
    return Source(
        name=form.name,
        title=title,
        licence=licence,
        splits=("train", "documents"),
        size=size,
        layout=layout or f"{' or '.join(form.file.split('|'))}; images in {where}",
        columns=columns,
        obtain=obtain,
        notes=notes,
        read=partial(read, form),
        shards=partial(parts, form.file),
    )


_ANY = _source(
    "Any LLaVA-style JSON or JSON lines",
    Layout("llava_json", "{split}.json|{split}.jsonl", ("", "images", "images.zip")),
    licence="unknown",
    obtain="your own files",
    notes="the licence is that of your files: it is not known here, so nothing of them is sent anywhere",
    layout="SPLIT.json or SPLIT.jsonl (or option annotations); images beside it or in images/ (or option images)",
)
_llava_med = partial(
    _source,
    licence="CC-BY-NC-4.0",
    obtain="the files linked in the README of microsoft/LLaVA-Med; its download_images.py fetches the images",
)
_pubmedvision = partial(
    _source,
    licence="Apache-2.0",
    obtain="FreedomIntelligence/PubMedVision on the Hugging Face Hub; images_*.zip may stay packed",
    size="647,031 conversations",
    notes="the licence is the card's; the images are figures of PubMed Central articles with their own terms",
    layout="the JSON file; images/ or images_0.zip to images_19.zip",
    columns=(*_COLUMNS, "modality", "body_part"),
)
_LLAVA_MED_IMAGES = ("images", "images.zip")
_PUBMEDVISION_IMAGES = ("", *(f"images_{number}.zip" for number in range(20)))

SOURCES = (
    replace(
        _ANY,
        splits=("train", "documents", "validation", "test"),
        options=(
            Option(
                "annotations",
                "the JSON file, relative to the input folder [SPLIT.json or SPLIT.jsonl]",
                names_split=True,
            ),
            Option("images", "the folder that image names start from, or a zip file, relative to the input folder"),
        ),
    ),
    _source(
        "MAmmoTH-VL-10M, single-image part of MAmmoTH-VL-Instruct-12M",
        Layout("mammoth_vl", "mammoth_si_10M.json", ("single_image_data", "")),
        licence="Apache-2.0",
        obtain="MAmmoTH-VL/MAmmoTH-VL-Instruct-12M on the Hugging Face Hub; unpack single_image_data/*.tar.gz there",
        size="about 10 million conversations; the JSON file is 21.8 GB",
        notes="the licence is the card's; the images come from many sets with their own terms",
    ),
    _llava_med(
        "LLaVA-Med alignment, 500K captions asked for",
        Layout(
            "llava_med_alignment",
            "llava_med_alignment_500k.json|alignment/llava_med_alignment_500k.json",
            _LLAVA_MED_IMAGES,
            captioning=True,
        ),
        size="about 500,000 captions",
    ),
    _llava_med(
        "LLaVA-Med instruct 60K",
        Layout(
            "llava_med_instruct",
            "llava_med_instruct_60k.json|instruct/llava_med_instruct_60k.json",
            _LLAVA_MED_IMAGES,
        ),
        size="about 60,000 conversations",
    ),
    _llava_med(
        "LLaVA-Med instruct 60K with in-text mentions (60K-IM-text)",
        Layout(
            "llava_med_60k_im_text",
            "llava_med_instruct_60k_inline_mention.json|instruct/llava_med_instruct_60k_inline_mention.json",
            _LLAVA_MED_IMAGES,
        ),
        size="about 60,000 conversations",
        notes="that the paper's 60K-IM-text is this file is our reading, not stated there",
    ),
    # flat: the card unpacks with unzip -j
    _pubmedvision(
        "PubMedVision, alignment VQA",
        Layout(
            "pubmedvision_alignment",
            "PubMedVision_Alignment_VQA.json",
            _PUBMEDVISION_IMAGES,
            captioning=True,
            flat=True,
        ),
    ),
    _pubmedvision(
        "PubMedVision, instruction tuning VQA",
        Layout("pubmedvision_instruct", "PubMedVision_InstructionTuning_VQA.json", _PUBMEDVISION_IMAGES, flat=True),
    ),
)
