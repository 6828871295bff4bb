"""`train` and `grpo`: one stage of the recipe."""

from __future__ import annotations

import argparse

from infimed_jax.errors import UserError
from launch.commands.arguments import add_command, add_settings


def add(commands: argparse._SubParsersAction) -> None:
    add_settings(add_command(commands, "train", train, "One training stage: pretraining or any supervised stage."))
    text = "GRPO with verifiable rewards, from the checkpoint `train.init_from`."
    add_settings(add_command(commands, "grpo", grpo, text))


def train(args: argparse.Namespace) -> None:
    from infimed_jax.config import load

    config = load(args.config, args.settings)  # before the heavy imports: a mistake is answered at once
    from infimed_jax.train.loop import train
    from launch.progress import StepProgress

    with StepProgress(config.train.stage) as progress:
        result = train(config, on_step=progress.update)
    print(f"{config.train.stage}: {result.steps} steps, loss {result.loss_first:.4f} -> {result.loss_last:.4f}")
    print(f"Outputs: {config.train.output}")


def grpo(args: argparse.Namespace) -> None:
    from infimed_jax.config import load

    config = load(args.config, args.settings)
    if not config.train.init_from:
        raise UserError("grpo starts from a tuned model: give train.init_from=RUN")
    import jax

    from infimed_jax.data.chat import load_tokenizer
    from infimed_jax.data.storage import open_samples
    from infimed_jax.rl.grpo import grpo
    from infimed_jax.sharding import make_mesh
    from infimed_jax.train.checkpoint import load_params
    from launch.progress import StepProgress

    params, _ = load_params(config.train.init_from)
    samples, tokenizer = open_samples(config.data.dataset), load_tokenizer(config.data.tokenizer)
    with jax.set_mesh(make_mesh(config.mesh)), StepProgress("grpo") as progress:
        result = grpo(
            config,
            params=params,
            samples=samples,
            tokenizer=tokenizer,
            on_step=progress.update,
        )
    rewards = [row["reward"] for row in result.history]
    print(f"grpo: {len(rewards)} steps, reward {rewards[0]:.4f} -> {rewards[-1]:.4f}")
    print(f"Outputs: {config.train.output}")
