"""Parts of one long file: read apart they are what the file is, to the number, and ingest makes the same of them."""

from __future__ import annotations

import codecs
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.engine import Engine
from data_prep.reading import parts, rows
from data_prep.reading.csv_rows import Table, csv_rows
from data_prep.reading.parts import csv_parts, json_parts
from data_prep.reading.rows import Part, json_rows
from data_prep.sources import SOURCES
from data_prep.steps.ingest import ingest
from infimed_jax.data.storage import SHARD_SIZE, open_samples
from infimed_jax.errors import UserError
from tests.data_prep.samples import picture
from tests.data_prep.test_rows import shown

LINES = [
    *(b'{"a": 1}', b'{"a": "\xc3\xa9\xe5\x8c\xbb"}', b'{"a": ["]", {"b": "\\\\\\""}]}', b"", b"  ", b"{broken", b"7"),
    *(b'{"a": "caf\xe9"}', b'{"a": "' + b"x" * 60 + b'"}', b'{"a": "' + "é".encode() * 70 + b'"}', b'{"a": "\\ud800"}'),
]
CELLS = [
    *(
        b"1,plain",
        b'2,"two\nlines"',
        b"3,caf\xe9",
        "4,é医".encode(),
        b"",
        b"5,too,many",
        b"6," + b"x" * 60,
        b'7,"a ""b"""',
    ),
    *(b"6," + b"x" * 60, b'8,"' + b"y\n" * 60 + b'"', b'9,"' + b"x" * 60 + b'"'),
]


def apart(read, found: list[Part], total: int) -> list:
    """The rows of all parts, which must lie end to end."""
    assert [part.first for part in found] == [0, *(part.stop for part in found[:-1])] and found[-1].stop is None
    got = [shown(read(part)) for part in found]
    assert [len(some) for some in got[:-1]] == [part.stop - part.first for part in found[:-1]]
    assert len(found) > 1 or total <= 2
    return [row for some in got for row in some]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Rows of a part, and characters of a row, that tests can write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LEAST", 2)
        patch.setattr(rows, "MAX_RECORD", 64)
        yield


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(st.sampled_from(LINES), max_size=9),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    mark=st.sampled_from([b"", codecs.BOM_UTF8]),
    head=st.sampled_from([b"", b"\n \n"]),
    listed=st.booleans(),
    chunk=st.integers(1, 40) | st.just(2**20),
)
def test_json_read_apart_is_what_it_is_whole(tmp_path_factory, lines, newline, mark, head, listed, chunk):
    file = tmp_path_factory.mktemp("json") / "x.json"
    if listed:
        lines = [line for line in lines if line != b"{broken"]
    body = b"[" + (b"," + newline).join(lines) + b"]" if listed else newline.join(lines)
    file.write_bytes(mark + head + body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK", chunk)
        whole = shown(json_rows(file))
        assert apart(lambda part: json_rows(file, part=part), json_parts(file), len(whole)) == whole
    assert len(whole) == sum(bool(line.strip()) for line in lines)


@settings(deadline=None, max_examples=150)
@given(
    cells=st.lists(st.sampled_from(CELLS), max_size=9),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    mark=st.sampled_from([b"", codecs.BOM_UTF8]),
    header=st.booleans(),
)
def test_a_table_read_apart_is_what_it_is_whole(tmp_path_factory, cells, newline, mark, header):
    file = tmp_path_factory.mktemp("csv") / "x.csv"
    file.write_bytes(mark + newline.join(([b"id,text"] if header else []) + cells))
    table = Table(("id", "text"), header=header)
    whole = shown(csv_rows(file, table))
    assert apart(lambda part: csv_rows(file, table, part), csv_parts(file, table), len(whole)) == whole


def test_utf_16_is_one_part(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"a": n} for n in range(9)]), encoding="utf-16")
    assert json_parts(tmp_path / "x.json") == [Part()]


def test_long_files_have_parts_of_a_shards_size_and_short_ones_enough_to_share(monkeypatch):
    assert parts._MOST == SHARD_SIZE
    monkeypatch.setattr(parts, "LEAST", 1024)
    sizes = {0: [0], 1024: [0], 1025: [0, 1024], 40_000: [*range(0, 40_000, 2048)], 10**6: [*range(0, 10**6, 4096)]}
    for count, firsts in sizes.items():
        assert [part.first for part in parts.even_parts(count)] == firsts


