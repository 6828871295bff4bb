"""Multiple choice in the published layouts: letters, option texts and images, and rows that contradict themselves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import SOURCES
from data_prep.sources.choices import MMMU_SUBJECTS
from infimed_jax.data.sample import Sample, Skipped

V2 = ["index", "Figure_path", "Caption", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer", "split"]
V1 = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"]
CHOICES = [" A: Diffuse uptake ", "B:Focal uptake", "C. difficile", "D:"]


def table(file: Path, header: list[str], rows: list[list]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def reasons(records) -> list[str]:
    return [record.reason if isinstance(record, Skipped) else record.answer for record in records]


@pytest.mark.parametrize(
    ("split", "file", "place", "header"),
    [
        ("test", "test_2.csv", "figures", V2),
        ("train", "train2.csv", "images_2", V2),
        ("train_v1", "train.csv", "images", V1),
        ("test_clean_v1", "test_clean.csv", "images", V1),
    ],
)
def test_pmc_vqa_in_both_layouts(tmp_path, split, file, place, header):
    (tmp_path / place).mkdir()
    (tmp_path / place / "PMC1_F1.jpg").write_bytes(b"A")

    def row(letter: str, image: str = "PMC1_F1.jpg", question: str = " What uptake? ") -> list[str]:
        if header is V1:
            return [image, question, "Focal uptake", *CHOICES, letter]
        return ["0", image, "A caption", question, *CHOICES, letter, "test"]

    table(tmp_path / file, header, [row("B"), row("E"), row(""), row("B", "gone.jpg"), row("b"), row("B", question="")])
    records = list(SOURCES["pmc_vqa"].read(tmp_path, split))
    assert reasons(records) == ["B", "answer is none of the options", "no answer", "image missing", "B", "no question"]
    sample = records[0]
    assert sample.kind == "choice" and sample.question == "What uptake?" and sample.images == (b"A",)
    assert sample.options == ("Diffuse uptake", "Focal uptake", "C. difficile")
    assert json.loads(sample.meta["options_shown"]) == CHOICES and sample.meta["question_shown"] == " What uptake? "


def test_pmc_vqa_says_which_column_a_wrong_layout_lacks(tmp_path):
    table(tmp_path / "train.csv", V2, [])
    with pytest.raises(Exception, match=r"train\.csv lacks Answer_label: its columns are index"):
        list(SOURCES["pmc_vqa"].read(tmp_path, "train_v1"))


def test_omnimedvqa_takes_the_letter_of_the_equal_option(tmp_path):
    row = {
        "dataset": "ACRIMA",
        "question_id": "ACRIMA_0000",
        "question_type": "Modality Recognition",
        "question": "What imaging technique?",
        "gt_answer": "Fundus imaging",
        "image_path": "Images/ACRIMA/Im553.png",
        "option_A": "Lung imaging",
        "option_B": "Fundus imaging",
        "modality_type": "Fundus Photography",
    }
    folder = tmp_path / "QA_information" / "Open-access"
    folder.mkdir(parents=True)
    (tmp_path / "Images" / "ACRIMA").mkdir(parents=True)
    (tmp_path / "Images" / "ACRIMA" / "Im553.png").write_bytes(b"A")
    four = row | {"option_C": "X", "option_D": "Y", "gt_answer": "Y"}
    bad = row | {"gt_answer": "Else"}
    (folder / "ACRIMA.json").write_text(json.dumps([row, four, bad, row | {"image_path": "Images/none.png"}]))
    other = {key: value for key, value in row.items() if key != "modality_type"} | {"modality": "CT"}
    (folder / "Chest CT Scan.json").write_text(json.dumps([other]))
    records = list(SOURCES["omnimedvqa"].read(tmp_path, "test"))
    assert reasons(records) == ["B", "D", "answer is none of the options", "image missing", "B"]
    assert records[0].options == ("Lung imaging", "Fundus imaging")
    assert records[0].meta["modality"] == "Fundus Photography" and records[4].meta["modality"] == "CT"
    assert records[4].id == "omnimedvqa/test/QA_information/Open-access/Chest CT Scan.json/00000"


def mmmu_rows() -> dict[str, list]:
    image = {"bytes": b"A", "path": "1.png"}
    rows = {
        "id": ["v_1", "v_2", "v_3", "v_4", "v_5"],
        "question": ["See <image 1>", "Two <image 1> <image 2>", "Open?", "Q", "Q"],
        "options": ["['a', \"b's\", 'c']", "['<image 2>', 'b']", "[]", "__import__('os')", "['a', 'b']"],
        "answer": ["C", "A", "1.5", "A", "?"],
        "question_type": ["multiple-choice"] * 2 + ["open"] + ["multiple-choice"] * 2,
        "explanation": [""] * 5,
    }
    for number in range(1, 8):
        rows[f"image_{number}"] = [image if number == 1 else None] * 5
    rows["image_2"] = [None, {"bytes": b"B", "path": None}, None, None, None]
    return rows


def test_mmmu_medical_subjects(tmp_path):
    for subject in MMMU_SUBJECTS:
        (tmp_path / subject).mkdir()
        file = tmp_path / subject / "validation-00000-of-00001.parquet"
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {k: pa.array(v, struct) if k.startswith("image") else pa.array(v) for k, v in mmmu_rows().items()}
        pq.write_table(pa.table(columns), file)
    records = list(SOURCES["mmmu_med"].read(tmp_path, "validation"))
    assert reasons(records) == ["C", "A", "1.5", "answer is none of the options", "no answer"] * 5
    first, second, third = records[:3]
    assert first.options == ("a", "b's", "c") and "See <image 1>" in first.question
    assert second.images == (b"A", b"B") and third.kind == "open"
    assert first.meta["subject"] == "Basic_Medical_Science" and len({record.id for record in records}) == 25


@pytest.mark.parametrize("as_list", [False, True])
def test_medxpertqa_keeps_the_options_in_the_question(tmp_path, as_list):
    texts = {"A": "Erythema", "B": "Larva", "C": "Agglutinin", "D": "Cutis", "E": "Ab igne"}
    options = [{"letter": letter, "content": text} for letter, text in texts.items()] if as_list else texts
    row = {
        "id": "MM-1682",
        "question": "A patient has a rash.\nAnswer Choices: (A) Erythema (B) Larva (C) Agglutinin (D) Cutis (E) Ab",
        "options": options,
        "label": "C",
        "images": ["MM-1682-a.jpeg", "MM-1682-b.jpeg"],
        "medical_task": "Diagnosis",
        "body_system": "Skin",
        "question_type": "Reasoning",
    }
    (tmp_path / "MM").mkdir()
    (tmp_path / "images").mkdir()
    for name in row["images"]:
        (tmp_path / "images" / name).write_bytes(name.encode())
    bad = [row | {"label": "F"}, row | {"images": []}, row | {"options": {"A": "x", "C": "y"}}]
    (tmp_path / "MM" / "test.jsonl").write_text("\n".join(map(json.dumps, [row, *bad])))
    sample, *rest = SOURCES["medxpertqa_mm"].read(tmp_path, "test")
    assert isinstance(sample, Sample) and sample.question == row["question"]
    assert sample.options == tuple(texts.values()) and sample.answer == "C" and len(sample.images) == 2
    assert sample.meta["medical_task"] == "Diagnosis" and sample.meta["question_type"] == "Reasoning"
    assert reasons(rest) == ["answer is none of the options", "no image", "answer is none of the options"]
