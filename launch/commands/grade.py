"""`grade`: grade replies that carry their own questions, without a model or images."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from launch.cli.arguments import add_command, check_file


def add(commands: argparse._SubParsersAction) -> None:
    p = add_command(commands, "grade", grade, "Grade the replies of a JSON Lines file, without a model or images.")
    p.add_argument("file", type=Path, metavar="FILE.jsonl",
                   help="an object a line: kind, answer, reply; options of a choice; id, question, meta, source, "
                   "benchmark, options_shown and finish where they are known")  # fmt: skip
    p.add_argument("--protocol", default="strict", help="strict, medevalkit-fixed or medevalkit-2025-06 [%(default)s]")
    p.add_argument("--benchmark", default="", metavar="NAME|MODULE|FILE.py",
                   help="whose rules grade every row; see infimed_jax/evaluation/benchmarks "
                   "[each row's benchmark, or its source's]")  # fmt: skip
    p.add_argument("--output", type=Path, required=True, metavar="SCORES.jsonl",
                   help="a line for each row, in order: id where given, correct, status, parsed, rule")  # fmt: skip


def grade(args: argparse.Namespace) -> None:
    from infimed_jax.evaluation.rows import grade_rows
    from infimed_jax.files import open_whole, to_json

    check_file("--output", args.output)
    statuses: Counter[str] = Counter()
    correct = 0
    with open_whole(args.output) as scores:
        for score in grade_rows(args.file, args.protocol, args.benchmark):
            scores.write(to_json(score) + "\n")
            statuses[score["status"]] += 1
            correct += score["correct"]
    rows = statuses.total()
    others = "".join(f"; {status}: {n:,}" for status, n in sorted(statuses.items()) if status != "ok")
    print(f"{args.protocol}: {correct / rows:.1%} of {rows:,} correct{others}")
    print(f"Outputs: {args.output}")
