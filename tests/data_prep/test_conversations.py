"""LLaVA-style conversations: marks become images, turns are checked, and each dataset is read in its own layout."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from data_prep.reading.faults import Unusable
from data_prep.sources import SOURCES
from data_prep.sources.conversations import conversation
from data_prep.sources.source import with_options
from infimed_jax.data.sample import Sample, Skipped, Turn


def spoken(*values: str, roles: tuple[str, ...] = ("human", "gpt")) -> list[dict]:
    return [{"from": roles[number % len(roles)], "value": value} for number, value in enumerate(values)]


def test_marks_become_images_where_they_stand():
    assert conversation(spoken("<image>\nWhat?", "Gas."), 1) == (
        Turn("user", (0, "\nWhat?")),
        Turn("assistant", ("Gas.",)),
    )
    assert conversation(spoken("What?\n<image>", "Gas.", "And <image>?", "Air."), 2) == (
        Turn("user", ("What?\n", 0)),
        Turn("assistant", ("Gas.",)),
        Turn("user", ("And ", 1, "?")),
        Turn("assistant", ("Air.",)),
    )
    assert conversation(spoken("Both?", "Yes."), 2)[0] == Turn("user", (0, 1, "\nBoth?"))  # PubMedVision has no marks
    assert conversation(spoken("Hi", "Hello."), 0) == (Turn("user", ("Hi",)), Turn("assistant", ("Hello.",)))
    system = [{"role": "system", "content": "Be brief."}, *spoken("<image>Q", "A")]
    assert conversation(system, 1)[0] == Turn("system", ("Be brief.",))


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        (None, 0, "out of order"),
        ([], 0, "out of order"),
        (["text"], 0, "out of order"),
        (spoken("only a question"), 0, "out of order"),
        (spoken("A", "Q", roles=("gpt", "human")), 0, "out of order"),
        (spoken("Q", "Q2", "A", "A2", roles=("human", "human", "gpt", "gpt")), 0, "out of order"),
        (spoken("Q", "A", roles=("robot", "gpt")), 0, "out of order"),
        (spoken("<image>\n", "A"), 1, "no text"),
        (spoken("Q", "  "), 0, "no text"),
        ([{"from": "human", "value": None}, {"from": "gpt", "value": "A"}], 0, "no text"),
        (spoken("<image>Q", "A"), 0, "marks"),
        (spoken("<image><image>Q", "A"), 1, "marks"),
        (spoken("<image>Q", "A"), 2, "marks"),
    ],
)
def test_conversations_that_contradict_themselves_are_named(turns, images, reason):
    with pytest.raises(Unusable, match=reason):
        conversation(turns, images)


ROW = {"id": "7", "image": "a.jpg", "conversations": spoken("<image>\nDescribe.", "A small effusion.")}


def write(folder: Path, file: str, rows: list, images: dict[str, bytes]) -> Path:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(rows))
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("name", "file", "place"),
    [
        ("mammoth_vl", "mammoth_si_10M.json", "single_image_data/a.jpg"),
        ("llava_med_alignment", "alignment/llava_med_alignment_500k.json", "images/a.jpg"),
        ("llava_med_instruct", "llava_med_instruct_60k.json", "images/a.jpg"),
        ("llava_med_60k_im_text", "llava_med_instruct_60k_inline_mention.json", "images/a.jpg"),
        ("llava_json", "train.json", "images/a.jpg"),
    ],
)
def test_each_dataset_in_its_layout(tmp_path, name, file, place):
    folder = write(tmp_path, file, [ROW, ROW | {"image": "b.jpg"}, ROW | {"video": "v.mp4"}], {place: b"image"})
    sample, missing, video = SOURCES[name].read(folder, "train")
    assert isinstance(sample, Sample) and sample.kind == "chat" and sample.images == (b"image",)
    assert sample.id == f"{name}/train/00000" and sample.meta["source_id"] == "7"
    assert sample.turns == (Turn("user", (0, "\nDescribe.")), Turn("assistant", ("A small effusion.",)))
    assert missing == Skipped(f"{name}/train/00001", "image missing", "b.jpg")
    assert video == Skipped(f"{name}/train/00002", "video")


def test_documents_are_captions_alone_or_whole_conversations(tmp_path):
    rows = [ROW | {"conversations": spoken("<image>\nDescribe.", "A small effusion.", "Where?", "Left.")}]
    for name, file, text in [
        ("llava_med_alignment", "llava_med_alignment_500k.json", "\nLeft."),
        ("llava_med_instruct", "llava_med_instruct_60k.json", "\nDescribe.\nA small effusion.\nWhere?\nLeft."),
    ]:
        (document,) = SOURCES[name].read(write(tmp_path, file, rows, {"images/a.jpg": b"x"}), "documents")
        assert document.kind == "document" and document.chunks == ((0, text),)


@pytest.mark.parametrize("name", ["pubmedvision_alignment", "pubmedvision_instruct"])
def test_pubmedvision_has_lists_of_images_in_packed_archives_and_no_marks(tmp_path, name):
    file = {"alignment": "Alignment", "instruct": "InstructionTuning"}[name.split("_")[1]]
    row = {
        "image": ["images/pmc_1_0.jpg", "images/pmc_1_1.jpg"],
        "id": f"{file}_VQA_0",
        "modality": "Computed Tomography",
        "body_part": "Chest",
        "conversations": spoken("What is seen?", "A nodule."),
    }
    write(tmp_path, f"PubMedVision_{file}_VQA.json", [row], {})
    with zipfile.ZipFile(tmp_path / "images_3.zip", "w") as archive:
        archive.writestr("pmc_1_0.jpg", b"0")
        archive.writestr("pmc_1_1.jpg", b"1")
    (sample,) = SOURCES[name].read(tmp_path, "train")
    assert sample.images == (b"0", b"1") and sample.turns[0] == Turn("user", (0, 1, "\nWhat is seen?"))
    assert sample.meta["modality"] == "Computed Tomography" and sample.meta["organ"] == "chest"


def test_ones_own_files_by_option_with_bad_lines_named(tmp_path):
    lines = [json.dumps(ROW), "{broken", json.dumps({"conversatons": ROW["conversations"], "image": "a.jpg"})]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    write(tmp_path, "x.json", [], {"pictures/a.jpg": b"image"})
    source, _ = with_options(SOURCES["llava_json"], {"annotations": "mine.jsonl", "images": "pictures"})
    first, broken, misspelt = source.read(tmp_path, "train")
    assert first.images == misspelt.images == (b"image",)
    assert broken == Skipped("llava_json/train/00001", "not valid JSON", "mine.jsonl line 2")


@pytest.mark.parametrize(
    ("image", "made"),
    [
        (float("nan"), "sample"),  # as pandas writes a row of text alone
        (None, "sample"),
        (5, "image missing"),
        (True, "image missing"),
        ({"path": "a.jpg"}, "image missing"),
        ([["a.jpg"]], "image missing"),
    ],
)
def test_an_image_that_is_no_name_is_absent_or_missing_and_no_crash(tmp_path, image, made):
    rows = [{"image": image, "conversations": spoken("Describe.", "An effusion.")}, ROW]
    first, second = SOURCES["llava_json"].read(write(tmp_path, "train.json", rows, {"images/a.jpg": b"x"}), "train")
    assert isinstance(second, Sample)
    if made == "sample":
        assert first.images == () and first.turns[0] == Turn("user", ("Describe.",))
    else:
        assert first.reason == made
