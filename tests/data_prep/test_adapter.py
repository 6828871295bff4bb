"""A data source from outside of the repository: one file, by `data ingest --adapter`."""

import json
from pathlib import Path

import pytest

from data_prep.engine import Engine
from data_prep.sources import SOURCES, find_source
from data_prep.steps.ingest import ingest
from infimed_jax.data.storage import open_samples
from infimed_jax.errors import UserError
from launch.run import main

ADAPTER = """
from data_prep.sources.source import Source, caption_sample, records

def read(folder, split, shard=""):
    lines = (folder / f"{split}{shard}.txt").read_text().splitlines()
    yield from records(f"{NAME}/{split}/{shard or 0}", lines, lambda id, line: caption_sample(id, (), line.WORD(), {}))

def shards(folder, split):
    return sorted(file.stem.removeprefix(split) for file in folder.glob(f"{split}?*.txt")) or [""]

NAME = "mine"
SOURCE = Source(name=NAME, title="Mine", licence="CC0-1.0", splits=("train",),
                layout="train.txt", obtain="a pen", read=read, shards=shards)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch, request):
    """(file, folder of the input) of an adapter; a module of its own for each test, since modules are imported once."""
    file = tmp_path / f"{request.node.originalname}_set.py"
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/train.txt").write_text("one\ntwo\n\n")

    def write(word: str = "upper") -> Path:
        file.write_text(ADAPTER.replace("WORD", word))
        return file

    return write, tmp_path / "raw"


def texts(folder: Path) -> list[str]:
    return [sample.chunks[0][-1].strip() for sample in open_samples(folder)]


def test_one_file_is_a_source_from_the_command_line(mine, tmp_path, capsys):
    write, raw = mine
    out = tmp_path / "out"
    command = ["data", "ingest", "--adapter", str(write()), "--input", str(raw), "--output", str(out)]
    assert main(command) == 0
    assert "train: 2 samples, CC0-1.0" in capsys.readouterr().out
    assert texts(out / "train") == ["ONE", "TWO"]
    report = json.loads((out / "train.json").read_text())
    assert report["source"] == "mine" and report["skipped"] == {"no text": 1}
    assert main(["data", "sources", "--adapter", str(write()), "--json", str(tmp_path / "all.json")]) == 0
    assert "a pen" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "all.json").read_text())) == [*SOURCES, "mine"]


def test_worker_processes_find_it(mine, tmp_path):
    write, raw = mine
    for number in range(3):
        (raw / f"train{number}.txt").write_text(f"text {number}\n")
    ingest(f"{write()}:mine", raw, tmp_path / "out", ["train"], engine=Engine(jobs=2))
    assert texts(tmp_path / "out/train") == ["TEXT 0", "TEXT 1", "TEXT 2"]


def test_another_text_of_the_file_is_another_recipe(mine):
    write, _ = mine
    first = find_source(f"{write('upper')}:").code
    assert find_source(f"{write('upper')}:").code == first != find_source(f"{write('lower')}:").code


@pytest.mark.parametrize(
    ("text", "adapter", "words"),
    [
        ("", "FILE:", "has no SOURCE or SOURCES"),
        (ADAPTER.replace('NAME = "mine"', "NAME = 'slake'"), "FILE:", "there is a data source 'slake' already"),
        (ADAPTER, "FILE:other", "has mine: name one by --source"),
        (ADAPTER + "SOURCES = [__import__('dataclasses').replace(SOURCE, name='b')]", "FILE:", "has mine, b: name one"),
        (ADAPTER, "slake:", "name a .py file, or a module with a dot in its name"),
        (ADAPTER, "no.such.module:", "cannot be imported"),
        (ADAPTER, "/no/such/file.py:", "there is no such file"),
    ],
    ids=range(7),
)
def test_what_is_no_adapter_is_refused_in_one_line(tmp_path, request, text, adapter, words):
    file = tmp_path / f"refused_{request.node.callspec.id}.py"
    file.write_text(text.replace("WORD", "upper"))
    with pytest.raises(UserError, match=words) as error:
        find_source(adapter.replace("FILE", str(file)))
    assert "\n" not in str(error.value)


def test_neither_source_nor_adapter_is_a_mistake(tmp_path, capsys):
    assert main(["data", "ingest", "--input", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "by --source" in capsys.readouterr().err
