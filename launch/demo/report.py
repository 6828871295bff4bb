"""The end of the demo: Hugging Face export and its proof, `summary.json`, `report.html`."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from data_prep.sources import COMMERCIAL_USE
from infimed_jax.cost.chips import GIB
from infimed_jax.evaluation.report import Report, Stage, write_report
from infimed_jax.evaluation.run import Record, compare_runs, image_gain, read_evaluation
from infimed_jax.evaluation.statistics import Comparison, majority_baseline
from infimed_jax.files import write_json
from infimed_jax.hf.export import Export
from infimed_jax.hf.provenance import checkpoint_card
from infimed_jax.hf.verify import verify
from infimed_jax.progress import clock
from infimed_jax.runs.history import history_of
from infimed_jax.runs.metrics import read_metrics
from infimed_jax.runs.parameters import load_params
from infimed_jax.sharding import make_mesh
from launch.demo.chain import BLIND, LAST_DIRECT, LAST_SUPERVISED, SAMPLED, STAGES, Chain
from launch.demo.data import by_reason, test_samples
from launch.demo.stages import Results

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "torch", "numpy")


@dataclass(frozen=True)
class Exported:
    """The Hugging Face folder, and how it compares with transformers."""

    path: str
    status: str
    """passed, failed or skipped."""
    reason: str = ""
    """Why nothing was compared."""
    failures: tuple[str, ...] = ()
    max_abs_logit_diff: float | None = None
    top1_agreement: float | None = None

    @property
    def line(self) -> str:
        if self.status == "skipped":
            return f"written; comparison skipped: {self.reason}"
        if self.status == "failed":
            return f"DIFFERS from transformers: {'; '.join(self.failures)}"
        return f"transformers agrees: logits within {self.max_abs_logit_diff:.1e}, top-1 {self.top1_agreement:.0%}"

    @property
    def fact(self) -> str:
        """The entry in the report's table."""
        if self.status == "skipped":
            return f"not compared: {self.reason}"
        if self.status == "failed":
            return f"FAILED: {'; '.join(self.failures)}"
        return (
            f"{self.status}: largest logit difference {self.max_abs_logit_diff:.1e}, "
            f"top-1 agreement {self.top1_agreement:.1%}"
        )


@dataclass(frozen=True)
class Page:
    """The report."""

    path: str

    @property
    def line(self) -> str:
        return self.path


def finish(chain: Chain, results: Results, seconds: float) -> dict[str, Any]:
    """Export, then write both files. `seconds` are of this process."""
    export = chain.step("export", Exported, lambda: _export(chain))
    runs = {name: read_evaluation(chain.folder / "evaluation" / name) for name in results.scored}
    records = {name: run.records for name, run in runs.items()}
    before = runs[LAST_SUPERVISED + SAMPLED]
    summary = _summary(chain, results, export, seconds) | {
        "grpo_gain": _comparison(compare_runs(runs["grpo" + SAMPLED], before)),
        "control_gain": _comparison(compare_runs(runs["control" + SAMPLED], before)),
        "grpo_gain_greedy": _comparison(compare_runs(runs["grpo"], runs[LAST_SUPERVISED])),
        "image_gain": _comparison(image_gain(runs[LAST_DIRECT], runs[BLIND])),
    }
    groups = {name: scored.summary["groups"] for name, scored in results.scored.items()}
    if "answer_type" in groups["grpo"]:
        summary["accuracy_by_answer_type"] = {name: tables["answer_type"] for name, tables in groups.items()}
    write_json(chain.folder / "summary.json", summary)

    def report() -> Page:
        path = chain.folder / "report.html"
        write_report(_report(chain, results, records, summary, export), path)
        return Page(str(path))

    chain.step("report", Page, report)
    for line in _closing_lines(chain, summary):
        chain.progress.say(line)
    return summary