def test_one_of_few_files_is_cut_and_one_of_many_is_not_even_read(tmp_path):
    files = [tmp_path / f"{number:02}.jsonl" for number in range(33)]
    for file in files:
        file.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    few, many = (parts.parts_of(lambda folder, split, n=n: files[:n])(tmp_path, "train") for n in (32, 33))
    assert [(part.file, part.first) for part in few] == [(file.name, first) for file in files[:32] for first in (0, 2)]
    assert many == [Part(file=file.name) for file in files]


def conversations(folder: Path, count: int) -> Path:
    """Every fifth row is broken, or lacks its image."""
    listed = []
    for number in range(count):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"é {number}"}]
        listed.append({"id": number, "image": f"{number}.png", "conversations": turns if number % 10 else []})
        if number % 10 != 5:
            (folder / "images").mkdir(parents=True, exist_ok=True)
            (folder / "images" / f"{number}.png").write_bytes(picture(number))
    (folder / "mine.json").write_text(json.dumps(listed), encoding="utf-8")
    return folder


def test_one_list_is_the_same_dataset_in_parts_by_one_worker_or_two_and_whole(tmp_path, monkeypatch):
    folder = conversations(tmp_path / "in", 23)
    monkeypatch.setattr(rows, "MAX_RECORD", 2**26)

    def made(name: str, **how) -> tuple[dict, list]:
        report = ingest("llava_json", folder, tmp_path / name, ["train"], options={"annotations": "mine.json"}, **how)
        return report["train"], list(open_samples(tmp_path / name / "train"))

    one, two = made("one"), made("two", engine=Engine(jobs=2))
    monkeypatch.setattr(parts, "LEAST", 1024)
    whole = made("whole")
    assert one == two == whole and one[0]["samples"] == 18
    assert one[0]["skipped"] == {"image missing": 2, "no list of turns": 3}
    assert [s.id for s in one[1]] == [f"llava_json/train/{n:05d}" for n in range(23) if n % 5]
    assert len(os.listdir(tmp_path / "one" / "train")) == len(os.listdir(tmp_path / "two" / "train"))
    for file in (tmp_path / "one" / "train").glob("*.array_record*"):
        assert file.read_bytes() == (tmp_path / "two" / "train" / file.name).read_bytes()


def test_a_stopped_list_goes_on_by_part(tmp_path, monkeypatch):
    folder = conversations(tmp_path / "in", 12)
    monkeypatch.setattr(rows, "MAX_RECORD", 2**26)
    options = {"options": {"annotations": "mine.json"}}
    ingest("llava_json", folder, tmp_path / "whole", ["train"], **options)
    source, firsts = SOURCES["llava_json"], []

    def dying(name, *given, **values):
        firsts.append(given[-1].first)
        if firsts == [0, 2, 4]:
            raise UserError("stopped")
        return source.read(name, *given, **values)

    monkeypatch.setitem(SOURCES, "llava_json", replace(source, read=dying))
    with pytest.raises(UserError, match="stopped"):
        ingest("llava_json", folder, tmp_path / "out", ["train"], **options)
    ingest("llava_json", folder, tmp_path / "out", ["train"], **options)
    assert firsts == [0, 2, 4, 4, 6, 8, 10]
    whole, out = (open_samples(tmp_path / name / "train") for name in ("whole", "out"))
    assert whole.fingerprint == out.fingerprint


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("kind", ["list", "lines", "table"])
def test_a_file_that_changes_after_it_was_cut_is_refused(tmp_path, kind, when):
    file = tmp_path / "x"
    written = {
        "list": b'[{"a": 1},{"a": 2},{"a": 3}]',
        "lines": b'{"a": 1}\n{"a": 2}\n{"a": 3}',
        "table": b"a\n1\n2\n3",
    }
    file.write_bytes(written[kind])
    table = Table(("a",))
    found = csv_parts(file, table) if kind == "table" else json_parts(file)
    assert [part.first for part in found] == [0, 2]
    read = csv_rows(file, table, found[0]) if kind == "table" else json_rows(file, part=found[0])
    if when == "meanwhile":
        next(read)
    file.write_bytes(written[kind].replace(b"1", b"11"))
    with pytest.raises(UserError, match="changed since its rows were counted: run this again"):
        list(read)
