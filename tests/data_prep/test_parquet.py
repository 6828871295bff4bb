"""Rows of Parquet files: each keeps its number, whatever is damaged before it and however the file is cut."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.engine import Engine
from data_prep.reading import parts
from data_prep.reading.parquet import parquet_rows
from data_prep.reading.rows import WHOLE, Part
from data_prep.sources import SOURCES
from data_prep.sources.source import records
from data_prep.steps.ingest import ingest
from infimed_jax.data.sample import Skipped
from infimed_jax.data.storage import open_samples
from infimed_jax.errors import UserError
from tests.data_prep.samples import picture
from tests.data_prep.test_rows import shown

COLUMNS = ("image", "n")


def write(file: Path, rows: int, group: int, size: int = 1000) -> list[dict]:
    """Rows with random bytes, not compressed and without a dictionary: where damage falls, just that row is lost."""
    made = [{"image": os.urandom(size), "n": n} for n in range(rows)]
    pq.write_table(
        pa.table({"image": pa.array([row["image"] for row in made], pa.binary()), "n": pa.array(range(rows))}),
        file,
        row_group_size=group,
        compression="none",
        use_dictionary=False,
        data_page_size=1,
        write_batch_size=1,
    )
    return made


def damage(file: Path, group: int) -> None:
    """The header of the group's last page of images."""
    column = pq.ParquetFile(file).metadata.row_group(group).column(0)
    raw = bytearray(file.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    raw[end - 1030 : end - 1000] = b"\xff" * 30
    file.write_bytes(raw)


def cut(file: Path) -> list[Part]:
    return parts.parts_of(lambda folder, split: [file])(file.parent, "train")


def numbered(prefix: str, rows, first: int = 0) -> list:
    """Ids with rows, or with what was skipped."""
    found = records(prefix, rows, lambda id, row: [(id, row)], first)
    return [(record.id, record) if isinstance(record, Skipped) else record for record in found]


def test_bombs_are_seen_by_their_directory_and_the_other_rows_are_read(tmp_path):
    file = tmp_path / "x.parquet"
    table = pa.table({"image": [b"a", b"b", bytes(2**25), b"c", b"d"], "n": [0, 1, 2, 3, 4]})
    pq.write_table(table, file, row_group_size=2, compression="zstd")
    before = pa.total_allocated_bytes()
    rows = list(parquet_rows(file, COLUMNS))
    assert shown(rows) == [
        {"image": b"a", "n": 0},
        {"image": b"b", "n": 1},
        ("group of rows unpacks to far more than it should", "x.parquet rows 2 to 3"),
        {"image": b"d", "n": 4},
    ]
    assert rows[2].records == 2 and [id for id, _ in numbered("x", rows)][-1] == "x/00004"
    assert pa.total_allocated_bytes() - before < 2**20
    assert len(list(parquet_rows(file, ("n",)))) == 5  # the column is not even read


def test_rows_stream_and_damage_costs_the_rest_of_its_group_alone(tmp_path):
    file = tmp_path / "x.parquet"
    made = write(file, 200, 200, size=100_000)
    before, peak = pa.total_allocated_bytes(), 0
    for number, row in enumerate(parquet_rows(file, COLUMNS)):
        assert row == made[number]
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < 8_000_000 < file.stat().st_size  # though it is one group
    with pytest.raises(UserError, match=r"x\.parquet lacks answer: its columns are image, n"):
        list(parquet_rows(file, ("answer",)))

    made = write(file, 200, 10)
    damage(file, 7)
    rows = list(parquet_rows(file, COLUMNS, batch=4))
    assert shown(rows) == [*made[:78], ("file is damaged", "x.parquet rows 78 to 79"), *made[80:]]
    assert rows[78].records == 2
    file.write_bytes(file.read_bytes()[:1000])
    assert shown(parquet_rows(file, ("n",))) == [("file is damaged", "x.parquet")] and cut(file) == [
        Part(file=file.name)
    ]
    with pytest.raises(UserError, match="does not exist"):
        list(parquet_rows(tmp_path / "none.parquet", ("n",)))


def test_a_directory_that_promises_more_rows_than_there_are_is_damage(tmp_path):
    file = tmp_path / "x.parquet"
    write(file, 5, 5)
    raw = file.read_bytes()
    length = int.from_bytes(raw[-8:-4], "little")
    footer = raw[-8 - length : -8]
    # every count of 5 in the directory's compact integers (10 by its zigzag) becomes 7
    assert footer.count(b"\x16\x0a") >= 2
    file.write_bytes(raw[: -8 - length] + footer.replace(b"\x16\x0a", b"\x16\x0e") + raw[-8:])
    assert pq.ParquetFile(file).metadata.num_rows == 7
    rows = list(parquet_rows(file, ("n",)))
    assert sum(getattr(row, "records", 1) for row in rows) == 7 and shown(rows)[-1][0] == "file is damaged"


def test_text_that_is_no_utf_8_is_named_by_row(tmp_path):
    raw = pa.array([b"fine", b"caf\xe9", b"too"])
    words = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": words}), tmp_path / "x.parquet")
    rows = shown(parquet_rows(tmp_path / "x.parquet", ("text",)))
    assert rows == [{"text": "fine"}, ("text is not valid UTF-8", "x.parquet row 1"), {"text": "too"}]
    assert shown(parquet_rows(tmp_path / "x.parquet", ("text",), Part(1, 2))) == rows[1:2]


@settings(deadline=None, max_examples=80)
@given(rows=st.integers(0, 40), group=st.integers(1, 41), hurt=st.integers(-1, 40), batch=st.integers(1, 9))
def test_read_apart_it_is_what_it_is_whole(tmp_path_factory, rows, group, hurt, batch):
    file = tmp_path_factory.mktemp("parquet") / "x.parquet"
    made = write(file, rows, group)
    groups = -(-rows // group)
    if 0 <= hurt < groups:
        damage(file, hurt)

    def read(part: Part) -> dict:
        """The rows by number; those that are lost, by reason."""
        found = {}
        for id, row in numbered("x", parquet_rows(file, COLUMNS, part, batch), part.first):
            number = int(id.removeprefix("x/"))
            lost = getattr(row, "records", 0)
            found |= {number + k: row.reason for k in range(lost)} if lost else {number: row}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LEAST", 2)
        found = cut(file)
    whole = read(WHOLE)
    assert list(whole) == list(range(rows))
    lost = {number for number in whole if whole[number] == "file is damaged"}
    assert all(number // group == hurt or whole[number] == made[number] for number in whole)
    assert all(number // group == hurt for number in lost) and bool(lost) == (0 <= hurt < groups)
    pieces = [read(part) for part in found]
    assert {number: row for piece in pieces for number, row in piece.items()} == whole
    assert sum(map(len, pieces)) == rows
    step = 2 * max(-(-min(group, rows) // 8), 1)  # a multiple of the least, and a group has four parts at most
    assert [part.first for part in found] == [0, *range(step, rows, step)]


def folder_of(folder: Path, count: int, group: int) -> Path:
    (folder / "data").mkdir(parents=True)
    table = {
        "image": [{"bytes": picture(n) if n % 7 else b"", "path": None} for n in range(count)],
        "question": [f"é {n}" for n in range(count)],
        "answer": ["yes" if n % 5 else "" for n in range(count)],
    }
    for name, wanted in (("0", slice(None, count // 2)), ("1", slice(count // 2, None))):
        columns = {key: values[wanted] for key, values in table.items()}
        pq.write_table(pa.table(columns), folder / "data" / f"train-{name}.parquet", row_group_size=group)
    return folder


@pytest.mark.parametrize("group", [3, 100])
def test_it_is_the_same_dataset_in_parts_by_one_worker_or_two_and_whole(tmp_path, monkeypatch, group):
    folder = folder_of(tmp_path / "in", 40, group)

    def made(name: str, **how) -> tuple[dict, list]:
        report = ingest("pathvqa", folder, tmp_path / name, ["train"], **how)
        return report["train"], list(open_samples(tmp_path / name / "train"))

    whole = made("whole")
    monkeypatch.setattr(parts, "LEAST", 2)
    found = SOURCES["pathvqa"].shards(folder, "train")
    assert len(found) > 4 and {part.file for part in found} == {"data/train-0.parquet", "data/train-1.parquet"}
    one, two = made("one"), made("two", engine=Engine(jobs=2))
    assert one == two == whole and one[0]["samples"] == sum(bool(n % 7 and n % 5) for n in range(40))
    assert one[0]["skipped"] == {"image missing": 4, "no answer": 8}
    assert one[1][0].id == "pathvqa/train/data/train-0.parquet/00001"
    assert one[1][-1].id == "pathvqa/train/data/train-1.parquet/00019"
    for file in (tmp_path / "one" / "train").glob("*.array_record*"):
        assert file.read_bytes() == (tmp_path / "two" / "train" / file.name).read_bytes()


def test_lost_rows_are_counted_each(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "train.parquet", 40, 10)
    damage(tmp_path / "in" / "train.parquet", 2)
    with pytest.raises(UserError, match=r"no record .* can be used \(file is damaged: 10, .*: 30\)"):
        ingest("parquet", tmp_path / "in", tmp_path / "out", ["train"], options={"caption": "n"})


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_file_that_changes_after_it_was_cut_is_refused(tmp_path, monkeypatch, when):
    file = tmp_path / "x.parquet"
    write(file, 40, 10)
    monkeypatch.setattr(parts, "LEAST", 2)
    found = cut(file)
    read = parquet_rows(file, COLUMNS, found[0])
    if when == "meanwhile":
        next(read)
    write(tmp_path / "new", 40, 10, size=999)
    os.replace(tmp_path / "new", file)
    with pytest.raises(UserError, match="changed since its rows were counted: run this again"):
        list(read)
