"""Members of a room by module name, by dotted name and by file."""

from __future__ import annotations

import pytest

from infimed_jax import plugins
from infimed_jax.errors import UserError


@pytest.fixture(autouse=True)
def _own_path(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend("")  # restores sys.path afterwards
    monkeypatch.chdir(tmp_path)


def test_shipped_members_are_named_without_importing_them():
    assert "rows" in plugins.names("infimed_jax.ops.attention.backends")
    assert plugins.load("infimed_jax.config", "fields", "x").__name__ == "infimed_jax.config.fields"


def test_members_are_the_folders_of_a_room_that_has_any():
    assert plugins.names("infimed_jax.models") == ["infimed"]
    with pytest.raises(UserError, match=r"model\.family must be one of infimed, not 'layers'"):
        plugins.load("infimed_jax.models", "layers", "model.family")


def test_unknown_member_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match=r"grpo\.reward must be one of .*'field'; did you mean 'fields'"):
        plugins.load("infimed_jax.config", "field", "grpo.reward")


def test_dotted_name_is_found_in_the_working_folder(tmp_path):
    (tmp_path / "dotted_pkg").mkdir()
    (tmp_path / "dotted_pkg" / "mine.py").write_text("ANSWER = 42")
    assert plugins.load("infimed_jax.ops", "dotted_pkg.mine", "x").ANSWER == 42


def test_file_is_imported_once_wherever_it_lies(tmp_path):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "filed_member.py"
    file.write_text("ANSWER = 43")
    first = plugins.load("infimed_jax.ops", str(file), "x")
    assert first.ANSWER == 43
    assert plugins.load("infimed_jax.ops", str(file), "x") is first


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("./absent.py", None, "there is no such file"),
        ("./broken_member.py", "1/0", "ZeroDivisionError"),
        ("./json.py", "", "a module 'json' exists already"),
        ("no_such_package.mine", None, "No module named"),
    ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        plugins.load("infimed_jax.ops", name, "grpo.reward")
    assert "\n" not in str(caught.value)


def test_a_users_program_is_known_by_its_bytes_and_a_shipped_one_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text("A = 1")
    monkeypatch.syspath_prepend(tmp_path.parent)
    first = plugins.fingerprint(str(tmp_path / "of_mine.py"))
    assert plugins.fingerprint("infimed") == "" != first == plugins.fingerprint(f"{tmp_path.name}.of_mine")
    (tmp_path / "of_mine.py").write_text("A = 2")
    assert plugins.fingerprint(str(tmp_path / "of_mine.py")) != first
