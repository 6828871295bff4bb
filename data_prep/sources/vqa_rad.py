"""VQA-RAD (Lau et al., Scientific Data 2018): clinicians' questions on 315 radiology images, in its original JSON.

The split is by question: all 203 test images also occur in train, so a test score says nothing about new images.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.reading.files import Images
from data_prep.reading.rows import Row, read_rows
from data_prep.sources.source import (
    Source,
    as_published,
    caption_sample,
    filled,
    qa_sample,
    question_and_answers,
    records,
    text,
)
from infimed_jax.data.sample import Sample, Skipped

NAME = "vqa_rad"
_ORGANS = {"CHEST": "chest", "ABD": "abdomen", "HEAD": "head"}


def read(folder: Path, split: str) -> Iterator[Sample | Skipped]:
    """`train`: all 3,064 rows. `train_usual`: the 1,793 that papers use. `test`: 451. `documents`: train as statements.

    `documents` serves pretraining, since VQA-RAD has no captions: one document for each row of `train_usual`.
    The release as one file has no rows that fill a frame, so its `train` has 1,797; the others are the same.
    """
    rows = _rows(folder, split == "test")
    if split in ("train_usual", "documents"):
        rows = usual(rows, _rows(folder, True))
    images = Images(folder / "images", folder / "VQA_RAD Image Folder", folder / "images.zip")
    yield from records(f"{NAME}/{split}", rows, partial(_sample, images, split == "documents"))


def _rows(folder: Path, test: bool) -> list[Row]:
    """From the two files, or from the one of the Open Science Framework, whose test rows are of phrase type test_…."""
    whole = folder / "VQA_RAD Dataset Public.json"
    if (folder / "trainset.json").is_file() or not whole.is_file():
        return read_rows(folder / ("testset.json" if test else "trainset.json"))
    typed = [(row, text(row.get("phrase_type"))) for row in read_rows(whole)]
    return [row | {"phrase_type": kind.removeprefix("test_")} for row, kind in typed if kind.startswith("test") == test]


def usual(train: list[Row], test: list[Row]) -> list[Row]:
    """Without rephrasings that fill a frame (1,797), repeated rows (3) and rows that test has too (1)."""
    seen = {_key(row) for row in test}
    kept = []
    for row in train:
        if row.get("phrase_type") != "frame" and _key(row) not in seen:
            seen.add(_key(row))
            kept.append(row)
    return kept


def _key(row: Row) -> tuple[str, ...]:
    return tuple(text(row.get(field)).lower() for field in ("image_name", "question", "answer"))


def _sample(images: Images, document: bool, id: str, row: Row) -> Sample:
    question, gold = question_and_answers(row)
    image_name, organ = text(row.get("image_name")), text(row.get("image_organ"))
    answer_type = text(row.get("answer_type")).upper()  # two rows have a trailing blank
    meta = filled(
        image_id=f"{NAME}/{image_name}",
        organ=_ORGANS.get(organ, organ.lower()),
        question_type=row.get("question_type"),
        phrase_type=row.get("phrase_type"),
        answer_type=answer_type,
        qid=row.get("qid"),
        language="en",
    )
    meta |= as_published(row, "question")
    image = images.read(image_name)
    if document:
        return caption_sample(id, (image,), f"{question} {gold[0]}", meta)
    return qa_sample(id, (image,), question, gold, meta, answer_type)


SOURCE = Source(
    name=NAME,
    benchmark="vqa_rad",
    title="VQA-RAD",
    licence="CC0-1.0",
    commercial_use=True,
    allow_external_api=True,
    splits=("train", "train_usual", "documents", "test"),
    size="3,064 / 451 questions on 315 images; 1,793 of the former are the usual train split",
    layout="trainset.json, testset.json, images/*.jpg; or VQA_RAD Dataset Public.json, VQA_RAD Image Folder/",
    columns=("qid", "image_name", "image_organ", "question", "answer", "answer_type", "question_type", "phrase_type"),
    obtain="the dataset's page on the Open Science Framework (osf.io/89kps); the two files are MEVF's copy of it",
    read=read,
)
