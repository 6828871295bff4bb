"""VQA-Med-2019: the three folders' bar-separated files, and the test set's alternatives."""

from __future__ import annotations

import pytest

from data_prep.sources.vqa_med_2019 import SOURCE
from infimed_jax.data.sample import Skipped


@pytest.mark.parametrize(
    ("split", "file", "images", "line"),
    [
        ("train", "ImageClef-2019-VQA-Med-Training/All_QA_Pairs_train.txt", "Train_images", "{}|what is it?|{}"),
        ("validation", "ImageClef-2019-VQA-Med-Validation/All_QA_Pairs_val.txt", "Val_images", "{}|what is it?|{}"),
        (
            "test",
            "VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt",
            "VQAMed2019_Test_Images",
            "{}|modality|what is it?|{}",
        ),
    ],
)
def test_each_split_in_its_layout(tmp_path, split, file, images, line):
    pairs = [("synpic1", 'ct "scan'), ("synpic1", "yes"), ("synpic2", "mri"), ("synpic1", ""), ("synpic1", "a b#c d")]
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text("\n".join([*(line.format(*pair) for pair in pairs), "no bars"]))
    folder = (tmp_path / file).parent / images
    folder.mkdir()
    (folder / "synpic1.jpg").write_bytes(b"A")
    records = list(SOURCE.read(tmp_path, split))
    shown = [record.reason if isinstance(record, Skipped) else (record.kind, record.answer) for record in records]
    assert shown == [
        ("open", 'ct "scan'),
        ("yes_no", "yes"),
        "image missing",
        "no answer",
        ("open", "a b"),
        "wrong number of columns",
    ]
    assert records[4].alternatives == ("c d",) and records[0].images == (b"A",)
    assert records[0].meta.get("question_type") == ("modality" if split == "test" else None)
