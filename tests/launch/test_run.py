"""The one entry: what a user's mistake looks like, and what `--help` may not import."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import tomllib
import types
import warnings
from functools import partial
from pathlib import Path

import jax
import pytest

from infimed_jax.errors import UserError
from launch import commands
from launch.machine import accelerator
from launch.run import main, parse, quiet_after_failed_saves

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch/run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


COMMANDS = [
    *((), ("quickstart",), ("train",), ("grpo",), ("evaluate",), ("generate",), ("plan",), ("doctor",), ("settings",)),
    *(("data", "ingest"), ("convert", "from-hf"), ("convert", "to-hf"), ("convert", "verify")),
]


@pytest.mark.parametrize("command", COMMANDS)
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


def test_help_of_a_stage_and_the_command_settings_state_the_same_of_a_group():
    groups = run("settings", "optimizer", "train.lora").stdout.split("\n\n")
    assert [group.split(":")[0] for group in groups] == ["optimizer", "train.lora"]
    assert "  optimizer.beta1=0.9  (float, must lie in [0, 1))\n      Decay of the first moment.\n" in groups[0]
    shown = run("train", "--help").stdout
    assert all(group.strip() in shown for group in groups)
    assert "grpo.steps" not in shown and "grpo.steps" in run("grpo", "--help").stdout
    set_ = run("train", "--config", "configs/stages/pretrain.yaml", "train.steps=20", "--help").stdout
    assert "train.steps=20  (int, must be at least 0, default 0)" in set_ and "optimizer.learning_rate=5e-05 " in set_
    wrong = run("train", "train.step=20", "--help")
    assert (wrong.returncode, wrong.stderr) == (2, "error: unknown setting train.step; did you mean train.steps?\n")
    one = run("settings", "train.steps").stdout.splitlines()
    assert [line.strip().split("=")[0] for line in one[1:2]] == ["train.steps"] and len(one) == 3


def test_help_is_of_the_family_that_is_chosen_with_the_docstrings_of_its_own_file(tmp_path):
    (tmp_path / "toy.py").write_text(
        "from dataclasses import dataclass\n"
        "from infimed_jax.config import Model\n"
        "@dataclass(frozen=True)\n"
        "class Toy(Model):\n"
        "    PARTS = ('eye', 'mouth')\n"
        "    width: int = 8\n"
        "    '''Width of everything, in eyes.'''\n"
        "MODEL = Toy\n"
    )
    shown = run("settings", "model", "model.family=./toy.py", cwd=tmp_path).stdout
    assert "  model.width=8  (int)\n      Width of everything, in eyes.\n" in shown and "model.vision" not in shown


def test_a_reader_that_leaves_is_no_mistake():
    command = [sys.executable, str(ROOT / "launch/run.py"), "settings"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1


def test_the_console_command_is_this_entry():
    """As pip's script runs it: from another folder, and with the entry's exit codes."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["infimed"]
    module, function = entry.split(":")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {module} import {function}; {function}()"
    done = subprocess.run([sys.executable, "-c", code, "settings", "trian"], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (2, "error: no setting or group 'trian'; did you mean train?\n")


def test_no_module_beside_the_script_hides_an_installed_package():
    """`launch/machine/distributed.py` has the name of a package that others install."""
    code = (
        "import importlib.util, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'launch')!r})  # as `python launch/run.py` does\n"
        "sys.argv = ['run.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'launch/run.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "found = importlib.util.find_spec('distributed')\n"
        f"assert not found or not found.origin.startswith({str(ROOT / 'launch')!r}), found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", "a=1 --config F --init-from R b=2 --profile 3 c=3"),
        ("grpo", "--config F a=1 b=2 --init-from R c=3"),
        ("plan", "--topology v5p:2x2x1 a=1 --config F b=2 --mesh data=1 c=3"),
        ("evaluate", "--checkpoint R a=1 --dataset D b=2 --output O c=3"),
    ],
)
def test_settings_stand_anywhere_among_the_options(command, arguments):
    parser = argparse.ArgumentParser()
    commands.add_commands(parser.add_subparsers())
    assert parse(parser, [command, *arguments.split()]).settings == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize("arguments", ["train a=1 --no-such-option 3 b=2", "doctor a=1"])
