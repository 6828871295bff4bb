"""`data sources` and `data ingest --option` as a user calls them."""

from __future__ import annotations

import json

import pytest

from data_prep.sources import SOURCES
from launch.run import main


def test_the_table_and_the_json_hold_every_source(tmp_path, capsys):
    assert main(["data", "sources", "--json", str(tmp_path / "sources.json")]) == 0
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "sources.json").read_text())
    assert list(facts) == list(SOURCES)
    for name, source in SOURCES.items():
        assert name in printed
        assert facts[name]["licence"] == source.licence and facts[name]["layout"] == source.layout
        assert facts[name]["allow_external_api"] == source.allow_external_api
    assert "evaluation only" in printed and printed.rstrip().endswith(f"Outputs: {tmp_path / 'sources.json'}")


def test_one_source_shows_its_options(capsys):
    assert main(["data", "sources", "--source", "dicom"]) == 0
    printed = capsys.readouterr().out
    assert "--option window=" in printed and "[skip]" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sources", "--source", "dicon"], "no data source 'dicon'"),
        (["ingest", "--source", "slake", "--option", "window"], "--option window: write it as name=value"),
        (["ingest", "--source", "slake", "--option", "=3"], "--option =3: write it as name=value"),
        (["ingest", "--source", "dicom", "--option", "window=full", "--option", "window=none"], "is given twice"),
        (["ingest", "--source", "slake", "--option", "window=full"], "source slake has no option 'window'"),
        (["ingest", "--source", "llava_json", "--option", "annotations=a.json"], "say which it is by --split"),
        (["ingest", "--source", "tfds", "--option", "tfds_split=train[:9%]"], "say which it is by --split"),
        (["ingest", "--source", "omnimedvqa", "--split", "train"], "for evaluation only, never for training"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, arguments, words):
    if arguments[0] == "ingest":
        arguments = [*arguments, "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_reach_the_source(tmp_path, capsys):
    rows = [{"image": None, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "SECRET"}]}]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    arguments = ["--source", "llava_json", "--input", str(tmp_path), "--output", str(tmp_path.parent / "out")]
    assert main(["data", "ingest", *arguments, "--split", "train", "--option", "annotations=mine.json"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("train: 1 samples, unknown\n") and "SECRET" not in printed
    assert json.loads((tmp_path.parent / "out" / "train.json").read_text())["options"] == {"annotations": "mine.json"}


def test_without_a_split_all_that_have_files_are_made_and_the_others_told(tmp_path, capsys):
    """The README's own command, on the files that it speaks of."""
    said = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "in").mkdir()
    arguments = ["data", "ingest", "--source", "llava_json", "--input", str(tmp_path / "in")]
    arguments += ["--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "holds none of train.json" in capsys.readouterr().err and not list((tmp_path / "out").glob("*"))
    for split in ("train", "test"):
        (tmp_path / "in" / f"{split}.json").write_text(json.dumps([{"conversations": said}]))
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for split in ("documents", "validation"):
        assert f"{split}: no files in {tmp_path / 'in'}, so it was left out\n" in printed
    made = ["test", "test.json", "train", "train.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == made
    assert main([*arguments, "--split", "validation"]) == 2  # asked for by name it is an error


def test_what_is_skipped_names_the_first_record_and_a_name_of_ones_own_is_taken(tmp_path, capsys):
    talk = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<image>SECRET"}]
    rows = [{"conversations": talk}, {"image": "gone\n\u001b[31m.png", "conversations": talk}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    arguments = ["data", "ingest", "--source", "llava_json", "--input", str(tmp_path), "--split", "train"]
    arguments += ["--output", str(tmp_path.parent / "named")]
    assert main([*arguments, "--name", "clinic_a"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "train: 1 samples, unknown",
        "  skipped, image missing: 1 (first: clinic_a/train/00001, gone??[31m.png)",
        "  kept, with misplaced marks: 1",
    ]
    for name in ("vqa_rad", "A b"):
        assert main([*arguments, "--name", name]) == 2
        assert f"--name {name!r}".replace("'vqa_rad'", "vqa_rad") in capsys.readouterr().err
    (tmp_path / "train.json").write_text(json.dumps(rows[1:]))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "image missing first at llava_json/train/00000, gone??[31m.png" in error and error.count("\n") == 1
