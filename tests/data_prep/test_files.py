"""Readers of annotations and images: rows stream in bounded memory, and each bad one is named in its place."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.faults import Unusable
from data_prep.sources import files
from data_prep.sources.files import (
    Images,
    all_files,
    csv_rows,
    find_files,
    json_rows,
    read_json,
    shards_of,
)
from data_prep.sources.parquet import parquet_rows
from infimed_jax.errors import UserError


def shown(rows) -> list:
    return [(row.reason, row.detail) if isinstance(row, Unusable) else row for row in rows]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\,[]{}é', max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.dictionaries(st.text('ab\\"', max_size=3), VALUES, max_size=3), max_size=6),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_json_lists_equal_the_standard_parser_at_any_chunk_size(tmp_path_factory, rows, chunk, ascii_only, indent):
    file = tmp_path_factory.mktemp("json") / "x.json"
    file.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        assert list(json_rows(file)) == rows
    file.write_text("\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows), encoding="utf-8")
    assert list(json_rows(file)) == rows


def test_bad_lines_are_named_and_the_others_kept(tmp_path):
    lines = [
        b'{"a": 1}',
        b"{broken",
        b"",
        b"[1]",
        b'{"a": "caf\xe9"}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a": 2}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    assert shown(json_rows(tmp_path / "x.jsonl")) == [
        {"a": 1},
        ("not valid JSON", "x.jsonl line 2"),
        ("not a JSON object", "x.jsonl line 4"),
        ("text is not valid UTF-8", "x.jsonl line 5"),
        ("text is not valid UTF-8", "x.jsonl line 6"),
        ("not valid JSON", "x.jsonl line 7"),
        {"a": 2},
    ]


def test_bad_entries_of_a_list_are_named_and_the_others_kept(tmp_path):
    text = b'[{"a": 1}, {"b" 2}, 7, {"a": "caf\xe9"}, {"a": "\\udc00"}, {"a": 2}]'
    (tmp_path / "x.json").write_bytes(text)
    assert shown(json_rows(tmp_path / "x.json")) == [
        {"a": 1},
        ("not valid JSON", "x.json entry 2"),
        ("not a JSON object", "x.json entry 3"),
        ("text is not valid UTF-8", "x.json entry 4"),
        ("text is not valid UTF-8", "x.json entry 5"),
        {"a": 2},
    ]


@pytest.mark.parametrize("content", ["[", '[{"a": 1}', '[{"a": 1},', '[{"a": 1}, {"b": "', '[{"a": 1}, {"b": {]'])
def test_a_list_that_ends_early_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json ends inside of its list"):
        list(json_rows(tmp_path / "x.json"))


@pytest.mark.parametrize("shape", ["lines", "list"])
def test_a_record_above_the_bound_is_skipped_in_bounded_memory(tmp_path, shape):
    file = tmp_path / "x.json"
    with file.open("w") as stream:
        stream.write('[{"a": 1}, {"b": "' if shape == "list" else '{"a": 1}\n{"b": "')
        for _ in range(60):
            stream.write('[{,\\"' + "x" * 999_994)
        stream.write('"}, {"a": 2}]' if shape == "list" else '"}\n{"a": 2}')
    assert file.stat().st_size > 20_000_000
    tracemalloc.start()
    rows = shown(json_rows(file, limit=1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    where = "x.json entry 2" if shape == "list" else "x.json line 2"
    assert rows == [{"a": 1}, ("record too large", where), {"a": 2}]
    assert peak < 12_000_000


def test_a_long_file_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 2**14)
    file = tmp_path / "x.json"
    row = json.dumps({"text": "y" * 900})
    file.write_text("[" + ",\n".join([row] * 4000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in json_rows(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000 and peak < 500_000 < file.stat().st_size


def encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_by_its_mark(tmp_path, encoding):
    rows = [{"a": "Thorax, übersicht 胸部"}]
    (tmp_path / "x.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode(encoding))
    assert list(json_rows(tmp_path / "x.json")) == read_json(tmp_path / "x.json") == rows
    (tmp_path / "x.csv").write_bytes("id,text\n1,übersicht\n".encode(encoding))
    assert list(csv_rows(tmp_path / "x.csv", ("id", "text"))) == [{"id": "1", "text": "übersicht"}]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_errors_that_name_the_file(tmp_path, encoding):
    (tmp_path / "x.json").write_bytes('[{"a": 1}]'.encode(encoding))
    with pytest.raises(UserError, match=r"x\.json is not UTF-8 .*iconv"):
        list(json_rows(tmp_path / "x.json"))
    (tmp_path / "x.json").write_bytes('[{"a": "é"}]'.encode("utf-16")[:-3] + b"\x00\xd8")
    with pytest.raises(UserError, match=r"x\.json"):
        list(json_rows(tmp_path / "x.json"))


def test_latin_1_rows_of_a_table_are_named(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'id,text\n1,plain\n2,caf\xe9\n3,"two\nlines"\n4,too,many\n\n5,last\n')
    assert shown(csv_rows(tmp_path / "x.csv", ("id", "text"))) == [
        {"id": "1", "text": "plain"},
        ("text is not valid UTF-8", "x.csv line 3"),
        {"id": "3", "text": "two\nlines"},
        ("wrong number of columns", "x.csv line 6"),
        {"id": "5", "text": "last"},
    ]
    with pytest.raises(UserError, match=r"x\.csv lacks caption: its columns are id, text"):
        list(csv_rows(tmp_path / "x.csv", ("id", "caption")))
    with pytest.raises(UserError, match=r"y\.csv does not exist"):
        list(csv_rows(tmp_path / "y.csv", ("id",)))


def test_overlong_lines_and_open_quotes_of_a_table_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_RECORD", 100)
    (tmp_path / "x.csv").write_text(
        "id,text\n1,a\n2," + "x" * 500 + '\n3,b\n4,"never closed\n' + "y,z\n" * 60 + "5,c\n"
    )
    rows = shown(csv_rows(tmp_path / "x.csv", ("id", "text")))
    assert rows[:3] == [{"id": "1", "text": "a"}, ("record too large", "x.csv line 3"), {"id": "3", "text": "b"}]
    # "never closed" has 13 characters with its newline, so the 22nd row of 4 behind it is the one too many
    assert rows[3] == ("quote that never closes, with the rows behind it", "x.csv lines 5 to 27")
    assert rows[-1] == {"id": "5", "text": "c"}


def test_a_quote_open_until_the_end_is_a_fault_and_no_caption(tmp_path):
    """csv gives the rest of the file as one long field, without a word."""
    fault = "quote that never closes, with the rows behind it"
    for text, rows in {
        'id,text\n1,a\n2,"open\n3,b\n4,c\n': [{"id": "1", "text": "a"}, (fault, "x.csv lines 3 to 5")],
        'id,text\n1,"two\nlines"': [{"id": "1", "text": "two\nlines"}],
        'id,text\n1,"two\nlines"\n': [{"id": "1", "text": "two\nlines"}],
        'id,text\n1,"open': [(fault, "x.csv lines 2 to 2")],
        "id,text\n1,a": [{"id": "1", "text": "a"}],
    }.items():
        (tmp_path / "x.csv").write_text(text)
        assert shown(csv_rows(tmp_path / "x.csv", ("id", "text"))) == rows


def test_a_file_too_large_to_be_annotations_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(2**29 + 1)  # of zeros, which the disk does not hold
        file.seek(0)
        file.write(b'[{"a": 1}] ')
    tracemalloc.start()
    with pytest.raises(UserError, match="larger than 512 MiB"):
        read_json(tmp_path / "x.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_parquet_bombs_are_seen_by_their_directory_and_the_other_rows_are_read(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = arrow.table({"image": [b"a", b"b", bytes(2**25), b"c"], "n": [0, 1, 2, 3]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2, compression="zstd")
    before = arrow.total_allocated_bytes()
    rows = shown(parquet_rows(tmp_path / "x.parquet", ("image", "n")))
    assert rows == [
        ("group of rows unpacks to far more than it should", "x.parquet group 2 of 2 rows"),
        {"image": b"a", "n": 0},
        {"image": b"b", "n": 1},
    ]
    assert arrow.total_allocated_bytes() - before < 2**20
    assert len(list(parquet_rows(tmp_path / "x.parquet", ("n",)))) == 4  # the column is not even read


def test_tables_without_quotes_and_header(tmp_path):
    (tmp_path / "x.txt").write_text('a|what is "this|ct\nb|why|mri\n')
    rows = list(
        csv_rows(tmp_path / "x.txt", ("image", "question", "answer"), delimiter="|", header=False, quoted=False)
    )
    assert rows[0] == {"image": "a", "question": 'what is "this', "answer": "ct"} and len(rows) == 2


def test_parquet_streams_and_names_damage(tmp_path):
    file = tmp_path / "x.parquet"
    images = [{"bytes": os.urandom(100_000), "path": None} for _ in range(200)]
    pq.write_table(pa.table({"image": images, "n": list(range(200))}), file, row_group_size=10)
    rows = list(parquet_rows(file, ("n",)))
    assert rows == [{"n": number} for number in range(200)]
    before = pa.total_allocated_bytes()
    peak = 0
    for number, row in enumerate(parquet_rows(file, ("image", "n"))):
        assert row == {"image": images[number], "n": number}
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < 8_000_000 < file.stat().st_size
    with pytest.raises(UserError, match=r"x\.parquet lacks answer: its columns are image, n"):
        list(parquet_rows(file, ("answer",)))
    raw = bytearray(file.read_bytes())
    place = int(len(raw) * 0.6)
    raw[place : place + 3_000_000] = bytes(3_000_000)
    file.write_bytes(raw)
    *kept, last = shown(parquet_rows(file, ("image", "n")))
    assert last == ("file is damaged", "x.parquet") and 50 < len(kept) < 150
    assert kept == [{"image": images[number], "n": number} for number in range(len(kept))]
    file.write_bytes(raw[:1000])
    assert shown(parquet_rows(file, ("n",))) == [("file is damaged", "x.parquet")]
    with pytest.raises(UserError, match="does not exist"):
        list(parquet_rows(tmp_path / "none.parquet", ("n",)))


def test_text_of_parquet_that_is_no_utf_8_is_named_by_row(tmp_path):
    raw = pa.array([b"fine", b"caf\xe9", b"too"])
    words = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": words}), tmp_path / "x.parquet")
    rows = shown(parquet_rows(tmp_path / "x.parquet", ("text",)))
    assert rows == [{"text": "fine"}, ("text is not valid UTF-8", "x.parquet row 1"), {"text": "too"}]


def test_images_come_from_folders_then_archives(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"one")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "a" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("deep/2.jpg", b"two")
    images = Images(tmp_path / "a", tmp_path / "absent", tmp_path / "a.zip", tmp_path / "absent.zip")
    assert images.read("1.jpg") == b"one" and images.read("deep/2.jpg") == images.read("2.jpg") == b"two"
    assert Images(tmp_path / "a.zip", flat=True).read("other/2.jpg") == b"two"  # as `unzip -j` would have it
    for name in (
        "other/2.jpg",
        "",
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
        "a\0",
        "x" * 5000,
        ".",
        "3.jpg",
    ):
        with pytest.raises(Unusable, match="image missing"):
            images.read(name)
    assert images.cell({"bytes": b"b", "path": "x"}) == images.cell(b"b") == b"b"
    assert images.cell({"bytes": None, "path": "1.jpg"}) == images.cell("1.jpg") == b"one"
    for cell in (None, {}, {"bytes": b""}, b"", 7):
        with pytest.raises(Unusable, match="image missing"):
            images.cell(cell)


def test_an_image_above_the_bound_is_named_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_MEMBER", 10)
    (tmp_path / "a.jpg").write_bytes(bytes(11))
    with pytest.raises(Unusable, match="image file too large"):
        Images(tmp_path).read("a.jpg")


def test_patterns_that_match_nothing_are_named(tmp_path):
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "c.tar").mkdir()
    assert [Path(file).name for file in find_files(tmp_path, "*.zip", "*.tar")] == ["a.tar", "b.tar"]
    with pytest.raises(UserError, match=r"holds none of \*\.csv, \*\.json"):
        find_files(tmp_path, "*.csv", "*.json")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "0.tar.gz").write_bytes(b"")
    found = all_files(tmp_path, ".tar", ".tar.gz")
    assert [file.name for file in found] == ["a.tar", "b.tar", "0.tar.gz"]
    assert shards_of(lambda folder, split: found)(tmp_path, "train") == ["a.tar", "b.tar", "deep/0.tar.gz"]
    with pytest.raises(UserError, match=r"holds no file that ends in \.parquet"):
        all_files(tmp_path, ".parquet")
