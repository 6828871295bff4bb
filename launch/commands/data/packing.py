"""`data pack`, `data export-json` and `data import-json`: rows of samples, as an index or as the paper's JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.commands.arguments import add_command, add_settings


def add(steps: argparse._SubParsersAction) -> None:
    p = add_command(steps, "pack", pack, "Write the packing index of data.dataset beside its shards; print the fill.")
    add_settings(p)
    p = add_command(steps, "export-json", export_json, "The packed rows of data.dataset in the paper's JSON format.")
    p.add_argument("--output", type=Path, required=True, help="a file, one row a line")
    add_settings(p)
    p = add_command(steps, "import-json", import_json, "A prepared dataset from rows in the paper's JSON format.")
    p.add_argument("--input", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True, help="folder of the prepared dataset")
    p.add_argument("--name", default="imported", help="the dataset's name [%(default)s]")


def pack(args: argparse.Namespace) -> None:
    from infimed_jax.data.loader import index_folder

    config, samples, index = _packed(args)
    print(f"{samples.folder}: {len(index.samples):,} samples in {index.rows:,} rows ({config.data.packing})")
    shapes = ", ".join(f"{tokens:,} tokens and {images} images" for tokens, images in index.buckets)
    print(f"  row shapes: {shapes}")
    print(f"  fill {index.fill:.2%}; rows of {config.data.context:,} cannot be filled above {index.fill_bound:.2%}")
    for reason, count in index.dropped_by_reason().items():
        names = [name for name, why in index.dropped if why == reason]
        print(f"  left out, {reason}: {count:,} ({', '.join(names[:3])}{', …' if count > 3 else ''})")
    print(f"Outputs: {index_folder(samples) / index.fingerprint[:16]}.json")


def export_json(args: argparse.Namespace) -> None:
    from data_prep.packed_json import export_json as write
    from infimed_jax.files import write_json
    from launch.progress import StepProgress

    _, samples, index = _packed(args)
    with StepProgress("export") as progress:
        rows = write(samples, index, args.output, lambda done, total: progress.update(done, total, {}))
    dropped = index.dropped_by_reason()
    write_json(
        args.output.with_name(f"{args.output.name}.report.json"),
        {"rows": rows, "samples": len(index.samples), "dataset": samples.fingerprint, "dropped": dropped},
    )
    left_out = "".join(f"; left out, {reason}: {count:,}" for reason, count in dropped.items())
    print(f"{len(index.samples):,} samples in {rows:,} rows{left_out}")
    print(f"Outputs: {args.output}")


def import_json(args: argparse.Namespace) -> None:
    from data_prep.packed_json import import_json as read

    print(f"{read(args.input, args.output, args.name)['samples']:,} samples")
    print(f"Outputs: {args.output}")


def _packed(args: argparse.Namespace):
    from infimed_jax.config import load

    config = load(args.config, args.settings)
    from infimed_jax.data.chat import load_tokenizer
    from infimed_jax.data.loader import index_folder
    from infimed_jax.data.packing import build_index
    from infimed_jax.data.storage import open_samples
    from launch.progress import StepProgress

    samples, tokenizer = open_samples(config.data.dataset), load_tokenizer(config.data.tokenizer)
    with StepProgress("render") as progress:
        index = build_index(
            samples,
            tokenizer,
            config.data,
            config.model,
            index_folder(samples),
            lambda done, total: progress.update(done, total, {}),
        )
    return config, samples, index
