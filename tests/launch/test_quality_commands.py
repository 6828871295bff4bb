"""`data assess`, `reflect`, `scrub`, `difficulty` as commands: what a user sees, and what a mistake looks like."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.llm.quality.rubric import DIMENSIONS
from infimed_jax.data.storage import write_samples
from launch import run
from launch.machine import accelerator
from tests.data_prep import loopback as lo
from tests.data_prep.samples import caption, question

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of the output, lines of errors)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run.main(["data", *map(str, arguments)])
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """What the entry sets for a process of its own is not set for that of the tests."""
    monkeypatch.setattr(run, "configure_jax", lambda: None)


@pytest.fixture
def questions(tmp_path):
    write_samples(tmp_path / "in", [question(i, question=f"Was it on 5/3/2019, {i}?") for i in range(3)], name="d")
    return tmp_path / "in"


def test_assess(tmp_path, questions):
    text = json.dumps({d.key: {"score": 4, "comment": "So."} for d in DIMENSIONS})
    with lo.serve([lo.say(text)]) as server:
        arguments = (
            "assess",
            "--input",
            questions,
            "--output",
            tmp_path / "out",
            "--endpoint",
            server.url,
            "--model",
            "m",
        )
        code, out, err = call(*arguments)
        assert (code, err) == (0, [])
        assert out[-3].startswith("vqa_rad: keep (mean Overall 4.00 is at least 3")
        assert out[-2].endswith("sent: 5; in all runs with this cache 87 prompt and 23 reply tokens")
        assert out[-1].startswith(f"Outputs: {tmp_path / 'out'}")
        code, out, _ = call(*arguments, "--threshold", "4.5")
        assert code == 0 and "exclude" in out[-3] and len(server.requests) == 3


def test_reflect(tmp_path, questions):
    def sampled(body, _):
        return lo.say(f"<think>Draw {body['seed']}.</think>\\boxed{{left lung}}")

    arguments = ("reflect", "--input", questions, "--output", tmp_path / "out", "--model", "m", "--sparse-words", "0")
    with lo.serve(sampled) as server:
        code, out, err = call(*arguments, "--endpoint", server.url)
    assert (code, err) == (0, []) and "warning" not in "".join(out)
    assert "3 of 3 questions reached their answer; patterns: plain: 3" in out[-3]
    assert out[-1] == f"Outputs: {tmp_path / 'out'}, {tmp_path / 'out'}.json"
    with lo.serve([lo.say("<think>Dark.</think>\\boxed{left lung}")]) as server:  # takes no temperature
        code, out, err = call(*arguments, "--endpoint", server.url)
    assert (code, err) == (0, [])
    assert out[-3].startswith("warning: all draws of each of 3 questions are the same, so the endpoint does not sample")


def test_scrub_says_that_it_promises_nothing(tmp_path, questions):
    code, out, err = call("scrub", "--input", questions, "--output", tmp_path / "out")
    assert (code, err) == (0, [])
    assert out[-4] == "mask: date: 3 in 3 samples"
    assert "no promise of anonymity" in out[-2] and out[-1].startswith("Outputs: ")


@pytest.mark.parametrize("step", ["assess", "difficulty"])
def test_help_waits_for_no_import(step):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from launch import run\n"
        f"try: run.main(['data', {step!r}, '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'jax', 'transformers', 'tensorflow_datasets', 'openai', 'httpx2', 'pydantic', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


ENDPOINT = ("--model", "m", "--endpoint")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("assess", *ENDPOINT, "nowhere"), "address must look like"),
        (("assess", *ENDPOINT, "http://me:geheim@127.0.0.1"), "environment variable"),
        (("assess", *ENDPOINT, "http://8.8.8.8/v1"), "https"),
        (("assess", *ENDPOINT, "https://8.8.8.8/v1"), "budget"),
        (("assess", *ENDPOINT, "https://10.0.0.1/v1"), "lies outside"),
        (("assess", *ENDPOINT, "https://8.8.8.8/v1", "--budget-tokens", "9"), "source mimic is not cleared"),
        (("reflect", *ENDPOINT, "https://8.8.8.8/v1", "--budget-tokens", "9"), "source mimic is not cleared"),
        (("assess", *ENDPOINT, "http://127.0.0.1:9", "--threshold", "9"), "threshold"),
        (("assess", *ENDPOINT, "http://127.0.0.1:9", "--key-variable", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set"),
        (("assess", *ENDPOINT, "http://127.0.0.1:9", "--budget-cost", "3"), "prices"),
        (("reflect", *ENDPOINT, "http://127.0.0.1:9", "--draws", "0"), "draws"),
        (("reflect", *ENDPOINT, "http://127.0.0.1:9"), "no question"),
        (("difficulty", "--checkpoint", "/no/run"), "/no/run"),
        (("difficulty", "--checkpoint", "/no/run", "--low", "0"), "0 < low"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    write_samples(tmp_path / "in", [caption(0, "mimic", text="SECRET")], name="d")
    code, _, err = call(arguments[0], "--input", tmp_path / "in", "--output", tmp_path / "out", *arguments[1:])
    assert code == 2 and len(err) == 1, err
    assert err[0].startswith("error: ") and words in err[0]
    assert "geheim" not in err[0] and "SECRET" not in err[0]
    assert not (tmp_path / "out/decision.json").exists() and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("step", ["assess", "reflect", "scrub"])
def test_what_is_no_dataset_is_told(tmp_path, step):
    extra = () if step == "scrub" else ("--model", "m")
    code, _, err = call(step, "--input", tmp_path / "nothing", "--output", tmp_path / "out", *extra)
    assert code == 2 and "holds no prepared dataset" in err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ("data", "reflect", "--output", "out", *ENDPOINT, "http://127.0.0.1:9", "--input", "in"),
        ("data", "difficulty", "--output", "out", "--checkpoint", "/no/run", "--input", "in"),
        ("data", "pack", "data.dataset=in"),
        ("data", "export-json", "--output", "out", "data.dataset=in"),
        ("train", "data.dataset=in", "data.tokenizer=in", "train.output=out"),
        ("grpo", "data.dataset=in", "data.tokenizer=in", "train.output=out", "--init-from", "/no/run"),
    ],
)
def test_a_test_set_is_never_learnt_from(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accelerator, "start", lambda args: None)
    write_samples(tmp_path / "in", [question(0, "medxpertqa_mm")], name="d", info={"training_allowed": False})
    assert run.main(list(command)) == 2
    error = capsys.readouterr().err
    assert "in holds medxpertqa_mm/train, for evaluation only" in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
