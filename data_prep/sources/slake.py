"""SLAKE 1.0 (Liu et al., ISBI 2021): questions in English and Chinese on 642 CT, MRI and X-ray images.

Counting the Chinese rows, 142 of 180 test images also occur in train; the English rows alone share none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.source import (
    IMAGE_MISSING,
    NO_ANSWER,
    NO_QUESTION,
    Source,
    answer_kind,
    read_image,
    read_rows,
    text,
)
from infimed_jax.data.prompts import question_sample
from infimed_jax.data.sample import Sample, Skipped

NAME = "slake"


def read(folder: Path, split: str) -> Iterator[Sample | Skipped]:
    """All rows of a split, both languages, in the file's order."""
    for number, row in enumerate(read_rows(_file(folder, split))):
        yield _sample(folder, split, number, row)


def _file(folder: Path, split: str) -> Path:
    """The original release says validate.json, its copy on the Hugging Face Hub validation.json."""
    if split == "validation" and not (folder / "validation.json").is_file():
        return folder / "validate.json"
    return folder / f"{split}.json"


def _sample(folder: Path, split: str, number: int, row: dict[str, Any]) -> Sample | Skipped:
    id = f"{NAME}/{split}/{number:05d}"
    question, answer, image_name = (text(row.get(field)) for field in ("question", "answer", "img_name"))
    answer_type = text(row.get("answer_type")).upper()
    if not question:
        return Skipped(id, NO_QUESTION)
    if not answer:
        return Skipped(id, NO_ANSWER)
    image = read_image(folder / "imgs", image_name)
    if image is None:
        return Skipped(id, IMAGE_MISSING, image_name)
    kind = answer_kind(answer, answer_type)
    return question_sample(
        id=id,
        source=NAME,
        split=split,
        images=(image,),
        kind=kind,
        question=question,
        answer=answer.lower() if kind == "yes_no" else answer,
        meta={
            "image_id": f"{NAME}/{image_name}",
            "modality": text(row.get("modality")),
            "organ": text(row.get("location")).lower(),
            "question_type": text(row.get("content_type")),
            "answer_type": answer_type,
            "qid": text(row.get("qid")),
            "language": text(row.get("q_lang")) or "en",
        },
    )


SOURCE = Source(
    name=NAME,
    title="SLAKE 1.0",
    licence="CC-BY-4.0",
    commercial_use=True,
    allow_external_api=True,
    training_allowed=True,
    splits=("train", "validation", "test"),
    layout="train.json, validate.json or validation.json, test.json, imgs/xmlabN/source.jpg",
    obtain="Slake1.0.zip from the project's page",
    read=read,
)
