"""Readers of images and tables with them: found inside of their folders alone, and each bad one is named."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.archives import ZipFiles
from data_prep.faults import Unusable
from data_prep.sources import files
from data_prep.sources.files import Images, all_files, find_files, shards_of
from data_prep.sources.parquet import parquet_rows
from infimed_jax.errors import UserError


def shown(rows) -> list:
    return [(row.reason, row.detail) if isinstance(row, Unusable) else row for row in rows]


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


def test_an_archive_is_indexed_once_and_again_when_it_is_another(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(files, "ZipFiles", lambda file: made.append(file) or ZipFiles(file))
    for content in (b"one", b"another"):
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.writestr("a.jpg", content)
        assert [Images(tmp_path / "images.zip").read("a.jpg") for _ in range(3)] == [content] * 3
    assert len(made) == 2


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
