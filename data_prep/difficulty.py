"""`difficulty`: how often a checkpoint answers each RL candidate, and which candidates are worth training on.

A group that is all right or all wrong teaches nothing. As in the authors' later report: eight answers a question, those
with 3 to 5 right are kept, those with none or all thinned out. What becomes of the rest is not published: a setting.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_prep.steps import (
    MAX_BAD_RECORDS,
    UNREADABLE_RECORDS,
    NoSamples,
    counted,
    finished_report,
    make_from_stream,
    readable,
    refuse_damage,
    refuse_other_files,
)
from infimed_jax import config
from infimed_jax.data.sample import Sample
from infimed_jax.data.storage import Samples
from infimed_jax.data.training import open_for_training
from infimed_jax.errors import UserError
from infimed_jax.files import to_json, write_json
from infimed_jax.progress import Report
from infimed_jax.rl.reward import Attempt
from infimed_jax.rl.rewards.verifiable import score
from infimed_jax.rl.rollout import Questions, questions
from infimed_jax.rl.step import rollout_sampling
from infimed_jax.sampling.policy import Policy

VERSION = 1
CHUNK = 256
"""Questions whose answers are drawn and kept together: what a stopped run loses at most."""


@dataclass(frozen=True)
class Plan:
    """Which questions are kept, by how many of their sampled answers are right."""

    draws: int = 8
    """Answers sampled for a question."""
    low: int = 3
    """Fewest right answers of a question that is always kept."""
    high: int = 5
    """Most right answers of a question that is always kept."""
    between: float = 0.5
    """Share kept of questions outside that range with some right and some wrong answers; our choice."""
    extreme: float = 0.1
    """Share kept of questions with no or only right answers; our choice."""
    seed: int = 0
    """Seed of sampling and selection."""

    def __post_init__(self) -> None:
        if self.draws < 2 or not 0 < self.low <= self.high < self.draws:
            raise UserError(
                f"of {self.draws} draws, {self.low} to {self.high} cannot be kept: 0 < low <= high < draws must hold"
            )
        if not (0 <= self.extreme <= 1 and 0 <= self.between <= 1):
            raise UserError("the shares kept must lie in [0, 1]")
        if self.seed < 0:
            raise UserError(f"the seed must not be negative, not {self.seed}")

    def share(self, right: int) -> float:
        """Of the questions with so many right answers, how many are kept."""
        if self.low <= right <= self.high:
            return 1.0
        return self.extreme if right in (0, self.draws) else self.between


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
    """Answer every candidate `plan.draws` times, write the dataset `output` of those kept, and return the report.

    Answers are asked for and rewarded as in GRPO, at `grpo.temperature`. `checkpoint` names the policy's weights: other
    weights are another measurement. Beside `output`:
    `output.json` (the report), `output.png` (the histogram), and `output.parts/`, from which a stopped run goes on.
    UserError: nothing can be asked, or nothing is kept.
    """
    dataset, cfg, tokenizer = open_for_training(folder), policy.config, policy.tokenizer
    unreadable: list[str] = []
    numbers = [number for number, _ in readable(dataset, range(len(dataset)), unreadable)]
    refuse_damage(unreadable, len(dataset), max_bad_records)
    found = questions((dataset[number] for number in numbers), tokenizer, cfg)
    found = replace(found, numbers=np.array(numbers)[found.numbers])  # their places in the dataset again
    measured = {
        "version": VERSION,
        "from": dataset.fingerprint,
        "checkpoint": checkpoint,
        "tokenizer": tokenizer.fingerprint,
        "draws": plan.draws,
        "seed": plan.seed,
        "settings": config.to_dict(rollout_sampling(cfg)) | {"image_size": cfg.model.vision.image_size},
    }
    recipe = measured | {"plan": vars(plan)}
    finished = finished_report(output, recipe)
    if finished is not None:
        return finished
    refuse_other_files(output, [folder])
    right = _measure_all(dataset, found, output, plan, policy, measured, on_progress)
    kept = choose(right, plan)
    report = {
        "from": str(folder),
        "checkpoint": checkpoint,
        "plan": vars(plan),
        "questions": len(right),
        "left_out": counted(dict(found.dropped), unreadable),
        UNREADABLE_RECORDS: unreadable,
        "mean_right": float(right.mean() / plan.draws),
        f"pass_at_{plan.draws}": float((right > 0).mean()),
        "histogram": np.bincount(right, minlength=plan.draws + 1).tolist(),
        "kept_of": np.bincount(right[kept], minlength=plan.draws + 1).tolist(),
        "right": {dataset[n].id: int(r) for n, r in zip(found.numbers, right, strict=True)},
    }
    if jax.process_index() != 0:
        return report
    draw_histogram(report, output.with_name(f"{output.name}.png"))

    try:
        return make_from_stream(
            output,
            name="difficulty",
            recipe=recipe,
            origin=dataset,
            samples=_marked(dataset, found, right, kept, plan),
            report=report,
        )
    except NoSamples as error:
        raise UserError(f"none of {len(right)} questions is kept: raise --between or --extreme") from error


def _measure_all(
    dataset: Samples,
    found: Questions,
    output: Path,
    plan: Plan,
    policy: Policy,
    measured: dict[str, Any],
    on_progress: Report | None,
) -> np.ndarray:
    """i64[n]: right answers of each question; a chunk that an earlier run has measured is read back."""
    identity = hashlib.sha256(to_json([measured, found.fingerprint, CHUNK], sort_keys=True).encode()).hexdigest()
    parts = output.with_name(f"{output.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    counts: list[int] = []
    for start in range(0, len(found.numbers), CHUNK):
        asked = [dataset[number] for number in found.numbers[start : start + CHUNK]]
        file = parts / f"{identity[:16]}-{start:09d}.json"
        chunk = _finished(file, asked)
        if chunk is None:

            def report(done: int, total: int, note: str, start: int = start) -> None:
                if on_progress is not None:
                    now = start + done / plan.draws
                    on_progress(int(now), len(found.numbers), f"{int(now):,}/{len(found.numbers):,} questions")

            chunk = _answer(asked, start, found.longest, plan, policy, report)
            if jax.process_index() == 0:
                write_json(file, {"right": {sample.id: n for sample, n in zip(asked, chunk, strict=True)}})
        counts += chunk
    return np.array(counts)


def _finished(file: Path, asked: Sequence[Sample]) -> list[int] | None:
    try:
        right = json.loads(file.read_text(encoding="utf-8"))["right"]
        return [int(right[sample.id]) for sample in asked]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answer(
    asked: Sequence[Sample],
    start: int,
    longest: int,
    plan: Plan,
    policy: Policy,
    on_progress: Report,
) -> list[int]:
    """Right answers of each question. What is drawn depends on the seed and the chunk's place alone."""
    cfg = policy.config
    prompts = [prompt for prompt in policy.prompts(asked, reasoning=True) for _ in range(plan.draws)]
    key = jax.random.fold_in(jax.random.key(plan.seed), start)
    completions = policy.answer(prompts, rollout_sampling(cfg), key, longest=longest, on_progress=on_progress)
    right = [0] * len(asked)
    for number, completion in enumerate(completions):
        place = number // plan.draws
        reply = policy.tokenizer.decode(completion.text_tokens)
        attempt = Attempt(asked[place], reply, completion.finish == "stop")
        right[place] += score(attempt, cfg.grpo).parts["accuracy"] == 1.0
    return right


