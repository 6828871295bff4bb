"""`data filter`, `decontaminate`, `mix` and `copy`: from prepared datasets to the one a stage trains on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.cli.arguments import add_command
from launch.cli.declare import add_fields, build
from launch.cli.progress import progress_bar
from launch.commands.data.engines import add_engine, add_max_bad_records, engine_of


def add(steps: argparse._SubParsersAction) -> None:
    p = add_command(steps, "filter", filter_, "Leave out poor sources, refusals, degenerate text, small images.")
    _add_folders(p)
    p.add_argument("--assessment", type=Path, help="the JSON decision of `data assess` [no source is left out]")
    add_fields(p, "data_prep.steps.filter:Rules", ("min_image_side",))
    p.add_argument(
        "--language", action="append", default=[], help="language to keep, such as en or zh; repeatable [all]"
    )
    p.add_argument("--keep-refusals", action="store_true", help="do not leave out refusing replies")
    p = add_command(steps, "decontaminate", decontaminate_, "Leave out images and questions of test sets.")
    _add_folders(p)
    p.add_argument("--test", type=Path, action="append", default=[], help="a prepared test set, repeatable")
    p = add_command(steps, "mix", mix_, "Mix prepared datasets to one, by a stage's mixture file.")
    p.add_argument("--mixture", type=Path, required=True, help="a YAML file, such as configs/mixtures/pretrain.yaml")
    p.add_argument("--data", type=Path, required=True, help="the folder that holds the datasets the file names")
    p.add_argument("--output", type=Path, required=True, help="folder of the new one; OUTPUT.json is the report")
    p.add_argument("--seed", type=int, default=0, help="seed of the draw and the order [%(default)s]")
    p.add_argument("--skip-missing", action="store_true", help="leave out missing datasets, and report them")
    add_max_bad_records(p)
    add_engine(p)
    p = add_command(steps, "copy", copy_, "Copy a dataset or view to one that needs no other folder.")
    _add_folders(p)


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help="a prepared dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new one; OUTPUT.json is the report")
    add_max_bad_records(parser)
    add_engine(parser)


def filter_(args: argparse.Namespace) -> None:
    from data_prep.steps.filter import Rules, assessed_sources, filter_dataset

    excluded, kept = assessed_sources(args.assessment) if args.assessment else ((), ())
    given = {"refusals": not args.keep_refusals, "languages": tuple(args.language), "excluded": excluded, "kept": kept}
    rules = build(Rules, args, given=given)
    with progress_bar("filter") as bar:
        report = filter_dataset(
            args.input,
            args.output,
            rules,
            engine=engine_of(args),
            max_bad_records=args.max_bad_records,
            on_progress=bar,
        )
    _print_removed(report)
    if report["not_assessed"]:
        print(f"warning: {args.assessment} decides nothing on {', '.join(report['not_assessed'])}, so it was kept: "
              "`data assess` it too")  # fmt: skip
    print(f"Outputs: {args.output}, {args.output}.json")


def decontaminate_(args: argparse.Namespace) -> None:
    from data_prep.steps.decontaminate import decontaminate

    with progress_bar("decontaminate") as bar:
        report = decontaminate(
            args.input,
            args.test,
            args.output,
            engine=engine_of(args),
            max_bad_records=args.max_bad_records,
            on_progress=bar,
        )
    _print_removed(report)
    affected = report["affected_counts"]
    print(f"{affected['any']:,} of {report['test_samples']:,} test questions are affected: {affected['image']:,} by "
          f"image, {affected['question']:,} by question, {affected['both']:,} by both")  # fmt: skip
    print(f"Outputs: {args.output}, {args.output}.json")


def mix_(args: argparse.Namespace) -> None:
    from data_prep.steps.mix import load_mixture, mix
    from data_prep.steps.step import UNREADABLE_RECORDS

    mixture, missing = load_mixture(args.mixture, args.data, args.skip_missing)
    with progress_bar("mix") as bar:
        report = mix(
            mixture.parts,
            args.output,
            args.seed,
            balance=mixture.balance,
            engine=engine_of(args),
            max_bad_records=args.max_bad_records,
            on_progress=bar,
        )
    _print_parts(report)
    if lost := report[UNREADABLE_RECORDS]:
        print(f"unreadable records, left out: {len(lost):,} ({', '.join(lost[:3])}{', …' if len(lost) > 3 else ''})")
    for folder in missing:
        print(f"missing, so left out: {folder}")
    print(f"Outputs: {args.output}, {args.output}.json")


def copy_(args: argparse.Namespace) -> None:
    from data_prep.steps.copy import copy_dataset

    with progress_bar("copy") as bar:
        report = copy_dataset(
            args.input,
            args.output,
            engine=engine_of(args),
            max_bad_records=args.max_bad_records,
            on_progress=bar,
        )
    print(f"{report['samples']:,} samples copied")
    print(f"Outputs: {args.output}, {args.output}.json")


def _print_removed(report: dict[str, Any]) -> None:
    print(f"{report['samples']:,} of {report['read']:,} samples stay")
    for reason, count in report["removed"].items():
        print(f"  left out, {reason}: {count:,}")


def _print_parts(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for header in ("dataset", "group", "licence"):  # a name that is cut does not say what came from where
        table.add_column(header, overflow="fold")
    for header in ("samples", "taken", "share of the mixture"):
        table.add_column(header, justify="right")
    for row in report["parts"]:
        sources = sorted({origin.partition("/")[0] for origin in row["origins"]})
        licences = ", ".join(sorted({report["licences"][name] for name in sources}))
        share = row["taken"] / report["samples"]
        table.add_row(row["folder"], row["group"], licences, f"{row['samples']:,}", f"{row['taken']:,}", f"{share:.1%}")
    table.add_section()
    table.add_row("in all", "", "", "", f"{report['samples']:,}", "")
    Console().print(table)
