"""Files that appear whole or not at all."""

import errno
import fcntl
import json
import logging
import math

import pytest

from infimed_jax.errors import UserError, describe
from infimed_jax.files import lock, make_folder, open_whole, to_json, whole_folder, write_json, write_text


def test_a_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "a/b")
    assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a/b"]


@pytest.mark.parametrize(
    ("place", "cause"),
    [("file", "file exists"), ("file/x", "not a directory"), ("/proc/x", "no such file"), ("/proc", "no such file")],
)
def test_a_folder_that_cannot_be_written_is_one_line_with_the_mend(tmp_path, place, cause):
    (tmp_path / "file").write_text("")
    folder = tmp_path / place
    with pytest.raises(UserError) as refused:
        make_folder(folder)
    assert str(refused.value).startswith(f"cannot write to the folder {folder}: {cause}")
    assert str(refused.value).endswith("; name another folder, and run it again")


def test_a_path_that_nothing_knew_to_refuse_is_named_without_a_number(tmp_path):
    with pytest.raises(FileNotFoundError) as gone:
        (tmp_path / "gone").read_text()
    expected = f"{tmp_path / 'gone'}: no such file or directory; give another path, and run it again"
    assert describe(gone.value) == expected


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(OSError, match="No space left"), open_whole(file) as out:
        out.write("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with open_whole(file) as out:
        out.write("new")
        out.flush()
        assert file.read_text() == "old"
    assert file.read_text() == "new"


def test_json_keeps_letters_beyond_ascii(tmp_path):
    write_json(tmp_path / "a.json", {"käse": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "käse": [\n  1\n ]\n}\n'


def test_a_number_that_is_not_finite_is_null_and_the_rest_stays(tmp_path):
    """Python's own reader takes NaN: `parse_constant` is told of each such word, and must hear of none."""
    value = {"a": [1.5, math.nan, {"b": -math.inf}], "käse": "NaN", "c": (math.inf, None, True)}
    for text in (to_json(value), to_json(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))):
        read = json.loads(text, parse_constant=pytest.fail)
        assert read == {"a": [1.5, None, {"b": None}], "käse": "NaN", "c": [None, None, True]}
    assert to_json({"b": "ä", "a": 0.1}, sort_keys=True) == json.dumps({"b": "ä", "a": 0.1}, sort_keys=True)
    write_json(tmp_path / "a.json", math.nan)
    assert (tmp_path / "a.json").read_text() == "null\n"


def test_a_full_disk_that_names_no_file_is_reported_with_the_path(tmp_path):
    for whole, name in ((open_whole, "a.txt"), (whole_folder, "b")):
        with pytest.raises(OSError) as refused, whole(tmp_path / name):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert describe(refused.value).startswith(f"{tmp_path / name}: no space left on device; ")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_is_reported_and_not_fatal(tmp_path, monkeypatch, caplog):
    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        assert lock(tmp_path, tmp_path) >= 0
    assert f"{tmp_path} cannot be locked (No locks available)" in caplog.text
