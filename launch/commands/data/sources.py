"""`data sources` and `data ingest`: what there is, and from its own files to prepared datasets."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from launch.commands.arguments import add_command
from launch.commands.data.engines import add_engine, engine_of


def add(steps: argparse._SubParsersAction) -> None:
    add_command(steps, "sources", sources, "List the sources with licence and layout.")
    p = add_command(steps, "ingest", ingest, "One source to prepared datasets, one a split.")
    p.add_argument("--source", required=True)
    p.add_argument("--input", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--split", action="append", help="a split, repeatable [all]")
    add_engine(p)


def sources(args: argparse.Namespace) -> None:
    from data_prep.sources import SOURCES

    for source in SOURCES.values():
        external = (
            "may be sent to outside endpoints" if source.allow_external_api else "never sent to outside endpoints"
        )
        print(f"{source.name}: {source.title}\n  licence {source.licence}; {external}")
        print(f"  splits: {', '.join(source.splits)}\n  layout: {source.layout}\n  from: {source.obtain}")


def ingest(args: argparse.Namespace) -> None:
    from data_prep.pipeline import ingest as prepare

    report = prepare(args.source, args.input, args.output, args.split or (), engine=engine_of(args))
    print(json.dumps(report, indent=1, ensure_ascii=False))
    print(f"Outputs: {args.output}")
