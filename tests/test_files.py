"""Files that appear whole or not at all."""

import errno
import json
import math

import pytest

from infimed_jax.files import open_whole, to_json, write_json, write_text


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
