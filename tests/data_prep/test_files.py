"""Readers of images: found inside of their folders alone, and each bad one is named."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from data_prep.reading import files
from data_prep.reading.archives import ZipFiles
from data_prep.reading.faults import Unusable
from data_prep.reading.files import Images, all_files, find_files
from data_prep.reading.parts import parts_of
from data_prep.reading.rows import Part
from infimed_jax.errors import UserError


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
    parts = [Part(file=name) for name in ("a.tar", "b.tar", "deep/0.tar.gz")]
    assert parts_of(lambda folder, split: found)(tmp_path, "train") == parts
    with pytest.raises(UserError, match=r"holds no file that ends in \.parquet"):
        all_files(tmp_path, ".parquet")
