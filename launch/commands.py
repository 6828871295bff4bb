"""The commands of `launch/run.py`: their arguments, and the call that each one is.

Each imports what it needs when it runs: `--help` must not wait for JAX.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from infimed_jax.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=text, description=text)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parser.set_defaults(run=run)
        return parser

    p = command("quickstart", quickstart, "The whole recipe on a tiny model: data, five stages, GRPO, report, export.")
    p.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="the run's folder [%(default)s]")
    p.add_argument("--source", default="phantom", help="phantom (embedded) or vqa_rad [%(default)s]")
    p.add_argument("--input", type=Path, help="the source's folder; the embedded phantoms need none")
    p.add_argument("--tokenizer", type=Path, help="a Qwen3 tokenizer folder [a small one is made from the data]")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--resume", action="store_true", help="continue the run that is in the folder")
    p.add_argument("--overwrite", action="store_true", help="delete the run that is in the folder")
    add_settings(p, files=False)

    p = command("train", train, "One training stage: pretraining or any supervised stage.")
    add_settings(p)

    p = command("grpo", grpo, "GRPO with verifiable rewards, from the checkpoint `train.init_from`.")
    add_settings(p)

    p = command("evaluate", evaluate, "Answer and grade a prepared test set with a checkpoint.")
    p.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or one checkpoint")
    p.add_argument("--dataset", type=Path, required=True, help="a prepared dataset, as `data ingest` writes it")
    p.add_argument("--output", type=Path, required=True, help="folder for replies.jsonl and summary.json")
    p.add_argument("--protocol", default="strict", help="strict, medevalkit-fixed or medevalkit-2025-06 [%(default)s]")
    p.add_argument("--reasoning", action="store_true", help="ask for reasoning and a boxed answer")
    p.add_argument("--blind", action="store_true", help="the control: the same questions without their images")
    p.add_argument("--limit", type=int, default=0, help="questions at most, the first ones [all]")
    add_settings(p, files=False)

    data = command("data", lambda args: args.run_data(args), "Raw sources to prepared datasets.")
    steps = data.add_subparsers(dest="step", required=True, metavar="STEP")

    p = steps.add_parser("sources", help="list the sources with licence and layout")
    p.set_defaults(run_data=data_sources)
    p = steps.add_parser("ingest", help="one source to prepared datasets, one a split")
    p.add_argument("--source", required=True)
    p.add_argument("--input", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--split", action="append", help="a split, repeatable [all]")
    p.set_defaults(run_data=data_ingest)

    convert = command("convert", lambda args: args.run_convert(args), "To and from Hugging Face.")
    ways = convert.add_subparsers(dest="way", required=True, metavar="WAY")
    p = ways.add_parser("to-hf", help="a checkpoint of any stage to a LLaVA folder for transformers")
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.set_defaults(run_convert=convert_to_hf)


def add_settings(parser: argparse.ArgumentParser, *, files: bool = True) -> None:
    if files:
        parser.add_argument("--config", action="append", default=[], type=Path, metavar="FILE",
                            help="YAML settings, repeatable; later files lie over earlier ones")  # fmt: skip
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="such as train.steps=20")


def quickstart(args: argparse.Namespace) -> None:
    from launch.quickstart import Options, quickstart

    quickstart(
        Options(
            output=args.output,
            source=args.source,
            input=args.input,
            tokenizer=args.tokenizer,
            seed=args.seed,
            resume=args.resume,
            overwrite=args.overwrite,
            settings=tuple(args.settings),
        )
    )


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


def evaluate(args: argparse.Namespace) -> None:
    import jax

    from infimed_jax.config import Config, from_dict, with_overrides
    from infimed_jax.data.chat import load_tokenizer
    from infimed_jax.data.storage import open_samples
    from infimed_jax.evaluation.run import evaluate
    from infimed_jax.evaluation.statistics import majority_baseline
    from infimed_jax.models.compute import Compute
    from infimed_jax.sampling.weights import sampler_weights
    from infimed_jax.sharding import make_mesh
    from infimed_jax.train.checkpoint import load_params
    from launch.progress import StepProgress

    params, metadata = load_params(args.checkpoint)
    config = from_dict(Config, with_overrides(metadata["config"], args.settings))
    dataset = open_samples(args.dataset)
    samples = [dataset[i] for i in range(min(len(dataset), args.limit or len(dataset)))]
    compute = Compute.of(config.train)
    with jax.set_mesh(make_mesh(config.mesh)), StepProgress("evaluate") as progress:
        result = evaluate(
            samples,
            weights=sampler_weights(params, config.model, compute.dtype),
            model=config.model,
            compute=compute,
            tokenizer=load_tokenizer(config.data.tokenizer),
            sampling=config.sampling,
            key=jax.random.key(config.train.seed),
            protocol=args.protocol,
            reasoning=args.reasoning,
            image=not args.blind,
            folder=args.output,
            name=str(args.checkpoint),
            on_progress=lambda done, total, _: progress.update(done, total, {}),
        )
    share = result.accuracy
    print(f"{args.protocol}: {share.accuracy:.1%} of {share.n:,} [{share.low:.1%}, {share.high:.1%}]; "
          f"majority answer per template {majority_baseline(samples).accuracy:.1%}")  # fmt: skip
    print(f"Outputs: {args.output}")


def data_sources(args: argparse.Namespace) -> None:
    from data_prep.sources import SOURCES

    for source in SOURCES.values():
        external = (
            "may be sent to outside endpoints" if source.allow_external_api else "never sent to outside endpoints"
        )
        print(f"{source.name}: {source.title}\n  licence {source.licence}; {external}")
        print(f"  splits: {', '.join(source.splits)}\n  layout: {source.layout}\n  from: {source.obtain}")


def data_ingest(args: argparse.Namespace) -> None:
    from data_prep.pipeline import ingest

    report = ingest(args.source, args.input, args.output, args.split)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    print(f"Outputs: {args.output}")


def convert_to_hf(args: argparse.Namespace) -> None:
    from infimed_jax.config import Config, from_dict
    from infimed_jax.hf.export import to_hf
    from infimed_jax.train.checkpoint import load_params

    params, metadata = load_params(args.checkpoint)
    config = from_dict(Config, metadata["config"])
    to_hf(params, config.model, config.data.tokenizer, args.output, dtype=args.dtype)
    print(f"Outputs: {args.output}")
