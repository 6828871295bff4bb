"""The paper's packed JSON: what goes out comes back, each sample once, and broken lines are named."""

from __future__ import annotations

import base64
import json

import pytest

from data_prep.steps.packed_json import export_json, import_json, read_rows
from data_prep.tokenizer import make_tokenizer
from infimed_jax import config
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.data.packing import build_index
from infimed_jax.data.sample import Chat, Document, Question, Sample, Turn
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from infimed_jax.models.infimed import config as infimed
from tests.data_prep.samples import damage

MODEL = infimed.Model(
    vision=infimed.Vision(image_size=16, patch_size=4, hidden_size=8, num_heads=2),
    projector=infimed.Projector(visual_tokens=4),
)


def sample(number: int) -> Sample:
    common = (f"toy/train/{number}", "toy", "train", (bytes([number, 0, 255]), b"\xff\xd8"))
    meta = {"meta": {"organ": "lung"}}
    if number == 1:
        return Document(*common, (("welche ", 0), (1, "\nSeite")), **meta)
    if number % 2:
        return Question(
            *common, "choice", "welche Seite? 左\u2028" * (number % 5 + 1), "A", ("left", ""), "weil", "s", **meta
        )
    reply = Turn("assistant", ("A" * (number % 5 + 1),), "weil")
    return Chat(*common, (Turn("user", (0, "\nwelche Seite? 左\u2028", 1)), reply), **meta)


@pytest.fixture
def exported(tmp_path):
    write_samples(tmp_path / "set", [sample(i) for i in range(23)], name="toy")
    samples = open_samples(tmp_path / "set")
    tokenizer = load_tokenizer(make_tokenizer(["welche Seite weil left"] * 3, tmp_path / "tok", vocab_size=330))
    index = build_index(samples, tokenizer, config.Data(context=512, images_per_row=6), MODEL, tmp_path / "p")
    assert export_json(samples, index, tmp_path / "rows.jsonl") == []
    return samples, index, tmp_path


def test_round_trip_is_exact(exported):
    samples, index, folder = exported
    rows = list(read_rows(folder / "rows.jsonl"))
    assert [[s.id for s in row] for row in rows] == [[samples[int(n)].id for n in index.row(r)[0]]
                                                    for r in range(index.rows)]  # fmt: skip
    report = import_json([folder / "rows.jsonl"], folder / "back", "toy")
    assert report["samples"] == 23
    assert sorted(open_samples(folder / "back"), key=lambda s: s.id) == sorted(samples, key=lambda s: s.id)
    assert import_json([folder / "rows.jsonl"], folder / "back", "toy") == report


def test_the_layout_is_the_papers(exported):
    samples, index, folder = exported
    for row, line in enumerate((folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]):
        value = json.loads(line)
        assert set(value) == {"data", "lengths"}
        assert value["lengths"] == index.row(row)[1].tolist()
        first = samples[int(index.row(row)[0][0])]
        assert base64.b64decode(value["data"][0]["images"][0]) == first.images[0]


def test_records_damaged_after_packing_are_named_and_leave_their_rows_with_their_lengths(exported):
    samples, index, folder = exported
    whole = list(read_rows(folder / "rows.jsonl"))
    damage(samples.folder)
    with pytest.raises(UserError, match=r"1 of \d+ records cannot be read .*data\.max_bad_records=0\.01 allows"):
        export_json(open_samples(samples.folder), index, folder / "again.jsonl")
    assert not [file for file in folder.iterdir() if "again" in file.name]
    lost = export_json(open_samples(samples.folder), index, folder / "again.jsonl", max_bad_records=0.5)
    assert lost == ["toy record 0"]
    assert list(read_rows(folder / "again.jsonl")) == [[s for s in row if s.id != "toy/train/0"] for row in whole]
    for row, line in enumerate((folder / "again.jsonl").read_text(encoding="utf-8").split("\n")[:-1]):
        assert json.loads(line)["lengths"] == [int(size) for n, size in zip(*index.row(row), strict=True) if n != 0]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"data": []}', '{"data": [{}], "lengths": [1]}', '{"data": [], "lengths": [1]}', "\xff"]
)
def test_broken_lines_are_named_and_leave_nothing(exported, line):
    _, _, folder = exported
    with (folder / "rows.jsonl").open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl: (rows\.jsonl line|row) \d+ is no packed row"):
        import_json([folder / "rows.jsonl"], folder / "back", "toy")
    assert not (folder / "back").exists()
    with pytest.raises(UserError, match="does not exist"):
        import_json([folder / "nowhere"], folder / "back", "toy")


def test_bare_rows_of_other_programs_are_sent_to_a_source(tmp_path):
    """Image and text alone do not say who speaks, what is learnt, or where images stand: no guess is made."""
    row = {"data": [{"image": "AAD/", "text": "<image>\nA chest."}], "lengths": [7]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"row 1 is no packed row \(no 'kind'\): .* a source of `data ingest`"):
        import_json([tmp_path / "rows.jsonl"], tmp_path / "back", "toy")


def put(value: dict, path: tuple, other: object) -> None:
    *parents, last = path
    for key in parents:
        value = value[key]
    value[last] = other


@pytest.mark.parametrize("other", [None, 5, True, {"a": 1}, [{"a": 1}], [True]])
@pytest.mark.parametrize(
    "path",
    [
        *((key,) for key in ("id", "source", "split", "kind", "images", "turns", "chunks", "question", "options")),
        *(("answer",), ("reasoning",), ("system",), ("meta",), ("meta", "organ"), ("turns", 0), ("turns", 0, "role")),
        *(("turns", 0, "content"), ("turns", 0, "content", 1), ("turns", 1, "reasoning"), ("images", 0)),
        *(("options", 0), ("chunks", 0), ("chunks", 1, 1)),
    ],
)
def test_a_value_of_another_type_is_a_broken_row_in_every_field(exported, path, other):
    _, _, folder = exported
    rows = map(json.loads, (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
    row, value = next((row, value) for row in rows for value in row["data"] if path[0] in value)
    if path in (("turns", 0, "content", 1), ("chunks", 1, 1)) and other == 5:
        other = 5.0  # an integer is the number of an image
    put(value, path, other)
    (folder / "other.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="row 1 is no packed row"):
        import_json([folder / "other.jsonl"], folder / "back", "toy")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_rows_and_one_row_alone_are_read_too(exported, indent):
    _, _, folder = exported
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    listed = folder / "list.json"
    listed.write_text(json.dumps(rows, indent=indent))
    assert list(read_rows(listed)) == list(read_rows(folder / "rows.jsonl"))
    alone = folder / "row.json"
    alone.write_text(json.dumps(rows[0], indent=indent))
    assert list(read_rows(alone)) == list(read_rows(folder / "rows.jsonl"))[:1]
    listed.write_text(json.dumps(rows, indent=indent)[:-2])
    with pytest.raises(UserError, match=r"list\.json ends inside of its list"):
        import_json([listed], folder / "back", "toy")
    assert not (folder / "back").exists()


def test_several_files_become_one_dataset_and_an_id_twice_is_refused(exported):
    _, _, folder = exported
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    for file, part in zip(files, (lines[:2], lines[2:]), strict=True):
        file.write_text("\n".join(part), encoding="utf-8")
    import_json(files, folder / "back", "toy")
    import_json([folder / "rows.jsonl"], folder / "one", "toy")
    assert open_samples(folder / "back").fingerprint == open_samples(folder / "one").fingerprint
    with pytest.raises(UserError, match="occurs twice"):
        import_json([files[0], files[0]], folder / "twice", "toy")
