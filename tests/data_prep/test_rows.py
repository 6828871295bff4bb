"""Readers of annotations: rows stream in bounded memory, and each bad one is named in its place."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.reading import rows as module
from data_prep.reading.csv_rows import Table, csv_rows
from data_prep.reading.faults import Unusable
from data_prep.reading.rows import json_rows, read_json, read_rows
from infimed_jax.errors import UserError

TABLE = Table(("id", "text"))


def shown(rows) -> list:
    return [(row.reason, row.detail) if isinstance(row, Unusable) else row for row in rows]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\,[]{}é', max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.dictionaries(st.text('ab\\"', max_size=3), VALUES, max_size=3), max_size=6),
    chunk=st.integers(1, 40) | st.just(2**20),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_json_lists_equal_the_standard_parser_at_any_chunk_size(tmp_path_factory, rows, chunk, ascii_only, indent):
    file = tmp_path_factory.mktemp("json") / "x.json"
    file.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        assert list(json_rows(file)) == rows
    file.write_text("\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows), encoding="utf-8")
    assert list(json_rows(file)) == rows


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_several_lists_in_a_file_are_one_and_what_follows_them_is_reported(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    for text, rows in {
        ' [{"a": 1}, {"a": 2}]\n[]\n[ {"a": 3} ][{"a": 4},]\n': [{"a": n} for n in (1, 2, 3, 4)],
        '[{"a": 1}]\n{"a": 2}, {"a": 3}]': [
            {"a": 1},
            ("not valid JSON", "x.json entry 2, after the list: the file is not read from byte 11 on"),
        ],
        '[{"a": 1} {"a": 2}, {"a": 3}]': [("not valid JSON", "x.json entry 1"), {"a": 3}],
        '[,{"a": 1},, {"a": 2}}, {"a": 3},]': [{"a": 1}, ("not valid JSON", "x.json entry 2"), {"a": 3}],
        "[12345, true, {}, null]": [
            *(("not a JSON object", f"x.json entry {n}") for n in (1, 2)),
            {},
            ("not a JSON object", "x.json entry 4"),
        ],
    }.items():
        (tmp_path / "x.json").write_text(text)
        assert shown(json_rows(tmp_path / "x.json")) == rows


def test_a_small_file_read_whole_has_its_lists_joined_or_names_the_byte(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(' [{"a": "\u00e9"}]\n\n[{"a": 2}]\n')
    assert read_rows(file) == [{"a": "\u00e9"}, {"a": 2}]
    for text, byte in (('[{"a": "\u00e9"}]\n{"a": 2}', 14), ("[]\n[1] x", 7), ("[],[]", 2)):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"x\.json is not valid JSON \(text from byte {byte} on, after the list"):
            read_rows(file)
    file.write_text("{} []")
    with pytest.raises(UserError, match="from byte 3 on, after the dict has ended"):
        read_json(file, dict)
    file.write_text(" ")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_rows(file)


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_numbers_are_the_standard_parsers(tmp_path, monkeypatch, chunk):
    """Among them those that other parsers refuse or change: NaN of pandas, long integers, all digits of a decimal."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    numbers = "0.1, 1.10, 5e-324, 0.30000000000000004, 1e400, -0.0, 12345678901234567890123, NaN, -Infinity"
    for text in (f'[{{"a": [{numbers}]}}]', f'{{"a": [{numbers}]}}'):
        (tmp_path / "x.json").write_text(text)
        (row,) = json_rows(tmp_path / "x.json")
        assert repr(row["a"]) == repr(json.loads(f"[{numbers}]"))


@pytest.mark.parametrize("depth", [1, 2, 4, 5, 6, 7, 40])
def test_rows_of_any_depth_are_separated(tmp_path, depth):
    row = {"a": json.loads("[" * depth + '"]}", 1' + "]" * depth), "b": '[{"'}
    (tmp_path / "x.json").write_text(json.dumps([row, {"c": []}, row]))
    assert list(json_rows(tmp_path / "x.json")) == [row, {"c": []}, row]


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


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize(
    ("content", "byte"),
    [
        ("[", 1),
        ('[{"a": 1}', 1),
        ('[{"a": 1},', 10),
        ('\n[{"a": 1}, {"b": "', 12),
        ('[{"a": 1}, {"b": {]', 11),
        ('[{"a": 1}, {"b": "an "open one"}, {"c": 1}]', 11),
        ('[{"a": "é\\', 1),
        ('[{"a": "é"}] [7, "]", tru', 23),
    ],
)
def test_a_list_that_ends_early_is_an_error_that_names_the_place(tmp_path, monkeypatch, content, byte, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=rf"x\.json ends inside of its list: .* begins at byte {byte} never"):
        list(json_rows(tmp_path / "x.json"))


