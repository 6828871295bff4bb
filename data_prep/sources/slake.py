"""SLAKE 1.0 (Liu et al., ISBI 2021): questions in English and Chinese on 642 CT, MRI and X-ray images.

Counting the Chinese rows, 142 of 180 test images also occur in train; the English rows alone share none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.reading.files import Images
from data_prep.reading.rows import Row, read_rows
from data_prep.sources.source import (
    LANGUAGES,
    Source,
    as_published,
    filled,
    qa_sample,
    question_and_answers,
    records,
    text,
)
from infimed_jax.data.sample import Sample, Skipped

NAME = "slake"


def read(folder: Path, split: str) -> Iterator[Sample | Skipped]:
    """All rows of a split, both languages, in the file's order."""
    images = Images(folder / "imgs", folder / "imgs.zip")
    yield from records(f"{NAME}/{split}", read_rows(_file(folder, split)), partial(_sample, images))


def _file(folder: Path, split: str) -> Path:
    """The original release says validate.json, its copy on the Hugging Face Hub validation.json."""
    if split == "validation" and not (folder / "validation.json").is_file():
        return folder / "validate.json"
    return folder / f"{split}.json"


def _sample(images: Images, id: str, row: Row) -> Sample:
    question, gold = question_and_answers(row)
    image_name, answer_type = text(row.get("img_name")), text(row.get("answer_type")).upper()
    meta = filled(
        image_id=f"{NAME}/{image_name}",
        modality=row.get("modality"),
        organ=text(row.get("location")).lower(),
        question_type=row.get("content_type"),
        answer_type=answer_type,
        qid=row.get("qid"),
        language=text(row.get("q_lang")) or "en",
    )
    meta |= as_published(row, "question")
    return qa_sample(id, (images.read(image_name),), question, gold, meta, answer_type)


SOURCE = Source(
    name=NAME,
    benchmark="slake",
    title="SLAKE 1.0",
    licence="CC-BY-4.0",
    commercial_use=True,
    allow_external_api=True,
    size="14,028 questions in two languages on 642 images: 9,835 / 2,099 / 2,094",
    layout="train.json, validate.json or validation.json, test.json, imgs/xmlabN/source.jpg (or imgs.zip)",
    columns=("qid", "img_name", "question", "answer", "answer_type", "content_type", "modality", "location", "q_lang"),
    languages=LANGUAGES,
    obtain="Slake1.0.zip from the project's page",
    read=read,
)
