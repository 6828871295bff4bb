"""LLaVA-style conversations: a JSON list, or JSON lines, of `{"id", "image", "conversations": [{"from", "value"}]}`.

One reader serves MAmmoTH-VL, LLaVA-Med, PubMedVision and anyone's own files. Each source has the split `train`
(conversations) and `documents` (the same as pretraining text; of captioning sources, the caption alone).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.reading.faults import IMAGE_MARKS, VIDEO, Unusable
from data_prep.reading.files import Images, find_files
from data_prep.reading.parts import json_parts
from data_prep.reading.rows import WHOLE, Part, Row, json_rows
from data_prep.sources.source import (
    LANGUAGE_OPTION,
    LANGUAGES,
    MISPLACED_MARKS,
    Option,
    Source,
    caption_sample,
    filled,
    image_name,
    language_of,
    records,
    text,
)
from data_prep.sources.turns import conversation, turns_of
from infimed_jax.data.sample import Chat, Sample, Skipped

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
    language: str | None = None,
) -> Iterator[Sample | Skipped]:
    """The samples of a split; `annotations` and `images` replace the layout's own places."""
    places = (images,) if images else layout.places
    files = Images(*(folder / place for place in places), flat=layout.flat)
    make = partial(_sample, files, split == "documents", layout.captioning, language)
    rows = json_rows(_file(layout.file, folder, split, annotations), part=part)
    yield from records(f"{layout.name}/{split}", rows, make, part.first)


def _file(file: str, folder: Path, split: str, annotations: str | None) -> Path:
    pattern = annotations or file.format(split=split)
    return find_files(folder, *pattern.split("|"))[0]


def parts(
    file: str,
    folder: Path,
    split: str,
    annotations: str | None = None,
    images: str | None = None,
    language: str | None = None,
) -> list[Part]:
    """`Source.shards`, to which neither the place of the images nor the language matters."""
    return json_parts(_file(file, folder, split, annotations))


def _sample(images: Images, document: bool, captioning: bool, language: str | None, id: str, row: Row) -> Sample:
    source, split = id.split("/")[:2]
    if row.get("video") or row.get("videos"):
        raise Unusable(VIDEO)
    names = _images_of(row)
    spoken, named = turns_of(row)
    if named and names:
        raise Unusable(IMAGE_MARKS, "images beside the turns and within them")
    names = names or named
    turns, misplaced = conversation(spoken, len(names))
    encoded = tuple(map(images.cell, names))
    words = ["\n".join(filter(None, (turn.reasoning, turn.text.strip()))) for turn in turns]
    own = row.get("language") if row.get("language") in LANGUAGES else None
    meta = filled(
        source_id=row.get("id"),
        image_id=(name := image_name(names)) and f"{source}/{name}",
        modality=row.get("modality"),
        organ=text(row.get("body_part")).lower(),
        language=language_of(language or own, " ".join(words)),
    ) | ({MISPLACED_MARKS: str(misplaced)} if misplaced else {})
    if not document:
        return Chat(id, source, split, encoded, turns, meta=meta)
    return caption_sample(id, encoded, "\n".join(words[-1:] if captioning else words), meta)


def _images_of(row: Row) -> list[Any]:
    names = row.get("image") or row.get("images") or []
    if isinstance(names, list):
        return names
    return [names] if names == names else []  # NaN is how tables that became JSON say that there is none


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
            LANGUAGE_OPTION,
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
