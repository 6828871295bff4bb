"""`convert`: to and from Hugging Face."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.commands.arguments import add_command, add_group


def add(commands: argparse._SubParsersAction) -> None:
    ways = add_group(commands, "convert", "To and from Hugging Face.")
    p = add_command(ways, "to-hf", to_hf, "A checkpoint of any stage to a LLaVA folder for transformers.")
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")


def to_hf(args: argparse.Namespace) -> None:
    from infimed_jax.config import Config, from_dict
    from infimed_jax.hf.export import to_hf as write_hf
    from infimed_jax.train.checkpoint import load_params

    params, metadata = load_params(args.checkpoint)
    config = from_dict(Config, metadata["config"])
    write_hf(params, config.model, config.data.tokenizer, args.output, dtype=args.dtype)
    print(f"Outputs: {args.output}")
