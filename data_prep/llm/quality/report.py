"""What the ratings of a source amount to, the decision on it, and the page that shows both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.llm.quality.parse import Outcome
from data_prep.llm.quality.rubric import DIMENSIONS, KEYS, OVERALL
from infimed_jax.report.page import write_page
from infimed_jax.report.plot import INK, SOFT, panels, svg

SCORES = (1, 2, 3, 4, 5)
COLOURS = ("#b5483a", "#e2a08a", "#d9d9d4", "#8fbfc0", "#0b6e75")
"""Colours of scores 1 to 5: diverging, so that a bar's balance shows at once."""


def summarise(
    outcomes: Sequence[Outcome], sizes: dict[str, int], threshold: float, least_rated: float
) -> dict[str, dict[str, Any]]:
    """By source: how many were rated, each dimension's distribution and mean, what had no rating and why, and `keep`.

    Means are over ratings alone: a missing one is not a zero. `keep` is None where fewer than `least_rated` of the
    drawn samples have one, for those that fail are hardly a random part.
    """
    rows = {}
    for source, size in sizes.items():
        own = [outcome for outcome in outcomes if outcome.source == source]
        ratings = [outcome.rating for outcome in own if outcome.rating is not None]
        dimensions = {key: _distribution([rating[key].score for rating in ratings]) for key in KEYS}
        keep, reason = _decide(dimensions[OVERALL], len(own), threshold, least_rated)
        rows[source] = {
            "keep": keep,
            "reason": reason,
            "mean_overall": dimensions[OVERALL]["mean"],
            "n": len(ratings),
            "drawn": len(own),
            "samples": size,
            "unrated": dict(sorted(Counter(outcome.reason for outcome in own if outcome.rating is None).items())),
            "cut": sum(outcome.cut for outcome in own),
            "dimensions": dimensions,
        }
    return rows


def _distribution(scores: Sequence[int]) -> dict[str, Any]:
    """Counts of 1 to 5, mean, and its 95 % interval (normal approximation); null where nothing was rated."""
    n = len(scores)
    mean = sum(scores) / n if n else None
    interval = None
    if mean is not None and n > 1:
        error = math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n)
        interval = [max(1.0, mean - 1.96 * error), min(5.0, mean + 1.96 * error)]
    return {"counts": [scores.count(score) for score in SCORES], "mean": mean, "interval": interval}


def _decide(overall: dict[str, Any], drawn: int, threshold: float, least_rated: float) -> tuple[bool | None, str]:
    n = sum(overall["counts"])
    if n == 0 or n < least_rated * drawn:
        return None, f"only {n} of {drawn} samples could be rated"
    mean, interval = overall["mean"], overall["interval"]
    keep = mean >= threshold
    reason = f"mean Overall {mean:.2f} is {'at least' if keep else 'below'} {threshold:g}"
    if interval is not None and interval[0] < threshold <= interval[1] and interval[0] < interval[1]:
        reason += f", but its 95 % interval [{interval[0]:.2f}, {interval[1]:.2f}] holds both"
    return keep, reason


def write_assessment(path: Path, assessment: dict[str, Any]) -> None:
    """The assessment as one HTML file without outside references; written whole or not at all."""
    sources, account = assessment["sources"], assessment["account"]
    spent = account["spent"]
    values = {
        "plan": assessment["plan"],
        "keys": KEYS,
        "names": [d.key if not d.other_key else f"{d.key} / {d.other_key.split()[0]}" for d in DIMENSIONS],
        "sources": [(name, row, [_mean(row["dimensions"][key]) for key in KEYS]) for name, row in sources.items()],
        "figure": _picture(sources),
        "unreadable": len(assessment["unreadable_records"]),
        "account": account,
        "tokens": f"{spent['prompt_tokens']:,} prompt and {spent['reply_tokens']:,} reply tokens",
        "cost": f"{spent['cost']:.4f}" if spent["cost"] else "no prices given",
    }
    write_page(path, Path(__file__).with_name("report.html.jinja"), values)


def _mean(distribution: dict[str, Any]) -> str:
    return "–" if distribution["mean"] is None else f"{distribution['mean']:.2f}"


def _picture(sources: dict[str, dict[str, Any]]) -> Any:
    """A panel a dimension, a bar a source, divided by the share of each score."""
    names = list(sources)
    height = 0.34 * len(names) + 0.75
    figure, drawn = panels(11.5, 2 * height + 0.7, 2, 3, sharex=True, sharey=True)
    for panel, dimension in zip(drawn, DIMENSIONS, strict=True):
        for row, name in enumerate(names):
            _bar(panel, row, sources[name]["dimensions"][dimension.key])
        title = dimension.key if not dimension.other_key else f"{dimension.key} / {dimension.other_key.split()[0]}"
        panel.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
        panel.set_xlim(0, 1.16)
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.set_yticks(range(len(names)), [_label(name, sources[name]) for name in names], fontsize=9, color=INK)
        panel.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"], fontsize=8, color=SOFT)
        panel.tick_params(length=0)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
    handles = [drawn[0].barh(0, 0, color=colour) for colour in COLOURS]
    labels = [f"score {score}" for score in SCORES]
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return svg(figure)


def _bar(panel: Any, row: int, distribution: dict[str, Any]) -> None:
    n = sum(distribution["counts"])
    if not n:
        panel.text(0.01, row, "no rating", va="center", fontsize=8, color=SOFT)
        return
    start = 0.0
    for score, (count, colour) in enumerate(zip(distribution["counts"], COLOURS, strict=True), start=1):
        share = count / n
        panel.barh(row, share, left=start, color=colour, height=0.72, edgecolor="white", linewidth=0.6)
        if share >= 0.09:
            ink = "white" if score in (1, 5) else INK
            panel.text(start + share / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=7.5, color=ink)
        start += share
    panel.text(1.02, row, f"{distribution['mean']:.2f}", va="center", fontsize=8.5, color=INK)


def _label(name: str, row: dict[str, Any]) -> str:
    return f"{name} (n = {row['n']})"