@pytest.mark.parametrize("shape", ["lines", "list"])
def test_a_record_above_the_bound_is_skipped_in_bounded_memory(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(module, "MAX_RECORD", 1_000_000)
    file = tmp_path / "x.json"
    with file.open("w") as stream:
        stream.write('[{"a": 1}, {"b": "' if shape == "list" else '{"a": 1}\n{"b": "')
        for _ in range(60):
            stream.write('[{,\\"' + "x" * 999_994)
        stream.write('"}, {"a": 2}]' if shape == "list" else '"}\n{"a": 2}')
    assert file.stat().st_size > 20_000_000
    tracemalloc.start()
    rows = shown(json_rows(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    where = "x.json entry 2" if shape == "list" else "x.json line 2"
    assert rows == [{"a": 1}, ("record too large", where), {"a": 2}]
    assert peak < 12_000_000


def test_a_long_file_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 2**14)
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
    assert list(csv_rows(tmp_path / "x.csv", TABLE)) == [{"id": "1", "text": "übersicht"}]


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
    assert shown(csv_rows(tmp_path / "x.csv", TABLE)) == [
        {"id": "1", "text": "plain"},
        ("text is not valid UTF-8", "x.csv line 3"),
        {"id": "3", "text": "two\nlines"},
        ("wrong number of columns", "x.csv line 6"),
        {"id": "5", "text": "last"},
    ]
    with pytest.raises(UserError, match=r"x\.csv lacks caption: its columns are id, text"):
        list(csv_rows(tmp_path / "x.csv", Table(("id", "caption"))))
    with pytest.raises(UserError, match=r"y\.csv does not exist"):
        list(csv_rows(tmp_path / "y.csv", Table(("id",))))


def test_overlong_lines_and_open_quotes_of_a_table_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORD", 100)
    (tmp_path / "x.csv").write_text(
        "id,text\n1,a\n2," + "x" * 500 + '\n3,b\n4,"never closed\n' + "y,z\n" * 60 + "5,c\n"
    )
    rows = shown(csv_rows(tmp_path / "x.csv", TABLE))
    assert rows[:3] == [{"id": "1", "text": "a"}, ("record too large", "x.csv line 3"), {"id": "3", "text": "b"}]
    # "never closed" has 13 characters with its newline, so the 22nd row of 4 behind it is the one too many
    assert rows[3] == ("quote that never closes, with the rows behind it", "x.csv lines 5 to 27")
    assert rows[-1] == {"id": "5", "text": "c"}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_rows_behind_an_overlong_line_are_kept_by_any_end_of_line(tmp_path, monkeypatch, newline):
    monkeypatch.setattr(module, "MAX_RECORD", 100)
    monkeypatch.setattr(module, "_CHUNK", 50)
    (tmp_path / "x.csv").write_bytes(newline.join(["id,text", "1,a", "2," + "x" * 470, "3,b", "4,c"]).encode())
    rows = shown(csv_rows(tmp_path / "x.csv", TABLE))
    assert rows[1:] == [("record too large", "x.csv line 3"), {"id": "3", "text": "b"}, {"id": "4", "text": "c"}]


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
        assert shown(csv_rows(tmp_path / "x.csv", TABLE)) == rows


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


def test_tables_without_quotes_and_header(tmp_path):
    (tmp_path / "x.txt").write_text('a|what is "this|ct\nb|why|mri\n')
    rows = list(
        csv_rows(tmp_path / "x.txt", Table(("image", "question", "answer"), delimiter="|", header=False, quoted=False))
    )
    assert rows[0] == {"image": "a", "question": 'what is "this', "answer": "ct"} and len(rows) == 2


def test_a_table_without_its_header_is_reported_without_its_text(tmp_path):
    (tmp_path / "x.csv").write_text("7,a secret caption\n8,another\n")
    with pytest.raises(
        UserError, match=r"x\.csv seems to have no header: it needs a header with the columns id, text"
    ) as e:
        list(csv_rows(tmp_path / "x.csv", TABLE))
    assert "secret" not in str(e.value)
