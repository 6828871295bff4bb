"""VQA-Med-2019 (Ben Abacha et al., ImageCLEF 2019): questions on modality, plane, organ and abnormality."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.reading.csv_rows import Table, csv_rows
from data_prep.reading.files import Images
from data_prep.reading.rows import Row
from data_prep.sources.source import Source, answers, filled, qa_sample, question_and_answers, records, text
from infimed_jax.data.sample import Sample, Skipped

NAME = "vqa_med_2019"
_PAIRS = ("image", "question", "answer")
# split: folder, file, folders of images, columns
_LAYOUT = {
    "train": ("ImageClef-2019-VQA-Med-Training", "All_QA_Pairs_train.txt", ("Train_images",), _PAIRS),
    "validation": ("ImageClef-2019-VQA-Med-Validation", "All_QA_Pairs_val.txt", ("Val_images",), _PAIRS),
    "test": (
        "VQAMed2019Test",
        "VQAMed2019_Test_Questions_w_Ref_Answers.txt",
        ("VQAMed2019_Test_Images", "Test_Images"),
        ("image", "category", "question", "answer"),
    ),
}


def read(folder: Path, split: str) -> Iterator[Sample | Skipped]:
    place, file, image_folders, columns = _LAYOUT[split]
    images = Images(*(folder / place / name for name in image_folders))
    rows = csv_rows(folder / place / file, Table(columns, delimiter="|", header=False, quoted=False))
    yield from records(f"{NAME}/{split}", rows, partial(_sample, images))


def _sample(images: Images, id: str, row: Row) -> Sample:
    """The test set separates several right answers by `#`."""
    question, (answer, *_) = question_and_answers(row)
    name = f"{text(row['image'])}.jpg"
    meta = filled(image_id=f"{NAME}/{name}", question_type=row.get("category"), language="en")
    return qa_sample(id, (images.read(name),), question, answers(answer.split("#")), meta)


SOURCE = Source(
    name=NAME,
    title="VQA-Med-2019",
    licence="not verified here",
    splits=tuple(_LAYOUT),
    size="12,792 / 2,000 / 500 questions on 3,200 / 500 / 500 images",
    layout="; ".join(f"{place}/{file}, {place}/{images[0]}/" for place, file, images, _ in _LAYOUT.values()),
    columns=("image|question|answer", "image|category|question|answer (test)"),
    obtain="abachaa/VQA-Med-2019",
    notes="excluded by the paper for its quality",
    read=read,
)
