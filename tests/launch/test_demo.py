"""The demo: what it announces is what it runs, and a small one from end to end, interrupted and resumed."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from infimed_jax.config import Mesh
from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.run import Record
from infimed_jax.evaluation.statistics import compare
from launch.demo import report, stages
from launch.demo.chain import CONFIGS, STAGES, STEPS, Chain, Options
from launch.demo.data import Prepared
from launch.demo.quickstart import load_plan

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys
from launch import run
from launch.demo import chain
chain.CONFIGS = chain.Path(sys.argv[1])
sys.exit(run.main(sys.argv[2:]))
"""
"""`launch/run.py` with another folder of configurations."""
SMALL = ["train.steps=4", "grpo.steps=2", "grpo.prompts=8", "grpo.update_prompts=8", "model.text.num_layers=1"]


def test_the_steps_that_are_announced_are_those_that_run_in_order(monkeypatch):
    """A step without its share of the time left would stop the chain."""
    names = []
    result = stages.Scored({"accuracy": 0.0})
    chain = SimpleNamespace(
        step=lambda name, kind, work: names.append(name) or result,
        stage_config=lambda stage: SimpleNamespace(model=None, mesh=Mesh(1, 1, 1)),
        progress=SimpleNamespace(say=print),
    )
    monkeypatch.setattr(stages, "test_samples", lambda chain: [])
    monkeypatch.setattr(stages, "majority_baseline", lambda samples: SimpleNamespace(accuracy=0.0))
    monkeypatch.setattr(stages, "param_count", lambda model: {"total": 0})
    stages.run(chain)
    assert [*names, "export", "report"] == list(STEPS)
    titles = [title for title, _ in STEPS.values()]
    assert len(set(titles)) == len(titles)  # progress bars know steps by their titles


@pytest.mark.parametrize(("settings", "steps"), [((), (3, 150)), (("train.steps=4",), (4, 4))])
def test_a_source_sets_the_steps_of_a_stage_and_the_user_those_of_all(tmp_path, settings, steps):
    chain = Chain(Options(tmp_path, settings=settings), {"steps": {"warmup": 3}}, None)
    vars(chain)["vocabulary"] = 128  # of a tokenizer that this test does not make
    assert tuple(chain.stage_config(stage).train.steps for stage in ("warmup", "pretrain")) == steps


def test_seconds_and_memory_are_those_of_every_process_of_a_resumed_run(tmp_path, monkeypatch):
    """The summary of a finished run, written again by `--resume`, is not that of a process that did nothing."""
    (tmp_path / "steps").mkdir()
    chain = Chain(Options(tmp_path), {"title": ""}, SimpleNamespace(begin=str, end=lambda *a, **k: None))

    def summary_with_a_peak_of(gigabytes: int) -> dict:
        monkeypatch.setattr("launch.demo.chain.peak_memory", lambda: gigabytes << 30)
        chain.costs.clear()
        data = chain.step("data", Prepared, lambda: Prepared(0, {}, 0, {}))
        results = stages.Results(data, 0.0, {}, {})
        for name in (*STAGES, "grpo", "control"):
            trained = stages.Trained("loss", 1.0, 1.0, 1, 1, 1.0)
            results.trained[name] = chain.step(name, stages.Trained, lambda t=trained: t)
        for name in (*STAGES, "blind", "sft_reflective_sampled", "grpo", "grpo_sampled", "control_sampled"):
            scored = stages.Scored({"accuracy": 0.5, "n": 4, "interval": (0.1, 0.9)})
            results.scored[name] = chain.step(f"evaluation_{name}", stages.Scored, lambda s=scored: s)
        export = chain.step("export", report.Exported, lambda: report.Exported("", "skipped"))
        return report._summary(chain, results, export, 1.0)

    first, resumed = summary_with_a_peak_of(3), summary_with_a_peak_of(2)
    assert first["peak_memory_bytes"] == resumed["peak_memory_bytes"] == 3 << 30
    assert first["seconds_total"] == resumed["seconds_total"]


