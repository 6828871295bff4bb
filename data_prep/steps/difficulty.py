"""`difficulty`: the dataset of the RL candidates that a checkpoint gets right at times (infimed_jax.rl.difficulty)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_prep.steps.step import (
    MAX_BAD_RECORDS,
    UNREADABLE_RECORDS,
    NoSamples,
    counted,
    finished_report,
    make_at_once,
    readable,
    refuse_damage,
    refuse_other_files,
)
from infimed_jax import config
from infimed_jax.data.storage import Samples
from infimed_jax.data.training import open_for_training
from infimed_jax.data.views import Choice
from infimed_jax.errors import UserError
from infimed_jax.progress import Report
from infimed_jax.report.plot import ACCENT, INK, LEGEND, PALE, panels, save
from infimed_jax.rl.difficulty import Plan, choose, count_right
from infimed_jax.rl.rollout import Questions, questions
from infimed_jax.rl.step import rollout_sampling
from infimed_jax.sampling.policy import Policy

VERSION = 1


def measure(
    folder: Path,
    output: Path,
    plan: Plan,
    *,
    policy: Policy,
    checkpoint: str,
    max_bad_records: float = MAX_BAD_RECORDS,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Answer every candidate `plan.draws` times, write the view `output` of those kept, and return the report.

    `checkpoint` names the policy's weights: other weights are another measurement. Beside `output` stand `output.json`
    (the report), `output.png` (the histogram), and `output.parts/`, from which a stopped run continues.
    Raises UserError where nothing can be asked or nothing is kept.
    """
    dataset, cfg, tokenizer = open_for_training(folder), policy.config, policy.tokenizer
    unreadable: list[str] = []
    numbers = [number for number, _ in readable(dataset, range(len(dataset)), unreadable)]
    refuse_damage(unreadable, len(dataset), max_bad_records)
    pool = questions((dataset[number] for number in numbers), tokenizer, cfg)
    pool = replace(pool, numbers=np.array(numbers)[pool.numbers])  # their places in the dataset again
    pixels = [list(array.shape) for array in jax.tree.leaves(cfg.model.blank_image())]
    measured = {
        "version": VERSION,
        "from": dataset.fingerprint,
        "checkpoint": checkpoint,
        "tokenizer": tokenizer.fingerprint,
        "draws": plan.draws,
        "seed": plan.seed,
        "settings": config.to_dict(rollout_sampling(cfg)) | {"pixels": pixels},
    }
    recipe = measured | {"plan": vars(plan)}
    finished = finished_report(output, recipe)
    if finished is not None:
        return finished
    refuse_other_files(output, [folder])
    parts = output.with_name(f"{output.name}.parts")
    right = count_right(dataset, pool, policy, plan, parts, measured, on_progress)
    kept = choose(right, plan)
    report = {
        "from": str(folder),
        "checkpoint": checkpoint,
        "plan": vars(plan),
        "questions": len(right),
        "left_out": counted(dict(pool.dropped), unreadable),
        UNREADABLE_RECORDS: unreadable,
        "mean_right": float(right.mean() / plan.draws),
        f"pass_at_{plan.draws}": float((right > 0).mean()),
        "histogram": np.bincount(right, minlength=plan.draws + 1).tolist(),
        "kept_of": np.bincount(right[kept], minlength=plan.draws + 1).tolist(),
        "right": {dataset[n].id: int(r) for n, r in zip(pool.numbers, right, strict=True)},
    }
    if jax.process_index() != 0:
        return report
    draw_histogram(report, output.with_name(f"{output.name}.png"))

    try:
        return make_at_once(
            output,
            name="difficulty",
            recipe=recipe,
            origin=dataset,
            samples=_marked(dataset, pool, right, kept, plan),
            view=True,
            report=report,
        )
    except NoSamples as error:
        raise UserError(f"none of {len(right)} questions is kept: raise --between or --extreme") from error


def _marked(dataset: Samples, pool: Questions, right: np.ndarray, kept: np.ndarray, plan: Plan) -> Iterator[Choice]:
    for place in kept:
        number = int(pool.numbers[place])
        yield Choice(0, number, *dataset.read(number), {"right_of_draws": f"{right[place]}/{plan.draws}"})


def draw_histogram(report: dict[str, Any], path: Path) -> None:
    """`histogram` as PNG."""
    save(histogram(report), path)


def histogram(report: dict[str, Any]) -> Any:
    """matplotlib's Figure of the questions by their number of right answers, and of how many of them are kept."""
    counts, kept = report["histogram"], report["kept_of"]
    figure, (axes,) = panels(max(7.0, 0.75 * len(counts)), 3.8)  # room for 99,999 on each bar
    axes.bar(range(len(counts)), counts, color=PALE, label="measured", width=0.8)
    axes.bar(range(len(counts)), kept, color=ACCENT, label="kept", width=0.8)
    for place, (count, some) in enumerate(zip(counts, kept, strict=True)):
        text = f"{some:,}\nof {count:,}"
        axes.annotate(text, (place, count), ha="center", va="bottom", fontsize=8, color=INK)
    axes.set_xticks(range(len(counts)))
    axes.set_xlabel(f"right answers of {len(counts) - 1}")
    axes.set_ylabel("questions")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.16)
    axes.set_title("Difficulty of the candidates", loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.legend(**LEGEND, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    return figure
