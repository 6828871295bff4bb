"""`data assess`, `reflect`, `difficulty`, `scrub`: what is in the samples, judged and bettered."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.commands.arguments import add_command, add_settings
from launch.commands.data.engines import add_engine, add_max_bad_records, bar, engine_of
from launch.commands.endpoint import add_endpoint, endpoint_of


def add(steps: argparse._SubParsersAction) -> None:
    p = add_command(steps, "assess", assess, "Have a model rate random samples of each source, and decide on each.")
    p.add_argument("--input", type=Path, action="append", required=True, help="a prepared dataset, repeatable")
    p.add_argument("--output", type=Path, required=True, help="folder for report.html, ratings and decision.json")
    p.add_argument("--samples", type=int, default=500, help="a source, at random [%(default)s]")
    p.add_argument("--threshold", type=float, default=3.0, help="least mean Overall of a kept source [%(default)s]")
    p.add_argument("--max-tokens", type=int, default=2048, help="of a reply [%(default)s]")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--cache", type=Path, help="folder of replies and account [OUTPUT/cache]")
    add_endpoint(p)

    p = add_command(steps, "reflect", reflect, "Chains of thought by rejection sampling, with reflective patterns.")
    p.add_argument("--input", type=Path, required=True, help="a prepared dataset of questions")
    p.add_argument("--output", type=Path, required=True, help="the dataset to be written")
    p.add_argument("--draws", type=int, default=4, help="replies sampled a question [%(default)s]")
    p.add_argument("--keep", type=int, default=1, help="samples made of a question, at most [%(default)s]")
    p.add_argument("--temperature", type=float, default=1.0, help="[%(default)s]")
    p.add_argument("--max-tokens", type=int, default=2048, help="of a reply [%(default)s]")
    p.add_argument(
        "--sparse-words",
        type=int,
        default=5,
        help="sources whose median answer has at most so many words get patterns; 0: none do [%(default)s]",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--cache", type=Path, help="folder of replies and account [OUTPUT.cache]")
    add_max_bad_records(p)
    add_endpoint(p)

    p = add_command(steps, "difficulty", difficulty, "Keep the RL candidates that a checkpoint gets right at times.")
    p.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or one checkpoint")
    p.add_argument("--input", type=Path, required=True, help="a prepared dataset of questions")
    p.add_argument("--output", type=Path, required=True, help="the dataset to be written")
    p.add_argument("--draws", type=int, default=8, help="answers a question [%(default)s]")
    p.add_argument("--low", type=int, default=3, help="fewest right of those that are kept [%(default)s]")
    p.add_argument("--high", type=int, default=5, help="most right of those that are kept [%(default)s]")
    p.add_argument("--between", type=float, default=0.5, help="share kept of the other mixed ones [%(default)s]")
    p.add_argument("--extreme", type=float, default=0.1, help="share kept of none or all right [%(default)s]")
    p.add_argument("--seed", type=int, default=0)
    add_max_bad_records(p)
    add_settings(p, files=False)

    text = "Flag or mask identifiers that patterns find in text; no promise of anonymity."
    p = add_command(steps, "scrub", scrub, text)
    p.add_argument("--input", type=Path, required=True, help="a prepared dataset")
    p.add_argument("--output", type=Path, required=True, help="the dataset to be written")
    p.add_argument("--mode", choices=("flag", "mask"), default="mask", help="[%(default)s]")
    add_max_bad_records(p)
    add_engine(p)


def assess(args: argparse.Namespace) -> None:
    endpoint = endpoint_of(args)
    from data_prep.quality.assess import Plan, assess

    plan = Plan(samples=args.samples, threshold=args.threshold, max_tokens=args.max_tokens, seed=args.seed)
    with bar("assess") as told:
        result = assess(args.input, args.output, endpoint, plan, cache=args.cache, on_progress=told)
    for name, row in result["sources"].items():
        print(f"{name}: {'keep' if row['keep'] else 'exclude'} ({row['reason']}; {row['n']} of {row['drawn']} rated)")
    _tell_account(result["account"])
    print(f"Outputs: {args.output} (report.html, decision.json, assessment.json, ratings.jsonl)")


def reflect(args: argparse.Namespace) -> None:
    endpoint = endpoint_of(args)
    from data_prep.reflection.reflect import Plan, reflect, unsampled

    plan = Plan(
        draws=args.draws,
        keep=args.keep,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        sparse_words=args.sparse_words,
        seed=args.seed,
    )
    with bar("reflect") as told:
        result = reflect(
            args.input,
            args.output,
            endpoint,
            plan,
            cache=args.cache,
            max_bad_records=args.max_bad_records,
            on_progress=told,
        )
    print(f"{result['reached']:,} of {result['questions']:,} questions reached their answer; "
          f"patterns: {_counts(result['patterns'])}; draws rejected: {_counts(result['rejected'])}; "
          f"left out: {_counts(result['left_out'] | result['failed'])}")  # fmt: skip
    if told := unsampled(result):
        print(f"warning: {told}")
    _tell_account(result["account"])
    print(f"Outputs: {args.output}, {args.output}.json")


def difficulty(args: argparse.Namespace) -> None:
    import jax

    from data_prep.difficulty import Plan, fingerprint, measure
    from data_prep.steps import open_for_training
    from infimed_jax.config import Config, from_dict, with_overrides
    from infimed_jax.data.chat import load_tokenizer
    from infimed_jax.hf.names import check_leaves
    from infimed_jax.models.compute import Compute
    from infimed_jax.runs.parameters import load_params
    from infimed_jax.sampling.weights import sampler_weights
    from infimed_jax.sharding import make_mesh
    from infimed_jax.trees import flatten

    plan = Plan(args.draws, args.low, args.high, args.between, args.extreme, args.seed)
    open_for_training(args.input)  # before gigabytes of weights are read
    params, metadata = load_params(args.checkpoint)
    config = from_dict(Config, with_overrides(metadata["config"], args.settings))
    check_leaves(flatten(dict(params), "/"), config.model)  # a layer too many would be a copy of the last one
    with jax.set_mesh(make_mesh(config.mesh)), bar("difficulty") as told:
        result = measure(
            args.input,
            args.output,
            plan,
            cfg=config,
            weights=sampler_weights(params, config.model, Compute.of(config.train).dtype),
            checkpoint=fingerprint(params),
            tokenizer=load_tokenizer(config.data.tokenizer),
            max_bad_records=args.max_bad_records,
            on_progress=told,
        )
    print(f"{result['questions']:,} questions, {result['mean_right']:.1%} of the answers right; "
          f"questions with 0, 1, 2, … right: {' '.join(map(str, result['histogram']))}; "
          f"kept: {result['samples']:,}; left out: {_counts(result['left_out'])}")  # fmt: skip
    print(f"Outputs: {args.output}, {args.output}.json, {args.output}.png")


def scrub(args: argparse.Namespace) -> None:
    from data_prep.privacy import scrub

    with bar("scrub") as told:
        result = scrub(
            args.input,
            args.output,
            args.mode,
            engine=engine_of(args),
            max_bad_records=args.max_bad_records,
            on_progress=told,
        )
    print(f"{args.mode}: {_counts(result['found'])} in {result['samples_with_findings']:,} samples")
    print(f"left out: {_counts(result['left_out'])}; in metadata, left alone: {_counts(result['metadata'])}")
    print(result["note"])
    print(f"Outputs: {args.output}, {args.output}.json")


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name}: {n:,}" for name, n in values.items() if n) or "none"


def _tell_account(account: dict[str, Any]) -> None:
    spent = account["spent"]
    cost = f", {spent['cost']:.4f} in money" if spent["cost"] else ""
    print(f"{account['endpoint']} ({account['reach']}): {_counts(account['counts'])}; in all runs with this cache "
          f"{spent['prompt_tokens']:,} prompt and {spent['reply_tokens']:,} reply tokens{cost}")  # fmt: skip
