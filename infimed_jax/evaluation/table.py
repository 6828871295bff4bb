"""Several evaluations of one model as a table: lines for people, `results.json` and `results.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infimed_jax.evaluation.benchmark import MARK, load_marked
from infimed_jax.evaluation.run import Evaluation, Outcome
from infimed_jax.evaluation.statistics import FEW_IMAGES, Accuracy, macro_mean, majority_baseline
from infimed_jax.files import write_json, write_text

MANY = 0.05
"""Share of replies that are none, from which on a warning says so."""
_STATUSES: dict[str, Outcome] = {
    "unparsed": "unparsed",
    "cut": "truncated",
    "unread": "unread",
    "missing": "unanswered",
}


def shown(share: Accuracy) -> str:
    return f"{share.accuracy:.1%} of {share.n:,} [{share.low:.1%}, {share.high:.1%}]"


def score_line(result: Evaluation) -> str:
    """Protocol, accuracy with its interval, the majority baseline, and the shares of replies that are no answer."""
    majority = majority_baseline([record.asked() for record in result.records]).accuracy
    shares = "".join(f"; {name} {share:.1%}" for name, share in _no_answers(result).items() if share)
    return f"{result.terms.protocol}: {shown(result.accuracy)}; majority answer per template {majority:.1%}{shares}"


def _no_answers(result: Evaluation) -> dict[str, float]:
    empty = sum(not record.reply.strip() and record.status != "unanswered" for record in result.records)
    return {"empty": empty / len(result.records)} | {name: result.rate(status) for name, status in _STATUSES.items()}


def warnings(result: Evaluation) -> Iterator[str]:
    """What makes a score worth less than it looks."""
    for name, share in _no_answers(result).items():
        if share >= MANY:
            yield f"{share:.1%} of the replies are {name}: look at them in replies.jsonl before you trust the score"
    if result.accuracy.images < FEW_IMAGES:
        yield f"{result.accuracy.images} distinct images: with fewer than {FEW_IMAGES} an interval says little"
    for mark in sorted({record.meta[MARK] for record in result.records if MARK in record.meta}):
        published = load_marked(mark).questions
        if published and published != (n := sum(record.meta.get(MARK) == mark for record in result.records)):
            yield f"{n:,} questions of {mark}, and {published:,} are published: the score is not comparable"


def published_scores(result: Evaluation) -> dict[str, float]:
    """Published accuracy by model, of the one benchmark that all questions belong to, under the same protocol."""
    marks = {record.meta.get(MARK, "") for record in result.records}
    if len(marks) != 1 or not (mark := marks.pop()):
        return {}
    return dict(load_marked(mark).published.get(result.terms.protocol, {}))


def macro_line(results: Mapping[str, Evaluation]) -> str:
    """The plain mean of the sets' accuracies; of MMMU under a compatibility protocol also without its open questions,
    which are never right there."""
    mean, low, high = macro_mean([result.accuracy for result in results.values()])
    return f"mean of {len(results)}: {mean:.1%} [{low:.1%}, {high:.1%}]"


def write_results(
    folder: Path, results: Mapping[str, Evaluation], provenance: Mapping[str, Any], judged: Mapping[str, Any]
) -> None:
    """`results.json` with every summary, what a judge said of its open questions, the mean, a model-index block and
    `provenance`; `results.csv`, a set a row."""
    mean, low, high = macro_mean([result.accuracy for result in results.values()])
    values = {
        "mean": {"of": len(results), "accuracy": mean, "interval": [low, high]},
        "sets": {
            name: result.summary() | ({"judge": judged[name]} if name in judged else {})
            for name, result in results.items()
        },
        "provenance": dict(provenance),
        "model_index": [_index_entry(name, result) for name, result in results.items()],
    }
    write_json(folder / "results.json", values)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("set", "protocol", "n", "images", "accuracy", "low", "high", *_STATUSES, "fingerprint"))
    for name, result in results.items():
        share = result.accuracy
        figures = (f"{x:.6f}" for x in (share.accuracy, share.low, share.high, *map(result.rate, _STATUSES.values())))
        rows.writerow((name, result.terms.protocol, share.n, share.images, *figures, result.fingerprint))
    write_text(folder / "results.csv", table.getvalue())


def _index_entry(name: str, result: Evaluation) -> dict[str, Any]:
    """A result as the metadata of a model card on the hub has it (`model-index`)."""
    metric = {"type": "accuracy", "value": result.accuracy.accuracy, "name": f"accuracy, {result.terms.protocol}"}
    return {
        "task": {"type": "visual-question-answering"},
        "dataset": {"name": name, "type": name},
        "metrics": [metric],
    }
