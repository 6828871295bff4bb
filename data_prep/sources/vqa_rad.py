"""VQA-RAD (Lau et al., Scientific Data 2018): clinicians' questions on 315 radiology images, in its original JSON.

The split is by question: all 203 test images also occur in train, so a test score says nothing about new images.
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
from infimed_jax.data.sample import Sample, Skipped, Turn

NAME = "vqa_rad"
_ORGANS = {"CHEST": "chest", "ABD": "abdomen", "HEAD": "head"}


def read(folder: Path, split: str) -> Iterator[Sample | Skipped]:
    """`train`: all 3,064 rows. `train_usual`: the 1,793 that papers use. `test`: 451. `documents`: train as statements.

    `documents` serves pretraining, since VQA-RAD has no captions: one document for each row of `train_usual`.
    """
    rows = read_rows(folder / ("testset.json" if split == "test" else "trainset.json"))
    if split in ("train_usual", "documents"):
        rows = usual(rows, read_rows(folder / "testset.json"))
    for number, row in enumerate(rows):
        yield _sample(folder, split, number, row)


def usual(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without rephrasings that fill a frame (1,797), repeated rows (3) and rows that test has too (1)."""
    seen = {_key(row) for row in test}
    kept = []
    for row in train:
        if row.get("phrase_type") != "frame" and _key(row) not in seen:
            seen.add(_key(row))
            kept.append(row)
    return kept


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(text(row.get(field)).lower() for field in ("image_name", "question", "answer"))


def _sample(folder: Path, split: str, number: int, row: dict[str, Any]) -> Sample | Skipped:
    id = f"{NAME}/{split}/{number:05d}"
    question, answer, image_name = (text(row.get(field)) for field in ("question", "answer", "image_name"))
    answer_type = text(row.get("answer_type")).upper()  # two rows have a trailing blank
    if not question:
        return Skipped(id, NO_QUESTION)
    if not answer:
        return Skipped(id, NO_ANSWER)
    image = read_image(folder / "images", image_name)
    if image is None:
        return Skipped(id, IMAGE_MISSING, image_name)
    meta = {
        "image_id": f"{NAME}/{image_name}",
        "organ": _ORGANS.get(text(row.get("image_organ")), text(row.get("image_organ")).lower()),
        "question_type": text(row.get("question_type")),
        "phrase_type": text(row.get("phrase_type")),
        "answer_type": answer_type,
        "qid": text(row.get("qid")),
        "language": "en",
    }
    if split == "documents":
        turn = Turn("document", (0, f"\n{question} {answer}"))
        return Sample(id, NAME, split, "document", (image,), (turn,), meta=meta)
    kind = answer_kind(answer, answer_type)
    return question_sample(
        id=id,
        source=NAME,
        split=split,
        images=(image,),
        kind=kind,
        question=question,
        answer=answer.lower() if kind == "yes_no" else answer,
        meta=meta,
    )


SOURCE = Source(
    name=NAME,
    title="VQA-RAD",
    licence="CC0-1.0",
    commercial_use=True,
    allow_external_api=True,
    training_allowed=True,
    splits=("train", "train_usual", "documents", "test"),
    layout="trainset.json, testset.json, images/*.jpg",
    obtain="the dataset's page on the Open Science Framework: the JSON files and the image folder",
    read=read,
)
