"""`compare`: two finished evaluations of the same questions, paired question by question."""

from __future__ import annotations

import argparse
from pathlib import Path

from infimed_jax.errors import UserError
from launch.cli.arguments import add_command


def add(commands: argparse._SubParsersAction) -> None:
    p = add_command(commands, "compare", compare, "Compare two evaluations, paired by question.")
    p.add_argument("a", type=Path, metavar="A", help="an --output folder of `evaluate`")
    p.add_argument("b", type=Path, metavar="B", help="another, of the same sets under the same protocol")


def compare(args: argparse.Namespace) -> None:
    from infimed_jax.evaluation.run import compare_runs, read_evaluation

    sets, others = _sets(args.a), _sets(args.b)
    if sets.keys() != others.keys():
        names = " and ".join(", ".join(name or "one set" for name in each) for each in (sets, others))
        raise UserError(f"{args.a} and {args.b} hold other sets ({names}): compare runs of the same ones")
    for name, folder in sets.items():
        result = compare_runs(read_evaluation(folder), read_evaluation(others[name]))
        print(
            f"{f'{name}: ' if name else ''}A - B = {100 * result.difference:+.1f} points "
            f"[{100 * result.low:+.1f}, {100 * result.high:+.1f}], p = {result.p_value:.2g} by image, "
            f"{result.mcnemar_p:.2g} by McNemar's exact test; right only in A {result.only_a:,}, only in B "
            f"{result.only_b:,} of {result.n:,}; a difference from {100 * result.detectable:.1f} points on would "
            "be found with a chance of 80 %"
        )


def _sets(folder: Path) -> dict[str, Path]:
    """The folders of a run's sets by name; "" for a run of one set. UserError: there is none."""
    if (folder / "summary.json").is_file():
        return {"": folder}
    sets = {file.parent.name: file.parent for file in sorted(folder.glob("*/summary.json"))}
    if not sets:
        raise UserError(f"{folder} holds no finished evaluation: name an --output folder of `evaluate`")
    return sets
