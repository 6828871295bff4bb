"""`data sources` and `data ingest`: the list of sources, and from their own files to prepared datasets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from infimed_jax.errors import UserError
from launch.cli.arguments import add_command
from launch.cli.progress import progress_bar
from launch.commands.data.engines import add_engine, engine_of


def add(steps: argparse._SubParsersAction) -> None:
    p = add_command(steps, "sources", sources, "List the sources with licence, size and layout.")
    p.add_argument("--source", help="show one source, with its layout, columns and options")
    _add_adapter(p)
    p.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    p = add_command(steps, "ingest", ingest, "Convert one source to prepared datasets, one for each split.")
    p.add_argument("--source", default="", help="a name that `data sources` lists; [with --adapter: its only one]")
    _add_adapter(p)
    p.add_argument("--input", type=Path, required=True, help="the folder with the source's own files")
    p.add_argument("--output", type=Path, required=True, help="folder of the prepared datasets")
    p.add_argument("--split", action="append", help="a split, repeatable [all that have files]")
    p.add_argument(
        "--name", help="how ids and samples name their source, for several inputs of one [the source's name]"
    )
    p.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the source, repeatable"
    )
    add_engine(p)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    text = "a source of your own: a .py file or dotted module with a SOURCE or SOURCES"
    parser.add_argument("--adapter", metavar="MODULE", help=text)


def sources(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from data_prep.sources import SOURCES, find_source
    from data_prep.sources.source import Source
    from infimed_jax.files import write_json

    one = find_source(_address(args)) if args.source or args.adapter else None

    def facts(source: Source) -> dict[str, Any]:
        """All but the functions, and where they stand."""
        hidden = ("read", "shards", "options", "module", "code", "label")
        row = {key: value for key, value in vars(source).items() if key not in hidden}
        row["options"] = {option.name: option.help for option in source.options}
        return row

    if args.json:
        listed = SOURCES | ({one.name: one} if one else {})
        write_json(args.json, {name: facts(source) for name, source in listed.items()})
    # a pipe has no width: 160 columns keep a source's row together there
    console = Console(width=None if Console().is_terminal else 160)
    if source := one:
        lines = {
            "source": source.name,
            "title": source.title,
            "licence": source.licence,
            "commercial use": _yes(source.commercial_use),
            "sent to outside endpoints": "allowed" if source.allow_external_api else "never",
            "use": "training and evaluation" if source.training_allowed else "evaluation only",
            "languages": ", ".join(source.languages),
            "size": source.size,
            "splits": ", ".join(source.splits),
            "layout": source.layout,
            "columns": ", ".join(source.columns),
            "from": source.obtain,
            "notes": source.notes,
        } | {f"--option {option.name}=": option.help for option in source.options}
        for key, value in lines.items():
            if value:
                console.print(f"{key:26}{value}", markup=False, highlight=False, soft_wrap=True)
    else:
        table = Table(title=f"{len(SOURCES)} data sources", show_lines=True, expand=True)
        table.add_column("source", no_wrap=True)
        for column, ratio in (("terms", 3), ("size and splits", 3), ("layout, and where from", 5)):
            table.add_column(column, overflow="fold", ratio=ratio)
        for source in SOURCES.values():
            table.add_row(
                *map(
                    escape,
                    (
                        source.name + ("" if source.training_allowed else "\nevaluation only"),
                        f"{source.licence}\ncommercial use: {_yes(source.commercial_use)}\n"
                        f"outside services: {'allowed' if source.allow_external_api else 'never'}",
                        "\n".join(filter(None, (source.size, f"splits: {', '.join(source.splits)}"))),
                        f"{source.layout}\nfrom: {source.obtain}",
                    ),
                )
            )
        console.print(table)
        print("data sources --source NAME shows columns, options and notes too")
    if args.json:
        print(f"Outputs: {args.json}")


def _address(args: argparse.Namespace) -> str:
    if not args.source and not args.adapter:
        raise UserError("name a data source by --source (`data sources` lists them), or your own by --adapter")
    return f"{args.adapter}:{args.source or ''}" if args.adapter else args.source


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def ingest(args: argparse.Namespace) -> None:
    from data_prep.sources import find_source
    from data_prep.steps.ingest import ingest as prepare

    source = find_source(_address(args))

    with progress_bar("ingest") as bar:
        reports = prepare(
            source.address,
            args.input,
            args.output,
            args.split or (),
            options=_options(args.option) | ({"name": args.name} if args.name is not None else {}),
            engine=engine_of(args),
            on_progress=bar,
        )
    for split, report in reports.items():
        print(f"{split}: {report['samples']:,} samples, {report['licence']}")
        for reason, count in report["skipped"].items():
            print(f"  skipped, {reason}: {count:,} (first: {report['skipped_first'][reason]})")
        for oddity, count in report["kept_although"].items():
            print(f"  kept, with {oddity.replace('_', ' ')}: {count:,}")
    for split in () if args.split else source.splits:
        if split not in reports:
            print(f"{split}: no files in {args.input}, so it was left out")
    print(f"Outputs: {', '.join(f'{args.output / split}, {args.output / split}.json' for split in reports)}")


def _options(given: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise UserError(f"--option {pair}: write it as name=value")
        if name in options:
            raise UserError(f"--option {name} is given twice")
        options[name] = value
    return options
