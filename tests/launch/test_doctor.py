"""`doctor`: a machine in order, and each thing that can be wrong with it, with its fix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infimed_jax.errors import UserError
from launch.machine import accelerator, checks

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch/run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=280)


@pytest.mark.timeout(300)
def test_a_cpu_in_order(tmp_path):
    file = tmp_path / "checks.json"
    done = run("doctor", "--platform", "cpu", "--json", str(file))
    found = {check["name"]: check for check in json.loads(file.read_text())}
    assert list(found) == [
        "versions", "torch", "disk", "compile cache", "memory", "devices", "attention", "a tiny step",
    ]  # fmt: skip
    wrong = [name for name, check in found.items() if not check["ok"]]
    assert done.returncode == (1 if wrong else 0)
    assert found["attention"]["ok"] and "rows" in found["attention"]["found"]
    before, after = found["a tiny step"]["found"].removeprefix("loss ").split(" -> ")
    assert float(after) < float(before)
    assert done.stdout.splitlines()[-1] == f"Outputs: {file}"


def test_an_accelerator_that_is_not_there_is_an_error():
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here")
    done = run("doctor", "--platform", "gpu")
    assert done.returncode == 1
    assert "WRONG  devices" in done.stdout and "nvidia-smi" in done.stdout
    assert "a tiny step" not in done.stdout, "it would run on another device than the one asked for"
    done = run("train", "train.output=x", "data.dataset=x", "data.tokenizer=x", "--platform", "gpu")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "gpu was requested by --platform" in done.stderr


@pytest.mark.parametrize(
    ("option", "environment", "plugin", "chips", "expected"),
    [
        (None, {}, False, 0, None),
        ("tpu", {"JAX_PLATFORMS": "cpu"}, False, 0, ("tpu", "--platform")),
        (None, {"JAX_PLATFORMS": "cuda,cpu"}, False, 0, ("gpu", "JAX_PLATFORMS")),
        (None, {"JAX_PLATFORMS": "cpu"}, True, 4, ("cpu", "JAX_PLATFORMS")),
        (None, {}, True, 0, ("gpu", "the installed jax_cuda13_plugin")),
        (None, {}, False, 4, ("tpu", "a TPU on this host's bus")),
    ],
)
def test_what_requests_an_accelerator(monkeypatch, option, environment, plugin, chips, expected):
    monkeypatch.setattr(accelerator.importlib.util, "find_spec", lambda name: plugin and name == "jax_cuda13_plugin")
    monkeypatch.setattr(accelerator, "tpu_chips", lambda: chips)
    assert accelerator.requested(option, environment) == expected


def test_an_installed_plugin_without_its_device_is_no_warning(monkeypatch):
    """JAX itself says so in a warning, and trains on the CPU."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(accelerator, "requested", lambda platform: ("gpu", "the installed jax_cuda13_plugin"))
    with pytest.raises(UserError, match="gpu was requested by the installed jax_cuda13_plugin, but JAX found only cpu"):
        accelerator.check(None)


def test_torch_with_cuda_is_the_trap(monkeypatch):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(metadata, "requires", lambda name: ["nvidia-cublas==13; sys_platform == 'linux'"])
    monkeypatch.setattr(accelerator.importlib.util, "find_spec", lambda name: object())
    assert accelerator.torch_cuda() == "2.13.0"
    assert "uninstall torch" in checks._torch().fix
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu")
    assert accelerator.torch_cuda() == "" and checks._torch().ok


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert not checks.compile_cache().ok
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    assert checks.compile_cache().ok and list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert not checks.compile_cache().ok


def test_a_full_disk_and_a_missing_package(monkeypatch, tmp_path):
    usage = checks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    assert "free at least" in checks._disk("disk", tmp_path / "not" / "made").fix
    monkeypatch.setattr(checks, "PACKAGES", ("jax", "no-such-package-here"))
    assert "no-such-package-here" in checks.versions().fix
