"""A resumed run must share every setting with its checkpoints but a named few, and the content of what it reads."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infimed_jax.config import Config, to_dict
from infimed_jax.errors import UserError
from infimed_jax.runs.identity import RESUME_MAY_CHANGE, check_same_run

TRAINING = {"tokenizer_sha256": "t", "batches_sha256": "b", "init_from_sha256": "i"}
GRPO = {"tokenizer_sha256": "t", "questions_sha256": "q", "init_from_sha256": "i"}


def _names(settings: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _names(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


SETTINGS = list(_names(Config()))
MAY_CHANGE = {name for name in SETTINGS if RESUME_MAY_CHANGE & {name, name.partition(".")[0]}}


def _metadata(content: dict[str, str], changed: str = "", **changes: str) -> dict[str, Any]:
    """A run's, with the setting `changed` to a value that it has nowhere else."""
    values = to_dict(Config())
    *groups, name = changed.split(".")
    group = values
    for part in groups:
        group = group[part]
    if changed:
        group[name] = "another"
    return {"config": values, "content": content | changes}


def test_what_may_change_is_named_as_the_settings_are():
    assert {*SETTINGS, *(name.partition(".")[0] for name in SETTINGS)} >= RESUME_MAY_CHANGE


@pytest.mark.parametrize("content", [TRAINING, GRPO], ids=["training", "grpo"])
def test_every_setting_is_bound_but_the_named(content):
    """A training run reads no setting of `grpo`."""
    free = MAY_CHANGE | ({name for name in SETTINGS if name.startswith("grpo.")} if content is TRAINING else set())
    for name in SETTINGS:
        ours = _metadata(content, name)
        if name == "train.init_from":
            continue
        if name in free:
            check_same_run(Path("runs/x"), _metadata(content), ours)
            continue
        with pytest.raises(
            UserError, match=rf"cannot resume runs/x: {name} was .*, is 'another'; restore that or name"
        ):
            check_same_run(Path("runs/x"), _metadata(content), ours)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        (TRAINING, "tokenizer_sha256", "data.tokenizer= is another tokenizer"),
        (TRAINING, "batches_sha256", "data.dataset= holds other samples, or they are packed in another way"),
        (GRPO, "questions_sha256", "data.dataset= holds other questions"),
        (GRPO, "init_from_sha256", "train.init_from= holds other parameters than when the run began"),
    ],
)
def test_content_is_bound(content, key, message):
    check_same_run(Path("x"), _metadata(content), _metadata(content))
    with pytest.raises(UserError, match=f"cannot resume x: {message}; restore that or name another train.output"):
        check_same_run(Path("x"), _metadata(content), _metadata(content, **{key: "other"}))


@pytest.mark.parametrize(("setting", "key"), [("model.family", "family_sha256"), ("grpo.reward", "reward_sha256")])
def test_a_users_program_may_move_and_may_not_change(setting, key):
    before = _metadata(GRPO | {key: "p"}, setting)
    check_same_run(Path("x"), before, _metadata(GRPO | {key: "p"}))
    with pytest.raises(UserError, match=f"{setting}=another is another program than when the run began"):
        check_same_run(Path("x"), before, _metadata(GRPO | {key: "q"}, setting))
    with pytest.raises(UserError, match=f"{setting} was 'another'"):
        check_same_run(Path("x"), before, _metadata(GRPO | {key: ""}))


def test_a_start_that_was_not_read_is_the_same_under_the_same_path_and_read_under_another(tmp_path):
    unread = {key: value for key, value in TRAINING.items() if key != "init_from_sha256"}
    check_same_run(Path("x"), _metadata(TRAINING), _metadata(unread))
    moved = _metadata(unread)
    moved["config"]["train"]["init_from"] = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"no checkpoint at .*gone: the folder does not exist"):
        check_same_run(Path("x"), _metadata(TRAINING), moved)


def test_a_run_of_an_older_version_is_refused_in_one_line():
    older = {"config": to_dict(Config()), "fingerprint": "b", "tokenizer": "t"}
    with pytest.raises(UserError, match=r"^cannot resume x: an older version began it; name another train.output$"):
        check_same_run(Path("x"), older, _metadata(TRAINING))
