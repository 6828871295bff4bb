"""Multiple choice: PMC-VQA for training; OmniMedVQA, MMMU's medical subjects and MedXpertQA-MM for evaluation only.

Letters that some files write before options (`A: …`) are removed: the prompt adds them again.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.reading.csv_rows import Table, csv_rows
from data_prep.reading.faults import NO_ANSWER, NO_IMAGE, NO_QUESTION, NOT_AN_OPTION, Unusable
from data_prep.reading.files import Images, find_files, shard_name
from data_prep.reading.parquet import parquet_rows
from data_prep.reading.parts import parts_of
from data_prep.reading.rows import WHOLE, Part, Row, json_rows
from data_prep.reading.words import without_letters
from data_prep.sources.source import (
    Source,
    as_published,
    choice_sample,
    filled,
    need,
    qa_sample,
    question_and_answers,
    records,
    text,
)
from infimed_jax.data.prompts import LETTERS, lettered
from infimed_jax.data.sample import Sample, Skipped
from infimed_jax.evaluation.benchmarks.mmmu_med import in_brackets
from infimed_jax.evaluation.benchmarks.pmc_vqa import usual_cells

_PMC_FILES = {
    "train": ("train_2.csv", "train2.csv"),
    "test": ("test_2.csv", "test2.csv"),
    "train_v1": ("train.csv",),
    "test_v1": ("test.csv",),
    "test_clean_v1": ("test_clean.csv",),
}


def _pmc_files(folder: Path, split: str) -> list[Path]:
    return find_files(folder, *_PMC_FILES[split])[:1]


def read_pmc_vqa(folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    """Version 2 (`Answer` is the letter) and version 1 (`Answer_label` is, `Answer` the text)."""
    images = Images(*(folder / place for place in ("figures", "images", "images_2", "images_2.zip", "images.zip")))
    answer = "Answer_label" if split.endswith("v1") else "Answer"
    table = Table(("Figure_path", "Question", *(f"Choice {letter}" for letter in "ABCD"), answer))
    rows = csv_rows(_pmc_files(folder, split)[0], table, part)
    yield from records(f"pmc_vqa/{split}", rows, partial(_pmc_sample, images, answer), part.first)


def _pmc_sample(images: Images, answer: str, id: str, row: Row) -> Sample:
    question, letter = need(row, "Question", NO_QUESTION), need(row, answer, NO_ANSWER)
    cells = [row[f"Choice {mark}"] for mark in "ABCD"]
    name = text(row["Figure_path"])
    meta = filled(image_id=f"pmc_vqa/{name}", language="en", source_id=row.get("index"))
    meta |= as_published(row, "Question", cells, usual_cells(without_letters(cells)))
    return choice_sample(id, (images.read(name),), question, cells, letter.upper(), meta)


def _omni_files(folder: Path, split: str) -> list[Path]:
    return find_files(folder, "QA_information/Open-access/*.json")


def read_omnimedvqa(folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    images = Images(folder, folder / "Images.zip")
    for file in [folder / part.file] if part.file else _omni_files(folder, split):
        prefix = f"omnimedvqa/{split}/{shard_name(folder, file)}"
        yield from records(prefix, json_rows(file, part), partial(_omni_sample, images), part.first)


def _omni_sample(images: Images, id: str, row: Row) -> Sample:
    """The gold letter is that of the option equal to `gt_answer`; C and D may be absent."""
    question, gold = need(row, "question", NO_QUESTION), need(row, "gt_answer", NO_ANSWER)
    cells = [cell for letter in "ABCD" if text(cell := row.get(f"option_{letter}"))]
    options = [text(cell) for cell in cells]
    if gold not in options:
        raise Unusable(NOT_AN_OPTION)
    name = text(row.get("image_path"))
    meta = filled(
        image_id=f"omnimedvqa/{name}",
        source_id=row.get("question_id"),
        dataset=row.get("dataset"),
        question_type=row.get("question_type"),
        modality=row.get("modality_type") or row.get("modality"),  # one file has the other name
        language="en",
    )
    meta |= as_published(row, "question", lettered(cells), lettered(without_letters(options)))
    return choice_sample(id, (images.read(name),), question, options, LETTERS[options.index(gold)], meta)


MMMU_SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
_MMMU_IMAGES = tuple(f"image_{number}" for number in range(1, 8))


def _mmmu_files(folder: Path, split: str) -> list[Path]:
    return [find_files(folder, f"{subject}/{split}-*.parquet")[0] for subject in MMMU_SUBJECTS]


def read_mmmu(folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    columns = ("id", "question", "options", "answer", "question_type", *_MMMU_IMAGES)
    for file in [folder / part.file] if part.file else _mmmu_files(folder, split):
        prefix = f"mmmu_med/{split}/{shard_name(folder, file)}"
        make = partial(_mmmu_sample, Images(folder), file.parent.name)
        yield from records(prefix, parquet_rows(file, columns, part), make, part.first)


def _mmmu_sample(images: Images, subject: str, id: str, row: Row) -> Sample:
    """The question keeps its `<image 1>`, which says which image the text refers to."""
    question, gold = question_and_answers(row)
    encoded = tuple(images.cell(row[name]) for name in _MMMU_IMAGES if row[name] is not None)
    if not encoded:
        raise Unusable(NO_IMAGE)
    if gold == ("?",):  # the test split's answers are secret
        raise Unusable(NO_ANSWER)
    source_id = text(row["id"])
    meta = filled(source_id=source_id, image_id=f"mmmu_med/{source_id}", subject=subject, language="en")
    cells = _literal_list(text(row["options"]))
    options = [text(cell) for cell in cells]
    meta |= as_published(row, "question", in_brackets(cells), in_brackets(without_letters(options)))
    if text(row["question_type"]) == "multiple-choice" or options:
        return choice_sample(id, encoded, question, options, gold[0], meta)
    return qa_sample(id, encoded, question, gold, meta)


def _literal_list(literal: str) -> list[Any]:
    """A Python list, as MMMU writes its options: parsed as a literal, never evaluated. Raises Unusable."""
    try:
        value = ast.literal_eval(literal) if 0 < len(literal) < 20_000 else []
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise Unusable(NOT_AN_OPTION) from error
    if not isinstance(value, list):
        raise Unusable(NOT_AN_OPTION)
    return value


def read_medxpertqa(folder: Path, split: str) -> Iterator[Sample | Skipped]:
    file = find_files(folder, f"MM/{split}.jsonl")[0]
    images = Images(folder / "images", folder / "images.zip")
    yield from records(f"medxpertqa_mm/{split}", json_rows(file), partial(_medxpert_sample, images))


def _medxpert_sample(images: Images, id: str, row: Row) -> Sample:
    """The question keeps its own list of options, which the benchmark's prompt shows twice."""
    question = need(row, "question", NO_QUESTION)
    label = need(row, "label", NO_ANSWER).upper()
    given = row.get("options")
    if isinstance(given, list):
        given = {text(option.get("letter")): option.get("content") for option in given if isinstance(option, dict)}
    if not isinstance(given, dict) or sorted(given) != list(LETTERS[: len(given)]):
        raise Unusable(NOT_AN_OPTION)
    names = row.get("images")
    if not isinstance(names, list) or not names:
        raise Unusable(NO_IMAGE)
    source_id = text(row.get("id"))
    meta = filled(
        source_id=source_id,
        image_id=f"medxpertqa_mm/{text(names[0])}",
        question_type=row.get("question_type"),
        medical_task=row.get("medical_task"),
        organ=text(row.get("body_system")).lower(),
        language="en",
    )
    cells = [given[letter] for letter in sorted(given)]
    options = [text(cell) for cell in cells]
    meta |= as_published(row, "question", lettered(cells), lettered(without_letters(options)))
    encoded = images.cells(names)
    return choice_sample(id, encoded, question, options, label, meta)