def test_vqa_rad_ends_with_closed_and_open_beside_their_baselines_and_the_warning(monkeypatch):
    """Each baseline is that of its own questions: the answer `left` is most frequent among OPEN, not among all."""
    gold = {"CLOSED": ["yes", "yes", "yes", "no"], "OPEN": ["left", "left", "chest", "air", "fluid"]}
    asked = [(kind, answer) for kind, answers in gold.items() for answer in answers]
    samples = [
        Question(
            id=f"q{i}", source="s", split="test", images=(), kind="open", question="?", answer=answer,
            meta={"answer_type": kind},
        )
        for i, (kind, answer) in enumerate(asked)
    ]  # fmt: skip
    monkeypatch.setattr(report, "test_samples", lambda chain: samples)
    chain = Chain(Options(Path(), source="vqa_rad"), load_plan(Options(Path(), "vqa_rad", Path())), None)
    right = [Record(s.id, s.id, "s", "open", "?", (), s.answer, (), s.answer in ("yes", "air"), "ok", None, "", "",
                    "stop", 1, "", s.meta) for s in samples]  # fmt: skip
    same = report._comparison(compare(right, right))
    summary = dict.fromkeys(("grpo_gain", "control_gain", "grpo_gain_greedy", "image_gain"), same) | {
        "grpo": {"accuracy_before": 0.0, "accuracy_after": 0.0},
        "stages": [{"name": "sft_cross_distribution", "accuracy": 0.0}],
        "baseline_accuracy": 0.0,
        "blind_accuracy": 0.0,
        "accuracy_by_answer_type": {"grpo": {"CLOSED": {"accuracy": 0.75, "n": 4}, "OPEN": {"accuracy": 0.2, "n": 5}}},
    }
    _, gains, closed, opened, warning = report._closing_lines(chain, summary)
    # Nine images without a difference say that at most a share p of images has one, (1 - p)^9 = 2.5 %.
    assert "control +0.0 points [-33.6, +33.6], all 9 graded alike; greedy" in gains
    assert closed == "CLOSED: 75.0% of 4 after GRPO; majority baseline 75.0%"
    assert opened == "OPEN: 20.0% of 5 after GRPO; majority baseline 40.0%"
    assert "all 203 test images also occur in train" in warning


def quickstart(folder: Path, *options: str) -> subprocess.Popen:
    """A chain of a few steps a stage on a few images."""
    configs = folder / "configs"
    if not configs.exists():
        shutil.copytree(CONFIGS, configs)
        file = configs / "runs/quickstart/phantom.yaml"
        plan = yaml.safe_load(file.read_text())
        plan["questions_at_most"] = 24
        plan["images"] = {source: dict.fromkeys(splits, 40) for source, splits in plan["images"].items()}
        file.write_text(yaml.safe_dump(plan))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", START, str(configs), "quickstart", "--output", str(folder / "run"), *options]
    return subprocess.Popen(
        [*command, *SMALL], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """(folder, exit code, stderr) of a chain that Ctrl-C stopped in its third stage."""
    folder = tmp_path_factory.mktemp("quickstart")
    process = quickstart(folder)
    while process.poll() is None and not (folder / "run/stages/sft_general/metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=200)
    return folder, process.returncode, error


def test_ctrl_c_keeps_what_is_done_and_resume_ends_the_chain(interrupted):
    folder, code, error = interrupted
    assert code == 75 and "Give --resume" in error, error
    kept = {file.stem: file.read_bytes() for file in (folder / "run/steps").iterdir()}
    assert {"data", "warmup", "evaluation_warmup", "pretrain", "evaluation_pretrain"} <= set(kept)
    assert "evaluation_sft_general" not in kept and not (folder / "run/summary.json").exists()

    process = quickstart(folder, "--resume")
    output, error = process.communicate(timeout=290)
    assert process.returncode == 0, error
    assert output.count("[kept]") == len(kept)
    for name, content in kept.items():
        assert (folder / f"run/steps/{name}.json").read_bytes() == content
    summary = json.loads((folder / "run/summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
    assert all(stage["steps"] == 4 and stage["n"] == 24 for stage in summary["stages"])
    assert summary["grpo"].keys() >= {"reward_first", "reward_last", "accuracy_before", "accuracy_after"}
    assert summary["seed"] == 0 and summary["peak_memory_bytes"] > 2**28
    report = (folder / "run/report.html").read_text()
    assert "<svg" in report or "data:image/png" in report
    assert not re.search(r"""(src|href)=["']?https?:""", report)  # self-contained
    if importlib.util.find_spec("torch"):
        assert summary["export"]["max_abs_logit_diff"] < 1e-4
    assert (Path(summary["export"]["path"]) / "config.json").is_file()


def test_a_folder_that_holds_a_run_is_neither_overwritten_nor_mixed(interrupted):
    folder, *_ = interrupted
    plain = shutil.copytree(folder / "run/tokenizer", folder / "plain", dirs_exist_ok=True)
    file = plain / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_start|>"]
    file.write_text(json.dumps(content))
    before = sorted(file.name for file in (folder / "run").rglob("*"))
    for options, message in (
        ([], "give --resume to continue it or --overwrite"),
        (["--resume", "--seed", "1"], "seed was 0, is 1"),
        (["--source", "vqa_rad"], "give --input DIR"),
        (["--tokenizer", str(folder / "none")], "none is no folder"),
        (["--tokenizer", str(plain)], "lacks <|im_start|>"),
    ):
        process = quickstart(folder, *options)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2 and message in error and error.count("\n") == 1, error
    assert sorted(file.name for file in (folder / "run").rglob("*")) == before


def test_a_seed_out_of_its_range_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="seed=-1 must be at least 0"):
        Options(tmp_path / "run", seed=-1)
