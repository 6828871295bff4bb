"""The page of an evaluation: every set's score beside published ones, accuracy by group, and cases to look through."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infimed_jax.evaluation.answers import after_thinking
from infimed_jax.evaluation.run import Evaluation, Record
from infimed_jax.evaluation.statistics import Accuracy, macro_mean, majority_baseline
from infimed_jax.evaluation.table import published_scores, warnings
from infimed_jax.report.page import thumbnail, write_page
from infimed_jax.report.plot import ACCENT, INK, LEGEND, SECOND, panels, svg

CASES = 40
"""Cases of a set; with pictures of SIDE pixels, seven sets make a page of about 3 MB."""
SIDE = 192
LONGEST = 1500
"""Characters of a reply, or of its thoughts, that the page shows."""
FEW = 10
"""A group of fewer questions is marked."""


def draw_cases(result: Evaluation, seed: int = 0, cases: int = CASES) -> list[Record]:
    """Records of every kind, right and wrong alike, in turn, each drawn by chance."""
    strata: dict[tuple[str, bool], list[Record]] = defaultdict(list)
    for record in result.records:
        strata[record.kind, record.correct].append(record)
    draws = random.Random(seed)
    shuffled = [draws.sample(members, len(members)) for _, members in sorted(strata.items())]
    turns = (members[turn] for turn in range(max(map(len, shuffled))) for members in shuffled if turn < len(members))
    return [record for record, _ in zip(turns, range(cases), strict=False)]


def write_evaluation_page(
    path: Path,
    results: Mapping[str, Evaluation],
    judged: Mapping[str, Any],
    images: Mapping[str, bytes],
    facts: Mapping[str, Any],
) -> None:
    """`results` and `judged` by set; `images` by the id of a drawn case, none of those that may not be shown; `facts`
    say where the scores come from."""
    sets = [_set(name, result, judged.get(name)) for name, result in results.items()]
    cases = [_case(name, record, images) for name, result in results.items() for record in draw_cases(result)]
    mean, low, high = macro_mean([result.accuracy for result in results.values()])
    first = next(iter(results.values()))
    values = {
        "title": f"Evaluation of {first.name}",
        "protocol": first.terms.protocol,
        "mean": f"{mean:.1%} [{low:.1%}, {high:.1%}]" if len(results) > 1 else "",
        "sets": sets,
        "figure": _bars(results),
        "warnings": [f"{name}: {words}" for name, result in results.items() for words in warnings(result)],
        "groups": [table for name, result in results.items() for table in _groups(name, result)],
        "cases": cases,
        "left_out": sum(case["image"] is None for case in cases),
        "kinds": sorted({case["kind"] for case in cases}),
        "facts": [(name.replace("_", " "), _plain(value)) for name, value in facts.items()],
    }
    write_page(path, Path(__file__).with_name("page.html.jinja"), values)


def _set(name: str, result: Evaluation, judged: Mapping[str, Any] | None) -> dict[str, Any]:
    share = result.accuracy
    majority = majority_baseline([record.asked() for record in result.records]).accuracy
    judge = judged and judged.get("accuracy")
    return {
        "name": name,
        "n": f"{share.n:,}",
        "images": f"{share.images:,}",
        "accuracy": f"{share.accuracy:.1%}",
        "interval": f"{share.low:.1%} – {share.high:.1%}",
        "majority": f"{majority:.1%}",
        "judge": "–" if judge is None else f"{judge:.1%}",
        "no_answer": f"{sum(record.status != 'ok' for record in result.records) / share.n:.1%}",
        "published": ", ".join(f"{model} {value:.1%}" for model, value in published_scores(result).items()) or "–",
    }


def _bars(results: Mapping[str, Evaluation]) -> Any:
    figure, (axes,) = panels(7.4, 0.8 + 0.42 * len(results))
    places = range(len(results))
    shares = [result.accuracy for result in results.values()]
    axes.barh(places, [share.accuracy for share in shares], color=ACCENT, height=0.5)
    for place, share in zip(places, shares, strict=True):
        axes.plot((share.low, share.high), (place, place), color=INK, linewidth=1.4)
    for place, result in zip(places, results.values(), strict=True):
        for value in published_scores(result).values():
            axes.plot(value, place, marker="D", color=SECOND, markersize=5, linestyle="none")
    if any(map(published_scores, results.values())):
        axes.plot([], [], marker="D", color=SECOND, linestyle="none", label="published")
        axes.legend(**LEGEND)
    axes.set(yticks=list(places), yticklabels=[name[:40] for name in results], xlim=(0, 1))
    axes.set_xlabel("accuracy, with its 95 % interval")
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a folder's name may hold "$"
    axes.invert_yaxis()
    return svg(figure)


def _groups(name: str, result: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "title": f"{name} by {grouping.replace('_', ' ')}",
            "rows": [_cell(value, share) for value, share in table.items()],
        }
        for grouping, table in result.groups().items()
        if len(table) > 1
    ]


def _cell(value: str, share: Accuracy) -> dict[str, Any]:
    return {
        "value": value,
        "n": f"{share.n:,}",
        "accuracy": f"{share.accuracy:.1%}",
        "width": round(100 * share.accuracy, 1),
        "interval": f"{share.low:.1%} – {share.high:.1%}",
        "few": share.n < FEW,
    }


def _case(name: str, record: Record, images: Mapping[str, bytes]) -> dict[str, Any]:
    answer = after_thinking(record.reply)
    thoughts = record.reply[: len(record.reply) - len(answer)] if answer is not None else ""
    return {
        "set": name,
        "id": record.id,
        "kind": record.kind,
        "verdict": "right" if record.correct else "wrong",
        "status": record.status,
        "question": record.question,
        "options": list(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", record.options, strict=False)),
        "gold": " or ".join((record.answer, *record.alternatives)),
        "reply": _short(record.reply if answer is None else answer),
        "thoughts": _short(thoughts.removesuffix("</think>").replace("<think>", "", 1).strip()),
        "rule": record.rule,
        "image": thumbnail(images[record.id], SIDE) if record.id in images else None,
    }


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters)"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
