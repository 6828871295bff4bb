"""Readers of images: found inside of their folders alone, and each bad one is named."""

from __future__ import annotations

import base64
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.reading import files
from data_prep.reading.archives import ZipFiles, read_webdataset
from data_prep.reading.faults import Unusable
from data_prep.reading.files import Images, all_files, find_files
from data_prep.reading.parts import parts_of
from data_prep.reading.rows import Part
from infimed_jax.errors import UserError


def test_images_come_from_folders_then_archives(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"one")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
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


def reason(images: Images, name: str) -> str:
    with pytest.raises(Unusable) as fault:
        images.read(name)
    assert fault.value.detail == name[:200]
    return fault.value.reason


def test_names_in_another_spelling_are_found_where_one_file_is_meant(tmp_path):
    (tmp_path / "Deep").mkdir()
    (tmp_path / "Deep" / "Gr\u00fcn 1.JPG").write_bytes(b"one")
    (tmp_path / "100%20.png").write_bytes(b"sign")
    for name in ("Twin.png", "tWIN.png"):
        (tmp_path / name).write_bytes(name.encode())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/Packed E\u0301.png", b"packed")
        archive.writestr("__MACOSX/x/._Packed E\u0301.png", b"fork")
    images = Images(tmp_path, tmp_path / "a.zip")
    for name in (
        "Deep\\Gr\u00fcn 1.JPG",
        "deep/gr\u00fcn 1.jpg",
        " Deep/Gr\u00fcn 1.JPG\n",
        "Deep/Gru\u0308n 1.JPG",
        "Deep/Gr%C3%BCn%201.JPG",
        "file://" + str(tmp_path / "Deep" / "Gr\u00fcn 1.JPG"),
        "file://" + str(tmp_path / "Deep").replace(" ", "%20") + "/Gr%C3%BCn%201.JPG",
        str(tmp_path / "Deep" / "Gr\u00fcn 1.JPG"),
        "./Deep/../Deep/Gr\u00fcn 1.JPG",
    ):
        assert images.read(name) == b"one", name
    assert images.read("100%20.png") == b"sign"  # as it is written comes first
    assert images.read("Twin.png") == b"Twin.png" and reason(images, "twin.png") == "image missing"
    assert images.read("X\\packed \u00e9.PNG") == images.read("packed \u00c9.png") == b"packed"


def test_names_that_cannot_be_files_have_reasons_of_their_own(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(b"out")
    (tmp_path / "in" / "broken.png").symlink_to(tmp_path / "gone.png")
    images = Images(tmp_path / "in", tmp_path / "in" / "images")
    for name in ("https://example.org/a.png", "s3://bucket/a.png", "HTTP://x/a.png"):
        assert reason(images, name) == "image missing: an address, which is not downloaded"
    for name in ("../out.png", str(tmp_path / "out.png"), "file:///etc/hostname", "a/../../out.png", "..\\out.png"):
        assert reason(images, name).startswith("image missing"), name
    assert reason(images, "../out.png") == "image missing: its name leaves the input folder"
    with pytest.raises(Unusable, match=r"image missing.*broken\.png, a link to a file that does not exist"):
        images.read("broken.png")
    encoded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(90)).decode()
    assert images.read("data:image/png;base64," + encoded) == images.read(encoded) == base64.b64decode(encoded)
    assert images.cell({"bytes": encoded, "path": None}) == base64.b64decode(encoded)
    for text in ("data:image/png;base64,%%%", encoded[:-3] + "!!!"):
        with pytest.raises(Unusable, match="image that is no Base64"):
            images.read(text)
    with pytest.raises(Unusable, match="an address"):
        images.cell({"bytes": None, "path": None, "url": "https://example.org/a.png"})
    assert images.cells([b"a", {"bytes": b"b"}]) == images.cells(np.array([b"a", b"b"], object)) == (b"a", b"b")
    assert images.cells([]) == () and images.cells(b"a") == (b"a",)


def test_links_that_the_user_made_are_followed(tmp_path):
    """As in a hub cache, whose files are links into ../../blobs, and with a folder on another disk."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    for folder in (blobs, snapshot, tmp_path / "disk" / "deep"):
        folder.mkdir(parents=True)
    (blobs / "0a1b").write_bytes(b"one")
    (snapshot / "1.png").symlink_to("../../blobs/0a1b")
    (tmp_path / "disk" / "deep" / "2.png").write_bytes(b"two")
    (tmp_path / "disk" / "train-0.parquet").write_bytes(b"")
    (snapshot / "images").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "round").symlink_to(snapshot)  # back to where it began
    images = Images(snapshot, snapshot / "images")
    assert images.read("1.png") == b"one"
    assert images.read("images/deep/2.png") == images.read("deep/2.png") == images.read("DEEP/2.png") == b"two"
    assert reason(images, "../../blobs/0a1b") == "image missing: its name leaves the input folder"
    assert [str(file.relative_to(snapshot)) for file in all_files(snapshot, ".png")] == ["1.png", "images/deep/2.png"]
    assert find_files(snapshot, "**/train-*.parquet") == [snapshot / "images" / "train-0.parquet"]


def test_what_macos_writes_beside_files_is_passed_over(tmp_path):
    for name in ("a.json", "._a.json", "._b.tar"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in find_files(tmp_path, "*.json")] == ["a.json"]
    assert [file.name for file in all_files(tmp_path, ".json")] == ["a.json"]
    with pytest.raises(UserError, match="holds no file"):
        all_files(tmp_path, ".tar")
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name in ("x/._1.jpg", "x/1.jpg", "x/._1.txt", "x/1.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert list(read_webdataset(tmp_path / "c.tar")) == [{"__key__": b"x/1", "jpg": b"x", "txt": b"x"}]


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
