"""VQA-RAD: the real files' counts and quirks, and a small hostile folder of the same layout."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data_prep.sources.vqa_rad import SOURCE
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.sample import Sample, Skipped
from infimed_jax.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "vqa_rad"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"VQA-RAD is not at {REAL}")


@real
@pytest.mark.parametrize(
    ("split", "count", "kinds"),
    [
        ("train", 3064, {"yes_no": 1713, "closed": 110, "open": 1241}),
        ("train_usual", 1793, {"yes_no": 940, "closed": 85, "open": 768}),
        ("documents", 1793, {"document": 1793}),
        ("test", 451, {"yes_no": 251, "closed": 21, "open": 179}),
    ],
)
def test_real_counts(split, count, kinds):
    samples = list(SOURCE.read(REAL, split))
    assert len(samples) == count and all(isinstance(sample, Sample) for sample in samples)
    assert Counter(sample.kind for sample in samples) == kinds
    assert len({sample.id for sample in samples}) == count


@real
@pytest.mark.parametrize(("split", "count"), [("train", 1797), ("train_usual", 1793), ("test", 451)])
def test_the_release_as_one_file_gives_the_same_rows(tmp_path, split, count):
    """The real rows, put together as the Open Science Framework has them."""
    train = [row for row in json.loads((REAL / "trainset.json").read_text()) if row["phrase_type"] != "frame"]
    test = json.loads((REAL / "testset.json").read_text())
    whole = [*(row | {"phrase_type": f"test_{row['phrase_type']}"} for row in test), *train]
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(whole))
    (tmp_path / "VQA_RAD Image Folder").symlink_to(REAL / "images")
    samples = list(SOURCE.read(tmp_path, split))
    assert len(samples) == count
    if split != "train":
        assert samples == list(SOURCE.read(REAL, split))


@real
def test_usual_split_shares_no_row_with_test():
    def keys(split: str) -> set[tuple[str, ...]]:
        return {(s.meta["image_id"], s.question.lower(), s.answer.lower()) for s in SOURCE.read(REAL, split)}

    assert len(keys("train_usual")) == 1793  # no row twice
    assert not keys("train_usual") & keys("test")
    assert len(keys("train") & keys("test")) > 0  # which is why there are two splits
    images = {split: {s.meta["image_id"] for s in SOURCE.read(REAL, split)} for split in ("train", "test")}
    assert len(images["test"]) == 203 and images["test"] <= images["train"]


@real
def test_quirks_of_the_real_files():
    rows = json.loads((REAL / "trainset.json").read_text())
    samples = {sample.meta["qid"]: sample for sample in SOURCE.read(REAL, "train")}
    blank = [str(row["qid"]) for row in rows if row["answer_type"] == "CLOSED "]
    assert len(blank) == 2 and {samples[qid].meta["answer_type"] for qid in blank} == {"CLOSED"}
    numbers = [row for row in rows if isinstance(row["answer"], int)]
    assert len(numbers) == 10
    for row in numbers:
        assert samples[str(row["qid"])].answer == str(row["answer"])
    for row in rows:
        sample = samples[str(row["qid"])]
        assert sample.images == ((REAL / "images" / row["image_name"]).read_bytes(),)
        answer = str(row["answer"]).strip()
        assert sample.answer == (answer.lower() if answer.lower() in ("yes", "no") else answer)
        assert as_turns(sample)[-1].content == (sample.answer,)


def write(folder: Path, train: list[dict], test: list[dict] = ()) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(b"not looked at here")
    (folder / "trainset.json").write_text(json.dumps(train))
    (folder / "testset.json").write_text(json.dumps(list(test)))
    return folder


def row(**changes) -> dict:
    usual = {
        "qid": 1,
        "image_name": "a.jpg",
        "image_organ": "ABD",
        "question": "Is there gas?",
        "answer": "Yes",
        "answer_type": "CLOSED",
        "question_type": "PRES",
        "phrase_type": "freeform",
    }
    return {key: value for key, value in (usual | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": ""}, "no answer"),
        ({"answer": "  "}, "no answer"),
        ({"answer": None}, "no answer"),
        ({"answer": ...}, "no answer"),
        ({"answer": []}, "no answer"),
        ({"answer": {"text": "yes"}}, "no answer"),
        ({"answer": [True, False]}, "both yes and no as the answer"),
        ({"question": ""}, "no question"),
        ({"image_name": "b.jpg"}, "image missing"),
        ({"image_name": ""}, "image missing"),
        ({"image_name": ...}, "image missing"),
        ({"image_name": "../trainset.json"}, "image missing: its name leaves the input folder"),
        ({"image_name": "/etc/hostname"}, "image missing: its name leaves the input folder"),
        ({"image_name": "a\0.jpg"}, "image missing"),
        ({"image_name": "a" * 5000}, "image missing"),
    ],
)
def test_unusable_rows_are_skipped_with_their_reason(tmp_path, changes, reason):
    good, bad = SOURCE.read(write(tmp_path / "in", [row(), row(**changes)]), "train")
    assert isinstance(good, Sample) and good.answer == "yes"
    assert isinstance(bad, Skipped) and bad.reason == reason and bad.id == "vqa_rad/train/00001"


def test_odd_but_usable_values(tmp_path):
    rows = [
        row(answer=0),
        row(answer=" No "),
        row(answer="Left", answer_type="closed "),
        row(answer_type=..., answer="gas"),
    ]
    samples = list(SOURCE.read(write(tmp_path / "in", rows), "train"))
    assert [(s.kind, s.answer) for s in samples] == [
        ("closed", "0"),
        ("yes_no", "no"),
        ("closed", "Left"),
        ("open", "gas"),
    ]


def test_documents_are_statements_of_train_rows(tmp_path):
    folder = write(
        tmp_path / "in", [row(), row(phrase_type="frame"), row(qid=3, question="Why?", answer="gas")], [row()]
    )
    (document,) = SOURCE.read(folder, "documents")  # the first row is in test too, the second fills a frame
    assert document.kind == "document"
    assert document.chunks[0] == (0, "\nWhy? gas")


@pytest.mark.parametrize("content", ["", "[1,", '{"a": 1}', "[1]", "\udcff"])
def test_broken_annotations_name_the_file(tmp_path, content):
    folder = write(tmp_path / "in", [])
    (folder / "trainset.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"trainset\.json"):
        list(SOURCE.read(folder, "train"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"testset\.json does not exist"):
        list(SOURCE.read(tmp_path, "test"))