def _export(chain: Chain) -> Exported:
    config = chain.stage_config("grpo")
    params, metadata = load_params(chain.run_folder("grpo"))
    scored = [chain.folder / "evaluation" / name for name in (LAST_DIRECT, LAST_SUPERVISED, "grpo")]
    card = checkpoint_card(history_of(metadata), scored, COMMERCIAL_USE)
    card = replace(card, title=chain.plan["title"])
    shutil.rmtree(chain.folder / "export", ignore_errors=True)  # left by a run that was stopped before its proof
    with jax.set_mesh(make_mesh(config.mesh)):
        path = Export(params, config.model, chain.tokenizer_folder).write(chain.folder / "export", card=card)
        proof = verify(params, config.model, path, chain.tokenizer_folder)
    if proof["status"] != "passed":
        failures = tuple(proof.get("failures", ()))
        return Exported(str(path), proof["status"], proof.get("reason", ""), failures)
    logits = [case["logits"] for case in proof["cases"]]
    return Exported(
        str(path),
        proof["status"],
        max_abs_logit_diff=max(case["max_abs"] for case in logits),
        top1_agreement=min(case["top1_agreement"] for case in logits),
    )


def _summary(chain: Chain, results: Results, export: Exported, seconds: float) -> dict[str, Any]:
    trained, accuracies = results.trained, {name: scored.accuracy for name, scored in results.scored.items()}
    return {
        "title": chain.plan["title"],
        "stages": [
            {"name": name, **trained[name].facts, "accuracy": accuracies[name], "n": results.scored[name].summary["n"]}
            for name in STAGES
        ],
        "baseline_accuracy": results.baseline,
        "blind_accuracy": accuracies[BLIND],
        "grpo": {
            **trained["grpo"].facts,
            "replies": "sampled at GRPO's temperature, one a question",
            "accuracy_before": accuracies[LAST_SUPERVISED + SAMPLED],
            "accuracy_after": accuracies["grpo" + SAMPLED],
            "accuracy_control": accuracies["control" + SAMPLED],
            "accuracy_before_greedy": accuracies[LAST_SUPERVISED],
            "accuracy_after_greedy": accuracies["grpo"],
        },
        "export": {key: value for key, value in asdict(export).items() if value not in (None, "", ())},
        "skipped": results.data.skipped,
        "seconds_total": sum(wall for wall, _ in chain.costs.values()),
        "seconds_this_process": seconds,
        "peak_memory_bytes": max(peak for _, peak in chain.costs.values()),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "seed": chain.options.seed,
        "source": chain.options.source,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _comparison(c: Comparison) -> dict[str, float]:
    values = {"difference": c.difference, "low": c.low, "high": c.high, "p_value": c.p_value, "n": c.n}
    return values | {"differ": c.only_a + c.only_b}


def _stage(chain: Chain, results: Results, records: dict[str, Sequence[Record]], name: str, title: str) -> Stage:
    trained = results.trained[name]
    return Stage(
        name=name,
        title=title,
        steps=trained.steps,
        tokens=trained.tokens,
        seconds=trained.seconds,
        first=trained.first,
        last=trained.last,
        history=read_metrics(chain.run_folder(name)),
        summary=results.scored[name].summary,
        records=records[name],
    )


def _report(
    chain: Chain, results: Results, records: dict[str, Sequence[Record]], summary: dict[str, Any], export: Exported
) -> Report:
    grpo, gain, control, sight = summary["grpo"], summary["grpo_gain"], summary["control_gain"], summary["image_gain"]
    greedy, n, supervised = summary["grpo_gain_greedy"], gain["n"], results.scored[LAST_DIRECT].accuracy
    return Report(
        title=chain.plan["title"],
        subtitle=f"Seed {summary['seed']}. The whole recipe on a tiny model, in one process on {platform.machine()} "
        f"({jax.device_count()} {jax.devices()[0].platform} device), {clock(summary['seconds_total'])} minutes.",
        questions=f"{n:,} questions of {chain.plan['test']}, greedy replies",
        warnings=[chain.plan["warning"]] if "warning" in chain.plan else [],
        stages=[_stage(chain, results, records, name, title) for name, title in STAGES.items()],
        samples=test_samples(chain),
        baseline=results.baseline,
        blind=summary["blind_accuracy"],
        tiles=[
            (f"{supervised:.1%}", "accuracy after the SFT stages", f"direct answers, {n:,} questions"),
            (f"{results.baseline:.1%}", "majority baseline", "most frequent answer per template"),
            (f"{summary['blind_accuracy']:.1%}", "without the image", f"images add {_points(sight)}"),
            (
                f"{grpo['accuracy_after']:.1%}",
                "accuracy after GRPO",
                f"before: {grpo['accuracy_before']:.1%}, reasoning, sampled",
            ),
            (f"{100 * gain['difference']:+.1f} points", "GRPO's gain", f"p = {gain['p_value']:.1g}, paired"),
        ],
        grpo=_stage(chain, results, records, "grpo", "GRPO"),
        control=_stage(chain, results, records, "control", "Control"),
        grpo_facts=[
            ("reward, first to last tenth", f"{grpo['reward_first']:.3f} → {grpo['reward_last']:.3f}"),
            ("sampled accuracy, GRPO against its start", f"{_points(gain)}, p = {gain['p_value']:.2g}"),
            ("greedy accuracy, GRPO against its start", f"{_points(greedy)}, p = {greedy['p_value']:.2g}"),
            ("sampled accuracy, constant-reward control", f"{_points(control)}, p = {control['p_value']:.2g}"),
        ],
        groups=[
            (f"Accuracy by {label}", label, key)
            for label, key in (
                ("modality", "modality"),
                ("kind of question", "kind"),
                ("question template", "template"),
                ("answer type", "answer_type"),
                ("organ", "organ"),
            )
            if key == "kind" or any(key in record.meta for record in records["grpo"])
        ],
        facts=[
            ("Hugging Face export", export.path),
            ("against transformers", export.fact),
            ("peak memory", f"{summary['peak_memory_bytes'] / GIB:.2f} GiB"),
            ("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items() if v)),
            ("skipped records", "; ".join(f"{n} ({by_reason(r)})" for n, r in summary["skipped"].items()) or "none"),
            ("assess", "skipped: no LLM endpoint is configured"),
        ],
        seed=chain.options.seed,
    )


def _points(c: dict[str, float]) -> str:
    alike = "" if c["differ"] else f", all {c['n']:,} graded alike"
    return f"{100 * c['difference']:+.1f} points [{100 * c['low']:+.1f}, {100 * c['high']:+.1f}]{alike}"


def _closing_lines(chain: Chain, summary: dict[str, Any]) -> list[str]:
    grpo, gain, control, sight = summary["grpo"], summary["grpo_gain"], summary["control_gain"], summary["image_gain"]
    direct = next(stage for stage in summary["stages"] if stage["name"] == LAST_DIRECT)
    lines = [
        f"SFT:  {direct['accuracy']:.1%}; majority answer per template "
        f"{summary['baseline_accuracy']:.1%}; without the image {summary['blind_accuracy']:.1%} ({_points(sight)})",
        f"GRPO: sampled replies {grpo['accuracy_before']:.1%} -> {grpo['accuracy_after']:.1%}, "
        f"{_points(gain)}, p = {gain['p_value']:.2g}; control {_points(control)}; "
        f"greedy replies {_points(summary['grpo_gain_greedy'])}",
    ]
    for kind, final in summary.get("accuracy_by_answer_type", {}).get("grpo", {}).items():
        base = _share_of_majority(chain, kind)
        lines.append(f"{kind}: {final['accuracy']:.1%} of {final['n']} after GRPO; majority baseline {base:.1%}")
    if "warning" in chain.plan:
        lines.append(f"warning: {chain.plan['warning']}")
    return lines


def _share_of_majority(chain: Chain, answer_type: str) -> float:
    return majority_baseline([s for s in test_samples(chain) if s.meta.get("answer_type") == answer_type]).accuracy
