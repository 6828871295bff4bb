"""Engines: the same dataset whoever ran the pieces, and whatever was killed meanwhile; nothing lost, nothing twice."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import partial
from pathlib import Path

import pytest

from data_prep import engine
from data_prep.engine import Engine, run_pieces
from data_prep.steps.step import Step, make_dataset
from infimed_jax.data.storage import open_samples
from infimed_jax.errors import UserError

HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
sys.path.insert(0, str(HERE))  # workers of every engine must find the work by its module's name
from engine_worker import dying_work, failing_work, sample  # noqa: E402

no_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
ENGINES = ["loky", pytest.param("ray", marks=no_ray)]
PIECES = [range(start, start + 30) for start in range(0, 180, 30)]


def made(folder: Path, where: Engine, deaths: int, on_progress=None) -> tuple[dict, list[int]]:
    """(the dataset's report, how often each piece was begun)."""
    marks = folder / "marks"
    marks.mkdir(parents=True)
    step = Step(
        folder / "set", name="toy", recipe={}, pieces=PIECES,
        work=partial(dying_work, str(marks), deaths),
        report=lambda manifest, facts: {"fingerprint": manifest["fingerprint"], "first": [f["first"] for f in facts]},
    )  # fmt: skip
    report = make_dataset(step, where, on_progress)
    return report, [(marks / f"{number:06d}").stat().st_size for number in range(len(PIECES))]


@pytest.fixture
def here(tmp_path) -> dict:
    report, tries = made(tmp_path / "here", Engine(), 0)
    assert tries == [1] * 6
    return report


@pytest.mark.parametrize("name", ENGINES)
def test_a_worker_killed_in_the_middle_of_a_shard_loses_and_doubles_nothing(name, here, tmp_path):
    seen = []
    report, tries = made(tmp_path / name, Engine(name, jobs=2), 1, lambda *at: seen.append(at))
    assert report == here
    assert tries[2] == 2
    assert list(open_samples(tmp_path / name / "set")) == [sample(number) for number in range(180)]
    assert seen[-1] == (6, 6, "") and seen == sorted(seen)
    files = sorted(file.name for file in (tmp_path / "here" / "set").iterdir())
    assert sorted(file.name for file in (tmp_path / name / "set").iterdir()) == files


@pytest.mark.parametrize("name", ENGINES)
def test_workers_that_always_die_end_the_step_and_finished_pieces_stay(name, here, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_ATTEMPTS", 2)
    with pytest.raises(UserError, match=r"workers died 2 times .* fewer --jobs"):
        made(tmp_path / "out", Engine(name, jobs=2), 99)
    assert not (tmp_path / "out" / "set").exists()
    done = sorted(file.name for file in (tmp_path / "out" / ".set.new").glob("piece-*.json"))
    assert done and "piece-000002.json" not in done
    step = Step(
        tmp_path / "out" / "set", name="toy", recipe={}, pieces=PIECES,
        work=partial(dying_work, str(tmp_path / "out" / "marks"), 0),
        report=lambda manifest, facts: {"fingerprint": manifest["fingerprint"], "first": [f["first"] for f in facts]},
    )  # fmt: skip
    assert make_dataset(step, Engine()) == here


def test_what_the_work_raises_here_is_raised_at_once(tmp_path):
    with pytest.raises(UserError, match="piece 1 is bad"):
        run_pieces(failing_work, range(3), tmp_path, Engine())


@pytest.mark.parametrize("name", ENGINES)
def test_what_the_work_raises_in_a_worker_is_raised_at_once(name, tmp_path):
    with pytest.raises(UserError, match="piece 1 is bad"):
        run_pieces(failing_work, range(3), tmp_path, Engine(name, jobs=2))


def test_user_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no engine 'dask': there are loky, ray"):
        Engine("dask")
    with pytest.raises(UserError, match="jobs must be at least 1"):
        Engine(jobs=0)
    with pytest.raises(UserError, match=r"engine loky goes to no address, 10\.0\.0\.1:6379"):
        Engine(address="10.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="engine ray needs the package ray"):
        run_pieces(failing_work, range(1), tmp_path, Engine("ray"))