SOURCES = (
    Source(
        name="pmc_vqa",
        benchmark="pmc_vqa",
        title="PMC-VQA, versions 1 and 2",
        licence="CC-BY-SA-4.0",
        commercial_use=True,
        splits=tuple(_PMC_FILES),
        size="version 1: 227,000 questions on 149,000 images; version 2: test of 33,430",
        layout="train_2.csv, test_2.csv (version 2), train.csv, test.csv, test_clean.csv (version 1); figures/, "
        "images/ or the zip files",
        columns=("Figure_path", "Question", "Choice A..D", "Answer", "Answer_label"),
        obtain="xmcmic/PMC-VQA on the Hugging Face Hub",
        notes="the card says CC BY-SA without a version, from articles whose licence allows commercial use",
        read=read_pmc_vqa,
        shards=parts_of(_pmc_files),
    ),
    Source(
        name="omnimedvqa",
        benchmark="omnimedvqa",
        title="OmniMedVQA, open-access part",
        licence="not verified here: it joins 73 sets with their own terms",
        splits=("test",),
        size="88,996 questions",
        layout="QA_information/Open-access/*.json, Images/",
        columns=("question_id", "question", "gt_answer", "image_path", "option_A..D", "question_type", "modality_type"),
        obtain="the link on OmniMedVQA's page",
        read=read_omnimedvqa,
        shards=parts_of(_omni_files),
        training_allowed=False,
    ),
    Source(
        name="mmmu_med",
        benchmark="mmmu_med",
        title="MMMU, the five medical subjects",
        licence="Apache-2.0",
        splits=("validation", "dev"),
        size="150 validation questions",
        layout="SUBJECT/SPLIT-*.parquet for " + ", ".join(MMMU_SUBJECTS),
        columns=("id", "question", "options", "answer", "question_type", "image_1..7"),
        obtain="MMMU/MMMU on the Hugging Face Hub",
        notes="licence as of the dataset card; not verified here",
        read=read_mmmu,
        shards=parts_of(_mmmu_files),
        training_allowed=False,
    ),
    Source(
        name="medxpertqa_mm",
        benchmark="medxpertqa",
        title="MedXpertQA, multimodal part",
        licence="MIT",
        splits=("test", "dev"),
        size="2,000 test questions",
        layout="MM/test.jsonl, MM/dev.jsonl, images/ or images.zip",
        columns=("id", "question", "options", "label", "images", "question_type", "medical_task", "body_system"),
        obtain="TsinghuaC3I/MedXpertQA on the Hugging Face Hub",
        read=read_medxpertqa,
        training_allowed=False,
    ),
)
