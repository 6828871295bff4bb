"""Files that appear whole or not at all."""

import errno

import pytest

from infimed_jax.files import open_whole, write_json, write_text


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
