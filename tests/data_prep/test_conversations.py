"""LLaVA-style conversations: marks become images, turns are checked, and each dataset is read in its own layout."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.reading.faults import Unusable
from data_prep.sources import SOURCES
from data_prep.sources.source import with_options
from data_prep.sources.turns import conversation, turns_of
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.records import check_sample
from infimed_jax.data.sample import Sample, Skipped, Turn


def spoken(*values: str, roles: tuple[str, ...] = ("human", "gpt")) -> list[dict]:
    return [{"from": roles[number % len(roles)], "value": value} for number, value in enumerate(values)]


def made(turns, images: int, **row) -> tuple[Turn, ...]:
    said, _ = turns_of({"conversations": turns} | row)
    return conversation(said, images)[0]


def test_marks_become_images_where_they_stand():
    assert made(spoken("<image>\nWhat?", "Gas."), 1) == (
        Turn("user", (0, "\nWhat?")),
        Turn("assistant", ("Gas.",)),
    )
    assert made(spoken("What?\n<image>", "Gas.", "And <image>?", "Air."), 2) == (
        Turn("user", ("What?\n", 0)),
        Turn("assistant", ("Gas.",)),
        Turn("user", ("And ", 1, "?")),
        Turn("assistant", ("Air.",)),
    )
    assert made(spoken("Both?", "Yes."), 2)[0] == Turn("user", (0, 1, "\nBoth?"))  # PubMedVision has no marks
    assert made(spoken("Hi", "Hello."), 0) == (Turn("user", ("Hi",)), Turn("assistant", ("Hello.",)))
    system = [{"role": "system", "content": "Be brief."}, *spoken("<image>Q", "A")]
    assert made(system, 1)[0] == Turn("system", ("Be brief.",))


def test_a_mark_in_a_reply_is_the_image_of_the_turn_before():
    alone = made(spoken("What?", "<image>\nGas."), 1)
    assert alone == (Turn("user", (0, "\nWhat?")), Turn("assistant", ("Gas.",)))
    beside = made(spoken("<image>\nWhat?", "In <image>: gas."), 1)  # the image has its place: the reply's is none
    assert beside == (Turn("user", (0, "\nWhat?")), Turn("assistant", ("In : gas.",)))
    later = made(spoken("<image>What?", "Gas.", "And here?", "<image>Air."), 2)
    assert [turn.content for turn in later] == [(0, "What?"), ("Gas.",), (1, "\nAnd here?"), ("Air.",)]
    system = [{"role": "system", "content": "<image>Be brief."}, *spoken("Q", "A")]
    assert [turn.content for turn in made(system, 1)] == [("Be brief.",), (0, "\nQ"), ("A",)]
    with pytest.raises(Unusable, match="image marks do not match images"):
        made(spoken("What?", "<image><image>Gas."), 1)


def test_a_closed_think_block_before_a_reply_is_its_reasoning():
    turns = made(spoken("Q", "<think>\nThe edge is visible.\n</think>\n\nPneumothorax.", "And?", "No <b>."), 0)
    assert turns[1] == Turn("assistant", ("Pneumothorax.",), "The edge is visible.")
    assert turns[3] == Turn("assistant", ("No <b>.",))
    assert made(spoken("Q", "<think></think>A"), 0)[1] == Turn("assistant", ("A",))
    apart = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "The edge."}]
    assert made(apart, 0)[1] == Turn("assistant", ("A",), "The edge.")
    for reply in ("<think>The edge", "The edge.</think>A", "A <think>b</think>", "<think>a</think>b<think>c</think>"):
        with pytest.raises(Unusable, match="think block that is not closed, or not at the start"):
            made(spoken("Q", reply), 0)
    with pytest.raises(Unusable, match="no text"):
        made(spoken("Q", "<think>The edge</think>"), 0)


def test_other_keys_roles_and_parts_of_turns():
    usual = (Turn("system", ("Be brief.",)), Turn("user", (0, "\nQ")), Turn("assistant", ("A",)))
    assert made(spoken("<image>\nQ", "A", roles=("user", "model")), 1, system="Be brief.") == usual
    assert made([{"from": "human", "value": 7}, {"from": "gpt", "value": True}], 0)[1] == Turn("assistant", ("yes",))
    both = [{"role": "system", "content": "In English."}, *spoken("Q", "A")]
    assert made(both, 0, system="Be brief.")[0] == Turn("system", ("Be brief.\n\nIn English.",))
    assert made(both, 0, system="In English.")[0] == Turn("system", ("In English.",))
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nQ"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    said, named = turns_of({"messages": parts, "system": "Be brief."})
    assert conversation(said, 1) == (usual, 0) and named == []
    parts[0]["content"][0] = {"type": "image_url", "image_url": {"url": "a.jpg"}}
    assert turns_of({"messages": parts})[1] == [{"url": "a.jpg"}]


def test_an_image_that_a_turn_names_is_read(tmp_path):
    content = [{"type": "text", "text": "Q: "}, {"type": "image", "image": "a.jpg"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]}
    folder = write(tmp_path, "train.json", [row, row | {"image": "a.jpg"}], {"images/a.jpg": b"x"})
    sample, bad = SOURCES["llava_json"].read(folder, "train")
    assert sample.images == (b"x",) and sample.turns[0].content == ("Q: ", 0)
    assert bad.reason == "image marks do not match images"


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        (None, 0, "no list of turns"),
        ([], 0, "no list of turns"),
        (["text"], 0, "no list of turns"),
        ([{"from": "system", "value": "Be brief."}], 0, "no list of turns"),
        (spoken("only a question"), 0, "ends with the user"),
        (spoken("Q", "A", "Q"), 0, "ends with the user"),
        (spoken("A", "Q", roles=("gpt", "human")), 0, "begins with a reply"),
        (spoken("Q", "Q2", "A", "A2", roles=("human", "human", "gpt", "gpt")), 0, "two turns of one role"),
        (spoken("Q", "A", "S", roles=("user", "gpt", "system")), 0, "system turn after"),
        (spoken("Q", "A", roles=("robot", "gpt")), 0, "unknown role.*robot"),
        (spoken("Q", "A", roles=("user", "tool")), 0, "unknown role.*tool"),
        (spoken("<image>\n", "A"), 1, "no text"),
        (spoken("Q", "  "), 0, "no text"),
        ([{"from": "human", "value": None}, {"from": "gpt", "value": "A"}], 0, "no text"),
        ([{"from": "human", "value": [{"type": "video"}]}, {"from": "gpt", "value": "A"}], 0, "video"),
        ([{"from": "human", "value": [{"type": "audio"}]}, {"from": "gpt", "value": "A"}], 0, "neither text nor image"),
        (spoken("<image>Q", "A"), 0, "marks"),
        (spoken("<image><image>Q", "A"), 1, "marks"),
        (spoken("<image>Q", "A"), 2, "marks"),
    ],
)
def test_conversations_that_contradict_themselves_are_named(turns, images, reason):
    with pytest.raises(Unusable, match=reason):
        made(turns, images)


WORDS = st.sampled_from(
    ["Q", "<image>", "<image>\n肺?", "A <image> <image>", "<think>a</think>b", "<think>a", "", "\0"]
)
NAMES = st.sampled_from(["a.jpg", "A.JPG", "https://x/a.jpg", "\0", ".", ".."])
VALUES = st.none() | st.booleans() | st.floats() | WORDS
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url"]), "text": VALUES},
    optional={key: NAMES | VALUES | st.dictionaries(st.just("url"), NAMES) for key in ("image", "image_url", "url")},
)
SAID = WORDS | VALUES | st.lists(PARTS, min_size=1, max_size=3) | PARTS


@given(
    st.lists(st.tuples(SAID, WORDS), min_size=1, max_size=2),
    NAMES | st.lists(NAMES | st.just("a.jpg"), max_size=3) | VALUES | st.dictionaries(st.just("path"), NAMES),
    st.fixed_dictionaries({}, optional={"system": VALUES, "language": VALUES | st.lists(VALUES)}),
    st.lists(PARTS | VALUES | st.dictionaries(st.just("from"), VALUES), max_size=2),
    st.sampled_from(["train", "documents"]),
)
@settings(max_examples=300, deadline=None)
def test_any_row_is_a_sample_or_has_a_reason(tmp_path_factory, talk, images, more, odd, split):
    folder = tmp_path_factory.getbasetemp() / "any"
    turns = [*spoken(*(said for pair in talk for said in pair)), *(odd if len(odd) > 1 else [])]
    write(folder, f"{split}.json", [{"conversations": turns, "image": images} | more], {"images/a.jpg": b"x"})
    (record,) = SOURCES["llava_json"].read(folder, split)
    if isinstance(record, Skipped):
        assert record.reason
        return
    check_sample(record)
    turns = as_turns(record)
    assert [piece for turn in turns for piece in turn.content if isinstance(piece, int)] == [*range(len(record.images))]
    assert not any("<image>" in turn.text or (turn.role == "assistant" and "<think>" in turn.text) for turn in turns)


def test_the_key_that_was_expected_is_named():
    with pytest.raises(Unusable, match="under conversations or messages; it has id, dialog"):
        turns_of({"id": 1, "dialog": spoken("Q", "A")})


def test_a_rows_language_is_found_by_its_script_and_never_claimed(tmp_path):
    def row(*values: str, **keys) -> dict:
        return {"conversations": spoken(*values)} | keys

    rows = [row("图中有什么？", "左侧气胸。"), row("What?", "Gas."), row("Was?", "Luft.", language="zh")]
    folder = write(tmp_path, "train.json", rows, {})
    assert [s.meta.get("language") for s in SOURCES["llava_json"].read(folder, "train")] == ["zh", None, "zh"]
    source, _ = with_options(SOURCES["llava_json"], {"language": "en"})
    assert {sample.meta["language"] for sample in source.read(folder, "train")} == {"en"}


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
        ({"path": "b.jpg"}, "image missing"),
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
