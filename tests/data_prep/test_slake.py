"""SLAKE: both languages, both file names, and images that are not there."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data_prep.sources.slake import SOURCE
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.sample import Skipped

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "slake_text"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"SLAKE's annotations are not at {REAL}")


@real
@pytest.mark.parametrize(
    ("split", "count", "unanswered"), [("train", 9835, 1), ("validation", 2099, 0), ("test", 2094, 0)]
)
def test_without_images_every_row_is_skipped_and_counted(split, count, unanswered):
    records = list(SOURCE.read(REAL, split))
    assert all(isinstance(record, Skipped) for record in records)
    assert Counter(record.reason for record in records) == Counter(
        {"image missing": count - unanswered, "no answer": unanswered}
    )


@real
def test_real_rows_with_an_image(tmp_path):
    """The first image of the real test file, put in place as a stand-in: its rows in both languages become samples."""
    rows = json.loads((REAL / "test.json").read_text(encoding="utf-8"))
    name = rows[0]["img_name"]
    (tmp_path / "test.json").write_bytes((REAL / "test.json").read_bytes())
    (tmp_path / "imgs" / name).parent.mkdir(parents=True)
    (tmp_path / "imgs" / name).write_bytes(b"stand-in")
    samples = [record for record in SOURCE.read(tmp_path, "test") if not isinstance(record, Skipped)]
    of_image = [row for row in rows if row["img_name"] == name]
    assert len(samples) == len(of_image) > 5
    for sample, row in zip(samples, of_image, strict=True):
        assert sample.meta["language"] == row["q_lang"] and sample.meta["modality"] == row["modality"]
        assert sample.question == row["question"].strip()
        assert sample.answer.lower() == row["answer"].strip().lower()
        assert (sample.kind == "yes_no") == (row["answer"] in ("Yes", "No"))
        assert (sample.kind == "open") == (row["answer_type"] == "OPEN")
        prompt = as_turns(sample)[0].content[1]
        assert ("回答" in prompt) == (row["q_lang"] == "zh")


@pytest.mark.parametrize("name", ["validate.json", "validation.json"])
def test_both_names_of_the_validation_file(tmp_path, name):
    row = {"img_name": "xmlab1/source.jpg", "question": "Why?", "answer": "gas", "answer_type": "OPEN", "q_lang": "en"}
    (tmp_path / name).write_text(json.dumps([row]))
    (tmp_path / "imgs" / "xmlab1").mkdir(parents=True)
    (tmp_path / "imgs" / "xmlab1" / "source.jpg").write_bytes(b"x")
    (sample,) = SOURCE.read(tmp_path, "validation")
    assert sample.answer == "gas" and sample.meta["image_id"] == "slake/xmlab1/source.jpg"


def test_a_row_in_a_language_without_wording_is_skipped_and_ends_nothing(tmp_path):
    row = {"img_name": "xmlab1/source.jpg", "question": "Why?", "answer": "gas", "answer_type": "OPEN"}
    (tmp_path / "test.json").write_text(json.dumps([row | {"q_lang": "fr"}, row | {"q_lang": 5}, row]))
    (tmp_path / "imgs" / "xmlab1").mkdir(parents=True)
    (tmp_path / "imgs" / "xmlab1" / "source.jpg").write_bytes(b"x")
    french, number, sample = SOURCE.read(tmp_path, "test")
    assert french.reason == number.reason == "language without a wording for questions"
    assert sample.meta["language"] == "en"
