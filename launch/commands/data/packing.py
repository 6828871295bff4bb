"""`data pack`, `data export-json` and `data import-json`: rows of samples, as an index or as the paper's JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.cli.arguments import add_command, add_settings
from launch.cli.progress import progress_bar
from launch.commands.data.engines import add_engine, engine_of


def add(steps: argparse._SubParsersAction) -> None:
    p = add_command(steps, "pack", pack, "Write the packing index of data.dataset beside its shards; print the fill.")
    add_settings(p)
    p = add_command(steps, "inspect", inspect, "Show packed rows as a page: images, tokens by loss and sample, fill.")
    p.add_argument("--output", type=Path, required=True, help="an HTML file")
    p.add_argument("--rows", type=int, default=3, help="rows shown [%(default)s]")
    add_settings(p)
    p = add_command(
        steps, "export-json", export_json, "Write the packed rows of data.dataset in the paper's JSON format."
    )
    p.add_argument("--output", type=Path, required=True, help="a file, one row a line")
    add_settings(p)
    p = add_command(steps, "import-json", import_json, "Make a prepared dataset from rows in the paper's JSON format.")
    p.add_argument("--input", type=Path, action="append", required=True, help="a file of rows, repeatable")
    p.add_argument("--output", type=Path, required=True, help="folder of the prepared dataset")
    p.add_argument("--name", default="imported", help="the dataset's name [%(default)s]")
    add_engine(p)


def pack(args: argparse.Namespace) -> None:
    from infimed_jax.data.loader import index_folder

    config, samples, index = _packed(args, training=True)
    print(f"{samples.folder}: {len(index.samples):,} samples in {index.rows:,} rows ({config.data.packing})")
    shapes = ", ".join(f"{tokens:,} tokens and {images} images" for tokens, images in index.buckets)
    print(f"  row shapes: {shapes}")
    print(f"  fill {index.fill:.2%}; rows of {config.data.context:,} cannot be filled above {index.fill_bound:.2%}")
    for reason, count in index.dropped_by_reason().items():
        names = [name for name, why in index.dropped if why == reason]
        print(f"  left out, {reason}: {count:,} ({', '.join(names[:3])}{', …' if count > 3 else ''})")
    print(f"Outputs: {index_folder(samples) / index.fingerprint[:16]}.json")


def inspect(args: argparse.Namespace) -> None:
    from data_prep.steps.inspect import write_inspection
    from infimed_jax.data.chat import load_tokenizer

    config, samples, index = _packed(args)
    tokenizer = load_tokenizer(config.data.tokenizer)
    write_inspection(samples, index, tokenizer, config.model, args.output, args.rows)
    print(f"Outputs: {args.output}")


def export_json(args: argparse.Namespace) -> None:
    from data_prep.steps.packed_json import export_json as write
    from data_prep.steps.step import UNREADABLE_RECORDS, counted
    from infimed_jax.data.storage import UNREADABLE
    from infimed_jax.files import write_json

    config, samples, index = _packed(args, training=True)
    with progress_bar("export", "rows") as bar:
        lost = write(samples, index, args.output, bar, config.data.max_bad_records)
    written = len(index.samples) - len(lost)
    unreadable = [name for name, reason in index.dropped if reason == UNREADABLE] + lost
    dropped = counted(index.dropped_by_reason(), unreadable)
    report = {"rows": index.rows, "samples": written, "dataset": samples.fingerprint, "dropped": dropped}
    write_json(args.output.with_name(f"{args.output.name}.report.json"), report | {UNREADABLE_RECORDS: unreadable})
    left_out = "".join(f"; left out, {reason}: {count:,}" for reason, count in dropped.items())
    print(f"{written:,} samples in {index.rows:,} rows{left_out}")
    print(f"Outputs: {args.output}")


def import_json(args: argparse.Namespace) -> None:
    from data_prep.steps.packed_json import import_json as read

    with progress_bar("import", "files") as bar:
        report = read(args.input, args.output, args.name, engine=engine_of(args), on_progress=bar)
    print(f"{report['samples']:,} samples")
    print(f"Outputs: {args.output}, {args.output}.json")


def _packed(args: argparse.Namespace, training: bool = False):
    """The dataset with its index; what is made for `training` must not come from test sets."""
    from infimed_jax.config import load

    config = load(args.config, args.settings)
    from infimed_jax.data.chat import load_tokenizer
    from infimed_jax.data.loader import index_folder
    from infimed_jax.data.packing import build_index
    from infimed_jax.data.storage import open_samples
    from infimed_jax.data.training import open_for_training

    samples = (open_for_training if training else open_samples)(config.data.dataset)
    tokenizer = load_tokenizer(config.data.tokenizer)
    with progress_bar("render", "samples") as bar:
        index = build_index(samples, tokenizer, config.data, config.model, index_folder(samples), bar)
    return config, samples, index