def test_what_no_command_knows_is_refused(arguments, capsys):
    parser = argparse.ArgumentParser()
    commands.add_commands(parser.add_subparsers())
    with pytest.raises(SystemExit) as stop:
        parse(parser, arguments.split())
    assert stop.value.code == 2
    assert "unrecognized" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quickstart", "--source", "mimic"), ("mimic", "phantom", "vqa_rad")),
        (("quickstart", "--source", "vqa_rad"), ("--input",)),
        (("quickstart", "--source", "vqa_rad", "--input", "/no/such/folder"), ("/no/such/folder",)),
        (("quickstart", "--tokenizer", "/no/tokenizer"), ("--tokenizer", "/no/tokenizer")),
        (("quickstart", "--output", "/proc/x"), ("/proc/x/steps", "name another folder")),
        (("train", "--config", "/no/file.yaml"), ("/no/file.yaml",)),
        (("train", "train.stepz=3"), ("train.stepz", "train.steps")),
        (("train", "train.steps=many"), ("train.steps", "int")),
        (("evaluate", "--checkpoint", "c", "--dataset", "d", "--output", "o", "--limit", "-1"), ("--limit -1",)),
        (("train",), ("data.dataset is empty", "data.dataset=DIR")),
        (("train", "data.dataset=d"), ("data.tokenizer is empty",)),
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


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Out of memory allocating 57556775392 bytes.",
        "XLA:TPU compile permanent error. Used 44.41G of 31.25G hbm. Exceeded hbm capacity by 13.16G.",
    ],
)
def test_a_device_without_room_is_one_line_with_what_needs_less(monkeypatch, capsys, said):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr("launch.commands.doctor.doctor", fail)
    for lasting in ("configure_jax", "quiet_after_failed_saves"):  # they would change this process for other tests
        monkeypatch.setattr(f"launch.run.{lasting}", lambda: None)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.strip() == (
        f"error: out of memory on a device ({said}): a smaller sampling.slots or context, or more devices"
    )
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["doctor", "--debug"])
    assert "train.rows_per_device=1" in accelerator.out_of_memory(jax.errors.JaxRuntimeError(said), "train")
    assert accelerator.out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: a fault"), "train") is None
    assert accelerator.out_of_memory(ValueError(said), "train") is None


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("a mistake"), 2, "error: a mistake"),
        (OSError(errno.ENOSPC, "full", "/disk/a"), 2, "error: /disk/a: no space left on device; free some space"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 bytes"), 2, "error: out of memory on a device"),
        (KeyboardInterrupt(), 75, "\nInterrupted: "),
        (ZeroDivisionError("a fault"), 1, "Traceback"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_of_several_processes_one_that_fails_leaves_at_once(monkeypatch, capsys, error, code, words):
    """JAX's own end would wait for the others, who wait for this one. A process alone ends as Python does."""

    def fail(*_):
        raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("launch.commands.doctor.doctor", fail)
    monkeypatch.setattr("launch.machine.distributed.joined", lambda: True)
    monkeypatch.setattr("launch.machine.distributed.leave", leave)
    for lasting in ("configure_jax", "quiet_after_failed_saves"):
        monkeypatch.setattr(f"launch.run.{lasting}", lambda: None)
    with pytest.raises(SystemExit) as left:
        main(["doctor"])
    assert left.value.code == code
    assert capsys.readouterr().err.startswith(words)
    monkeypatch.setattr("launch.machine.distributed.joined", lambda: False)
    if code == 1:
        with pytest.raises(ZeroDivisionError):
            main(["doctor"])
    else:
        assert main(["doctor"]) == code


def test_an_error_that_a_signal_caused_while_a_module_was_imported_means_resume_me(monkeypatch, capsys):
    def fail(*_):
        raise ImportError("an extension was interrupted")

    monkeypatch.setattr("launch.commands.doctor.doctor", fail)
    monkeypatch.setattr("infimed_jax.signals.early", [15])
    for lasting in ("configure_jax", "quiet_after_failed_saves"):
        monkeypatch.setattr(f"launch.run.{lasting}", lambda: None)
    assert main(["doctor"]) == 75
    assert capsys.readouterr().err.startswith("\nInterrupted: ")


def test_only_what_a_failed_save_prints_late_is_kept_silent(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    with warnings.catch_warnings():
        quiet_after_failed_saves()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert [str(each.exc_value) for each in heard] == ["another"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_notice_while_a_run_starts_means_resume_me(tmp_path, number):
    os.mkfifo(tmp_path / "settings.yaml")
    command = [sys.executable, str(ROOT / "launch/run.py"), "train", "--config", str(tmp_path / "settings.yaml")]
    # A shell's background jobs ignore SIGINT, and so would whatever these tests start.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)
    with (tmp_path / "settings.yaml").open("w"):  # opens when the run reads it, and it waits for the rest
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert error.strip() == "Interrupted: the same command goes on from what is saved, or else from the start."


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


def test_a_closed_stdout_is_no_mistake(tmp_path):
    """A step draws its bar before it reads: it got as far as what is wrong with the input."""
    step = f"data import-json --input {tmp_path / 'none.json'} --output {tmp_path / 'out'}"
    command = f"exec {sys.executable} {ROOT / 'launch/run.py'} {step} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / 'none.json'} does not exist")


def test_a_folder_where_a_file_is_to_be_is_named(tmp_path):
    done = run("data", "sources", "--json", str(tmp_path))
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path}: is a directory; name a file, and run it again\n"
