"""Hostile tars and zips: every member comes whole and safely named, or stands as refused with its reason."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from data_prep.reading import archives
from data_prep.reading.archives import Member, ZipFiles, read_tar, read_webdataset, safe_name
from data_prep.reading.faults import Unusable


def tar_of(file: Path, members: list[tuple], mode: str = "w") -> Path:
    """Members are (name, data), or a TarInfo with its data."""
    with tarfile.open(file, mode) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def reasons(found: list) -> list[str]:
    return [item.reason if isinstance(item, Unusable) else item.name for item in found]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_come_in_order_and_folders_are_passed_over(tmp_path, mode):
    members = [("a.txt", b"one"), (special("folder", tarfile.DIRTYPE), b""), ("folder/b.txt", os.urandom(5000))]
    file = tar_of(tmp_path / "x.tar", members, mode)
    assert list(read_tar(file)) == [Member(name, data) for name, data in members if isinstance(name, str)]


@pytest.mark.parametrize("name", ["../up", "a/../../up", "/etc/passwd", "a\\..\\b", "C:/x", "c:evil"])
def test_names_that_leave_the_archive_are_refused(tmp_path, name):
    assert not safe_name(name)
    found = list(read_tar(tar_of(tmp_path / "x.tar", [("a", b"1"), (name, b"evil"), ("b", b"2")])))
    assert reasons(found) == ["a", "archive member with an unsafe name", "b"]
    assert "evil" not in str(found[1].args)
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


@pytest.mark.parametrize("name", ["a", "a/b.jpg", "a..b", "..a", "ä/ö.png", "x:y/z"])
def test_usual_names_are_safe(name):
    assert safe_name(name) == (name != "x:y/z")


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.LNKTYPE, "a"),
        (tarfile.FIFOTYPE, ""),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
    ],
)
def test_links_and_devices_are_refused(tmp_path, kind, target):
    found = list(read_tar(tar_of(tmp_path / "x.tar", [("a", b"1"), (special("b", kind, target), b""), ("c", b"3")])))
    assert reasons(found) == ["a", "archive member that is a link or no file", "c"]


def test_a_member_above_the_bound_is_passed_over_unread(tmp_path):
    file = tar_of(tmp_path / "x.tar", [("a", b"1"), ("big", bytes(3_000_000)), ("b", b"2")])
    tracemalloc.start()
    found = list(read_tar(file, max_member=100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons(found) == ["a", "archive member too large", "b"]
    assert peak < 1_000_000


def test_a_declared_size_without_the_data_is_damage_not_memory(tmp_path):
    info = tarfile.TarInfo("huge")
    info.size = 200 * 2**20
    (tmp_path / "x.tar").write_bytes(info.tobuf() + b"little")
    assert reasons(list(read_tar(tmp_path / "x.tar"))) == ["archive is damaged"]
    info.size = 2**60
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"little")
    assert reasons(list(read_tar(tmp_path / "x.tar"))) == ["archive member too large", "archive is damaged"]


@pytest.mark.parametrize("size", [300 * 2**20, 2**40])
def test_a_header_of_gigabytes_is_damage_not_memory(tmp_path, size):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, size
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    assert reasons(list(read_tar(tmp_path / "x.tar"))) == ["archive is damaged"]


def test_gzip_bombs_are_stopped_by_their_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_RATIO_FROM", 2**20)
    for members in ([("zeros", bytes(2**24))], [("zeros", bytes(2**24)), ("a", b"1")]):
        file = tar_of(tmp_path / "x.tar.gz", members, "w:gz")
        assert file.stat().st_size < 2**17
        # read as a member, and passed over as too large: either way it has to be unpacked
        assert "archive unpacks to far more than it should" in reasons(list(read_tar(file)))
        assert reasons(list(read_tar(file, max_member=1000)))[-1] == "archive unpacks to far more than it should"


def test_damage_in_the_middle_keeps_what_came_before(tmp_path):
    whole = tar_of(tmp_path / "x.tar", [(name, bytes([k]) * 700) for k, name in enumerate("abcd")]).read_bytes()
    cut = tmp_path / "cut.tar"
    for end in (1400, 3000, 4096):  # in a member's data, in padding, between members
        cut.write_bytes(whole[:end])
        found = reasons(list(read_tar(cut)))
        assert found[-1] == "archive is damaged" and found[:-1] == list("abcd")[: len(found) - 1]
    broken = bytearray(whole)
    broken[1536:1600] = b"\xff" * 64  # the second member's header: tarfile alone would end there in silence
    cut.write_bytes(broken)
    assert reasons(list(read_tar(cut))) == ["a", "archive is damaged"]
    for content in (b"", b"no tar", gzip.compress(b"no tar"), gzip.compress(whole)[:40]):
        cut.write_bytes(content)
        assert reasons(list(read_tar(cut))) == ["archive is damaged"]


def test_a_long_tar_is_read_in_bounded_memory(tmp_path):
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as tar:
        for number in range(600):
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = 20_000
            tar.addfile(info, io.BytesIO(bytes(20_000)))
    tracemalloc.start()
    count = sum(1 for _ in read_tar(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 600 and peak < 1_000_000  # the archive has 12 MB


def test_webdataset_groups_neighbours_by_key(tmp_path):
    members = [("0/a.jpg", b"A"), ("0/a.txt", b"cap"), ("0/b.seg.png", b"B"), ("1/a.JPG", b"C"), ("nokey", b"x")]
    found = list(read_webdataset(tar_of(tmp_path / "x.tar", members)))
    assert found[0] == {"__key__": b"0/a", "jpg": b"A", "txt": b"cap"}
    assert found[1] == {"__key__": b"0/b", "seg.png": b"B"}
    assert [item.reason for item in found if isinstance(item, Unusable)] == ["archive member that is a link or no file"]
    assert {"__key__": b"1/a", "jpg": b"C"} in found


def test_webdataset_refuses_repeated_keys_and_overlarge_samples(tmp_path):
    repeated = [("a.jpg", b"1"), ("a.txt", b"1"), ("a.txt", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4")]
    found = list(read_webdataset(tar_of(tmp_path / "x.tar", repeated)))
    assert [item.reason if isinstance(item, Unusable) else item["__key__"] for item in found] == [
        "duplicate id", b"a", b"b", "duplicate id",
    ]  # fmt: skip
    assert found[1]["txt"] == b"1"
    many = [(f"a.{number}", b"x") for number in range(70)]
    found = list(read_webdataset(tar_of(tmp_path / "x.tar", many)))
    assert [item.reason for item in found[:-1]] == ["archive member too large"] * 6 and len(found[-1]) == 65
    large = [("a.jpg", bytes(600)), ("a.png", bytes(600)), ("b.jpg", b"x")]
    found = list(read_webdataset(tar_of(tmp_path / "x.tar", large), max_member=1000))
    assert [type(item) for item in found] == [Unusable, dict, dict] and set(found[1]) == {"__key__", "jpg"}


def test_zip_members_are_found_by_name_or_by_bare_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("images/", b"")
        archive.writestr("images/a.jpg", b"A")
        archive.writestr("b.jpg", b"top")
        archive.writestr("images/b.jpg", b"B")
        archive.writestr("1/c.jpg", b"C1")
        archive.writestr("2/c.jpg", b"C2")
    found = ZipFiles(tmp_path / "x.zip")
    assert found.read("images/a.jpg") == found.read("a.jpg") == b"A"
    assert found.read("b.jpg") == b"top" and found.read("images/b.jpg") == b"B" and found.read("2/c.jpg") == b"C2"
    with pytest.raises(Unusable, match="duplicate id"):
        found.read("c.jpg")  # which of the two, nobody knows
    assert "d.jpg" not in found and "images/" not in found and "other/a.jpg" not in found


def test_hostile_zip_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_RATIO_FROM", 2**20)
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../up.jpg", b"evil")
        archive.writestr("/abs.jpg", b"evil")
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bomb", bytes(2**24))
        archive.writestr("big", os.urandom(5000))
        archive.writestr("fine", b"fine")
    found = ZipFiles(tmp_path / "x.zip", max_member=2**25)
    for name, reason in [
        ("../up.jpg", "unsafe name"),
        ("up.jpg", "unsafe name"),
        ("/abs.jpg", "unsafe name"),
        ("link", "link or no file"),
        ("bomb", "far more than it should"),
    ]:
        with pytest.raises(Unusable, match=reason):
            found.read(name)
    assert found.read("fine") == b"fine"
    with pytest.raises(Unusable, match="too large"):
        ZipFiles(tmp_path / "x.zip", max_member=1000).read("big")


def test_a_zip_whose_declared_size_lies_is_damaged(tmp_path):
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"0123456789" * 1000)
    raw = bytearray(file.read_bytes())
    place = raw.index(b"PK\x01\x02") + 24  # uncompressed size in the central directory
    raw[place : place + 4] = (100).to_bytes(4, "little")
    file.write_bytes(raw)
    with pytest.raises(Unusable, match="archive is damaged"):
        ZipFiles(file).read("a")
    raw[place : place + 4] = (10_000).to_bytes(4, "little")
    raw[60:70] = b"\0" * 10  # the data itself
    file.write_bytes(raw)
    with pytest.raises(Unusable, match="archive is damaged"):
        ZipFiles(file).read("a")
    for content in (b"", b"PK\x03\x04 but no more"):
        file.write_bytes(content)
        with pytest.raises(Unusable, match="archive is damaged"):
            ZipFiles(file)


def test_encrypted_zip_members_are_refused(tmp_path):
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"secret")
    raw = bytearray(file.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(raw)
    with pytest.raises(Unusable, match="encrypted"):
        ZipFiles(file).read("a")
