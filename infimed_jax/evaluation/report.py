"""The self-contained HTML page of a run: curves, accuracy by stage and by group, and a gallery of cases."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infimed_jax.data.sample import Question
from infimed_jax.evaluation.run import Record
from infimed_jax.report.page import thumbnail, write_page
from infimed_jax.report.plot import ACCENT, INK, LEGEND, LINE, SECOND, SOFT, THIRD, panels, svg

THUMBNAIL = 192
"""Longest side of a gallery picture, pixels: 315 radiographs at full size would make a page of 17 MB."""


@dataclass(frozen=True)
class Stage:
    """What one stage left behind, as read from its run folder."""

    name: str
    title: str
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: float | None = None
    """Mean loss (reward in GRPO) of the first steps."""
    last: float | None = None
    history: Sequence[dict[str, Any]] = ()
    """Rows of metrics.jsonl."""
    summary: dict[str, Any] = field(default_factory=dict)
    """`Evaluation.summary()`."""
    records: Sequence[Record] = ()


@dataclass(frozen=True)
class Report:
    title: str
    subtitle: str
    questions: str
    """What the accuracy is measured on, as it reads after 'Accuracy is on'."""
    stages: Sequence[Stage]
    samples: Sequence[Question]
    baseline: float
    """Accuracy of the most frequent answer per question template."""
    blind: float | None
    """Accuracy of the last supervised stage without the image."""
    tiles: Sequence[tuple[str, str, str]] = ()
    """(value, label, note)."""
    warnings: Sequence[str] = ()
    grpo: Stage | None = None
    control: Stage | None = None
    grpo_facts: Sequence[tuple[str, str]] = ()
    groups: Sequence[tuple[str, str, str]] = ()
    """Tables of accuracy: (heading, name of the row column, key of `meta` or 'kind')."""
    facts: Sequence[tuple[str, str]] = ()
    cases: int = 12
    seed: int = 0


def write_report(report: Report, path: Path) -> None:
    """`report` as one HTML file without outside references; written whole or not at all."""
    write_page(path, Path(__file__).with_name("report.html.jinja"), _context(report))


def _context(report: Report) -> dict[str, Any]:
    evaluated = [s for s in (*report.stages, *([report.grpo] if report.grpo else [])) if s.records]
    return {
        "title": report.title,
        "subtitle": report.subtitle,
        "questions": report.questions,
        "warnings": report.warnings,
        "tiles": [{"value": v, "label": label, "note": note} for v, label, note in report.tiles],
        "curve_name": "loss (GRPO: reward)" if report.grpo else "loss",
        "stages": [_stage_row(s) for s in (*report.stages, *([report.grpo] if report.grpo else []))],
        "figures": {
            "loss": _loss_figure(report.stages),
            "accuracy": _accuracy_figure(evaluated, report.baseline, report.blind),
            "reward": _reward_figure(report.grpo, report.control) if report.grpo else "",
            "policy": _policy_figure(report.grpo) if report.grpo else "",
        },
        "control_note": " Grey: accuracy under the constant-reward control." if report.control else "",
        "grpo_facts": report.grpo_facts,
        "groups": [_group_table(evaluated, *group) for group in report.groups],
        "cases": _cases(report, evaluated),
        "facts": report.facts,
    }


def _stage_row(stage: Stage) -> dict[str, str]:
    summary = stage.summary
    *_, gain = (None, *(row["image_gain"] for row in stage.history if "image_gain" in row))
    return {
        "title": stage.title,
        "steps": f"{stage.steps:,}",
        "tokens": f"{stage.tokens:,}",
        "seconds": f"{stage.seconds:.0f}",
        "curve": "–" if stage.first is None or stage.last is None else f"{stage.first:.3f} → {stage.last:.3f}",
        "images": "–" if gain is None else f"{gain:+.3f}",
        "accuracy": f"{summary['accuracy']:.1%}" if summary else "–",
        "interval": f"{summary['interval'][0]:.1%} – {summary['interval'][1]:.1%}" if summary else "–",
        "unparsed": f"{summary['unparsed_rate']:.1%}" if summary else "–",
        "truncated": f"{summary['truncated_rate']:.1%}" if summary else "–",
    }


def _loss_figure(stages: Sequence[Stage]) -> Any:
    figure, (axes,) = panels(6.2, 3.1)
    start = 0
    for number, stage in enumerate(stages):
        losses = [(row["step"], row["loss"]) for row in stage.history if row.get("loss") is not None]
        if not losses:
            continue
        axes.plot([start + s for s, _ in losses], [v for _, v in losses], color=ACCENT, linewidth=1.3)
        if number:
            axes.axvline(start, color=LINE, linewidth=0.8, linestyle=":")
        axes.annotate(
            stage.title, (start, 1.0), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=7, color=SOFT, rotation=90, va="top",
        )  # fmt: skip
        start += losses[-1][0]
    axes.set_xlabel("steps over all stages")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.margins(x=0.01)
    return svg(figure)


def _accuracy_figure(stages: Sequence[Stage], baseline: float, blind: float | None) -> Any:
    figure, (axes,) = panels(6.2, 3.1)
    values = [s.summary["accuracy"] for s in stages]
    spread = [
        [v - s.summary["interval"][0] for v, s in zip(values, stages, strict=True)],
        [s.summary["interval"][1] - v for v, s in zip(values, stages, strict=True)],
    ]
    axes.bar(range(len(stages)), values, color=ACCENT, width=0.6)
    axes.errorbar(range(len(stages)), values, yerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
    axes.axhline(baseline, color=SECOND, linestyle="--", linewidth=1.2)
    if blind is not None:
        axes.axhline(blind, color=THIRD, linestyle=":", linewidth=1.4)
    for x, (value, stage) in enumerate(zip(values, stages, strict=True)):
        axes.annotate(f"{value:.0%}", (x, stage.summary["interval"][1]), (0, 3), textcoords="offset points",
                      ha="center", fontsize=8, color=INK)  # fmt: skip
    axes.set_xticks(range(len(stages)), [s.title.replace(" ", "\n") for s in stages], fontsize=7.5)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    return svg(figure)


def _reward_figure(grpo: Stage, control: Stage | None) -> Any:
    figure, (axes,) = panels(6.2, 3.1)
    for key, colour, label in (("reward", ACCENT, "reward"), ("accuracy", SECOND, "accuracy part")):
        rows = [(r["step"], r[key]) for r in grpo.history if r.get(key) is not None]
        axes.plot([s for s, _ in rows], [v for _, v in rows], color=colour, linewidth=1.4, label=label)
    if control:
        # Under the control every reward is 1, so what may or may not move is the accuracy of its replies.
        rows = [(r["step"], r["accuracy"]) for r in control.history if r.get("accuracy") is not None]
        axes.plot([s for s, _ in rows], [v for _, v in rows], color="#9aa7b3", linewidth=1.2, label="control: accuracy")
    axes.legend(**LEGEND)
    axes.set_xlabel("GRPO steps")
    return svg(figure)


def _policy_figure(grpo: Stage) -> Any:
    figure, (axes,) = panels(6.2, 3.1)
    right = axes.twinx()
    right.spines[["top", "left", "bottom"]].set_visible(False)
    right.tick_params(colors=SOFT, labelsize=8.5)
    steps = [r["step"] for r in grpo.history]
    length = axes.plot(steps, [r["response_tokens"] for r in grpo.history], color=ACCENT, linewidth=1.4)
    entropy = right.plot(steps, [r["entropy"] for r in grpo.history], color=SECOND, linewidth=1.4)
    axes.legend([*length, *entropy], ["tokens a reply", "entropy"], **LEGEND)
    axes.set_xlabel("GRPO steps")
    axes.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    return svg(figure)


def _group_table(stages: Sequence[Stage], title: str, label: str, key: str) -> dict[str, Any]:
    """Accuracy of each stage by one property of the questions; cells coloured from 0 to 1."""
    columns: list[dict[str, list[bool]]] = []
    for stage in stages:
        groups: dict[str, list[bool]] = defaultdict(list)
        for record in stage.records:
            groups[record.kind if key == "kind" else record.meta.get(key, "–")].append(record.correct)
        columns.append(groups)
    names = sorted({name for groups in columns for name in groups})
    rows = []
    for name in names:
        cells = [
            _cell(sum(groups[name]) / len(groups[name])) if groups.get(name) else _cell(None) for groups in columns
        ]
        rows.append(
            {"name": name.replace("_", " "), "n": max(len(groups.get(name, ())) for groups in columns), "cells": cells}
        )
    return {"title": title, "label": label, "columns": [s.title for s in stages], "rows": rows}


def _cell(value: float | None) -> dict[str, str]:
    if value is None:
        return {"text": "–", "colour": "var(--card)", "ink": "var(--soft)"}
    light, dark = (238, 245, 245), (11, 110, 117)
    mix = tuple(round(a + (b - a) * value) for a, b in zip(light, dark, strict=True))
    return {"text": f"{value:.0%}", "colour": f"rgb{mix}", "ink": "#fff" if value > 0.55 else INK}


def _cases(report: Report, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    by_stage = [(s.title, {r.id: r for r in s.records}) for s in stages]
    shown = [s for s in report.samples if s.images and all(s.id in records for _, records in by_stage)]
    chosen = random.Random(report.seed).sample(shown, min(report.cases, len(shown)))
    cases = []
    for sample in chosen:
        answers = [
            {"stage": title, "text": _answer(records[sample.id]), "correct": records[sample.id].correct}
            for title, records in by_stage
        ]
        last = by_stage[-1][1][sample.id].reply if by_stage else ""
        options = "".join(f" {chr(65 + i)}. {text};" for i, text in enumerate(sample.options)).rstrip(";")
        cases.append(
            {
                "image": thumbnail(sample.images[0], THUMBNAIL),
                "question": sample.question + options,
                "gold": sample.answer,
                "tags": " · ".join(v for v in (sample.meta.get("modality"), sample.kind.replace("_", " ")) if v),
                "answers": answers,
                "reasoning": last if "<think>" in last else "",
            }
        )
    return cases


def _answer(record: Record) -> str:
    """The answer as parsed; where there is none, what the model said instead, and why it does not count."""
    if record.status == "ok" and record.parsed is not None:
        return record.parsed
    reply = record.reply.strip() or "(empty)"
    return f"{reply if len(reply) <= 60 else reply[:60] + '…'} [{record.status}]"
