"""`plan` from the shell: its table and JSON, its cache, and one line for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.plan import compile as ahead

ROOT = Path(__file__).resolve().parents[2]
FILES = ("--config", "configs/models/foundation_1p7b.yaml", "--config", "configs/stages/pretrain.yaml")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/run.py", "plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


@pytest.mark.timeout(300)
def test_a_table_best_first_and_everything_as_json(tmp_path):
    file = tmp_path / "plan.json"
    machines = ("--topology", "v5e:4x4", "--topology", "h100x16", "--mesh", "fsdp=-1", "--mesh", "fsdp=-1,tensor=2")
    done = run(*FILES, *machines, "--no-compile", "--json", str(file), "train.remat=full")
    assert done.returncode == 0, done.stderr
    cells = json.loads(file.read_text())["cells"]
    assert len(cells) == 4
    order = [cell["fits"] for cell in cells]
    assert order == sorted(order, reverse=True)
    assert cells[0]["parameters"]["text"] == 1_720_574_976 and cells[0]["parameters"]["vision"] == 397_745_440
    assert all(cell["estimate"] for cell in cells)
    assert {tuple(cell["mesh"].values()) for cell in cells} == {(1, 16, 1), (1, 8, 2)}
    assert done.stdout.splitlines()[-1] == f"Outputs: {file}"
    assert "1,720,574,976" in done.stdout and "~" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (FILES, "--topology v5p:4x4x8"),
        ((*FILES, "--topology", "v5p4"), "v5p:4x4x8"),
        ((*FILES, "--topology", "h100x8", "--mesh", "rows=8"), "data=2,fsdp=16,tensor=1"),
        ((*FILES, "--topology", "h100x8", "--mesh", "fsdp=many"), "data=2,fsdp=16,tensor=1"),
        ((*FILES, "--topology", "h100x8", "--json", "/no/such/folder/plan.json"), "make it, or name another"),
        ((*FILES, "--topology", "h100x8", "--json", "/tmp"), "--json /tmp is a folder: name a file in it"),
        (("--config", "/no/file.yaml", "--topology", "h100x8"), "/no/file.yaml"),
    ],
)
def test_a_mistake_is_one_line(arguments, word):
    done = run(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and word in done.stderr


def test_the_compiler_is_found_where_jax_finds_it(monkeypatch, tmp_path):
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert ahead.find_libtpu() is None
    library = tmp_path / "libtpu.so"
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(library))
    assert ahead.find_libtpu() is None
    library.write_bytes(b"")
    assert ahead.find_libtpu() == str(library)


def test_an_answer_is_kept_until_something_changes(monkeypatch, tmp_path):
    library = tmp_path / "libtpu.so"
    library.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    def answer(question, library):
        asked.append(question)
        return {"fits": True, "temporaries": len(asked)}

    monkeypatch.setattr(ahead, "_in_a_process", answer)
    cfg, mesh = config.Config(), {"data": 1, "fsdp": 4, "tensor": 1}
    first = ahead.compile_step(cfg, "v5p:2x2x1", mesh, str(library))
    again = ahead.compile_step(cfg, "v5p:2x2x1", mesh, str(library))
    assert (first.kept, again.kept, again.temporaries, len(asked)) == (False, True, 1, 1)
    assert not ahead.compile_step(cfg, "v5p:2x2x2", mesh, str(library)).kept
    assert not ahead.compile_step(cfg, "v5p:2x2x1", mesh | {"fsdp": 2, "tensor": 2}, str(library)).kept
    library.write_bytes(b"another version")
    assert not ahead.compile_step(cfg, "v5p:2x2x1", mesh, str(library)).kept


@pytest.mark.parametrize(
    ("said", "needed", "available"),
    [
        ("It would have used too much: Used 44.41G of 31.25G hbm. Exceeded hbm capacity by 13.16G.", 44.41, 31.25),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (44.41G) "
            "exceeds available HBM (31.25G).",
            44.41,
            31.25,
        ),
    ],
)
def test_a_step_that_does_not_fit_is_a_cell_and_no_error(said, needed, available):
    """libtpu 0.0.42 says it in two ways."""
    gib = 2**30
    assert ahead.does_not_fit(said) == {"fits": False, "needed": int(needed * gib), "available": int(available * gib)}
    assert ahead.does_not_fit("INTERNAL: a kernel does not tile, 2.0G of it") is None


def test_a_compiler_that_dies_is_one_line(monkeypatch):
    dead = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(ahead.subprocess, "run", lambda *_, **__: dead)
    question = {"config": {}, "topology": "v5p:2x2x1", "mesh": {}}
    with pytest.raises(UserError, match=r"code -9: it said nothing; .*memory"):
        ahead._in_a_process(question, os.devnull)
