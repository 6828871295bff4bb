"""The one entry: what a user's mistake looks like, and what `--help` may not import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch/run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", [(), ("quickstart",), ("train",), ("grpo",), ("evaluate",), ("data", "ingest")])
def test_help_needs_no_heavy_import(command):
    code = (
        "import sys, runpy; sys.argv = ['run.py', *sys.argv[1:], '--help']\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from launch import run\n"
        "try: run.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'tensorflow_datasets', 'grain'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quickstart", "--source", "mimic"), ("mimic", "phantom", "vqa_rad")),
        (("quickstart", "--source", "vqa_rad"), ("--input",)),
        (("quickstart", "--source", "vqa_rad", "--input", "/no/such/folder"), ("/no/such/folder",)),
        (("quickstart", "--tokenizer", "/no/tokenizer"), ("--tokenizer", "/no/tokenizer")),
        (("train", "--config", "/no/file.yaml"), ("/no/file.yaml",)),
        (("train", "train.stepz=3"), ("train.stepz", "train.steps")),
        (("train", "train.steps=many"), ("train.steps", "int")),
        (("grpo",), ("train.init_from",)),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_is_never_touched_unasked(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "quickstart.json").write_text(json.dumps({"source": "phantom"}))
    done = run("quickstart", "--output", str(folder))
    assert done.returncode == 2 and "--resume" in done.stderr and "--overwrite" in done.stderr
    assert os.listdir(folder) == ["quickstart.json"]


def test_overwrite_does_not_delete_what_is_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = run("quickstart", "--output", str(tmp_path), "--overwrite")
    assert done.returncode == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_resume_with_other_arguments_is_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    identity = {"source": "phantom", "input": "None", "tokenizer": "None", "seed": "3", "settings": "()"}
    (folder / "quickstart.json").write_text(json.dumps(identity))
    done = run("quickstart", "--output", str(folder), "--resume", "--seed", "4")
    assert done.returncode == 2 and "seed was 3, is 4" in done.stderr
