"""`train` and `grpo`: one stage of the recipe."""

from __future__ import annotations

import argparse
from dataclasses import replace

from infimed_jax.config import Config, load
from infimed_jax.errors import UserError
from launch.cli.arguments import add_command, add_devices, add_settings
from launch.cli.progress import progress_bar, step_reports
from launch.machine import accelerator

TRAIN_GROUPS = ("model", "data", "optimizer", "mesh", "train")
"""Groups of settings that a training stage reads."""


def add(commands: argparse._SubParsersAction) -> None:
    text = "Run one training stage, pretraining or any supervised one; the same command continues a stopped run."
    p = add_command(commands, "train", train, text)
    _add_start(p)
    add_devices(p, hosts="many")
    p.add_argument("--profile", type=int, default=0, metavar="STEPS", help="trace this many steps into RUN/profile")
    add_settings(p, shown=TRAIN_GROUPS)
    p = add_command(commands, "grpo", grpo, "Run GRPO with verifiable rewards, from a finished run.")
    _add_start(p)
    add_devices(p, hosts="one")
    add_settings(p, shown=(*TRAIN_GROUPS, "sampling", "grpo"))


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init-from", metavar="RUN", help="the run (or checkpoint) to start from: train.init_from")


def _load(args: argparse.Namespace) -> Config:
    """Before the heavy imports: a mistake is answered at once."""
    config = load(args.config, args.settings)
    return replace(config, train=replace(config.train, init_from=args.init_from)) if args.init_from else config


def _check_data(config: Config) -> None:
    for name in ("dataset", "tokenizer"):
        if not getattr(config.data, name):
            raise UserError(f"data.{name} is empty: name its folder, data.{name}=DIR")


def train(args: argparse.Namespace) -> None:
    config = _load(args)
    _check_data(config)
    if args.profile < 0:
        raise UserError("--profile counts steps: it must not be negative")
    accelerator.start(args)
    from infimed_jax.train.stage import train

    with progress_bar(config.train.stage) as bar:
        result = train(config, on_step=step_reports(bar), profile_steps=args.profile)
    skipped = f", {result.skipped_updates} updates skipped as not finite" if result.skipped_updates else ""
    print(
        f"{config.train.stage}: {result.steps} steps, loss {result.loss_first:.4f} -> {result.loss_last:.4f}, "
        f"{result.samples_per_step:.1f} samples and {result.tokens_per_step:,.0f} tokens a step{skipped}"
    )
    print(f"Outputs: {config.train.output}")


def grpo(args: argparse.Namespace) -> None:
    config = _load(args)
    if not config.train.init_from:
        raise UserError("grpo starts from a tuned model: give --init-from RUN (train.init_from)")
    _check_data(config)
    accelerator.start(args)
    from infimed_jax.rl.grpo import grpo

    with progress_bar("grpo") as bar:
        result = grpo(config, on_step=step_reports(bar))
    rewards = [row["reward"] for row in result.history]
    print(f"grpo: {len(rewards)} steps, reward {rewards[0]:.4f} -> {rewards[-1]:.4f}")
    print(f"Outputs: {config.train.output}")