def choose(right: np.ndarray, plan: Plan) -> np.ndarray:
    """i64: places of the questions that are kept, ascending; of each count its share, rounded, drawn by the seed."""
    kept = []
    for count in range(plan.draws + 1):
        places = np.flatnonzero(right == count)
        order = np.random.default_rng([plan.seed, count]).permutation(len(places))
        kept.append(places[order[: round(plan.share(count) * len(places))]])
    return np.sort(np.concatenate(kept))


def _marked(dataset: Samples, found: Questions, right: np.ndarray, kept: np.ndarray, plan: Plan) -> Iterator[Sample]:
    for place in kept:
        sample = dataset[found.numbers[place]]
        yield replace(sample, meta=sample.meta | {"right_of_draws": f"{right[place]}/{plan.draws}"})


def draw_histogram(report: dict[str, Any], path: Path) -> None:
    """`histogram` as PNG."""
    part = path.with_name(f".{path.name}.part")
    histogram(report).savefig(part, format="png", dpi=120)
    part.replace(path)


def histogram(report: dict[str, Any]) -> Any:
    """matplotlib's Figure of the questions by their number of right answers, and of how many of them are kept."""
    from matplotlib.figure import Figure

    counts, kept = report["histogram"], report["kept_of"]
    figure = Figure(figsize=(max(7.0, 0.75 * len(counts)), 3.8), layout="constrained")  # room for 99,999 on each bar
    axes = figure.subplots()
    axes.bar(range(len(counts)), counts, color="#d3dde0", label="measured", width=0.8)
    axes.bar(range(len(counts)), kept, color="#0b6e75", label="kept", width=0.8)
    for place, (count, some) in enumerate(zip(counts, kept, strict=True)):
        text = f"{some:,}\nof {count:,}"
        axes.annotate(text, (place, count), ha="center", va="bottom", fontsize=8, color="#1c2733")
    axes.set_xticks(range(len(counts)))
    axes.set_xlabel(f"right answers of {len(counts) - 1}", color="#5b6b7b")
    axes.set_ylabel("questions", color="#5b6b7b")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.16)
    axes.set_title("Difficulty of the candidates", loc="left", fontsize=11, fontweight="bold", color="#1c2733")
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
