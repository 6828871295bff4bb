"""`data assess`, `reflect`, `difficulty`, `scrub`: judge samples, and improve or select them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.cli.arguments import add_command, add_settings
from launch.cli.declare import add_fields, build
from launch.cli.endpoint import add_endpoint, endpoint_of
from launch.cli.progress import progress_bar
from launch.commands.data.engines import add_engine, add_max_bad_records, engine_of

ASSESS, REFLECT = "data_prep.llm.quality.assess:Plan", "data_prep.llm.reflection.reflect:Plan"
DIFFICULTY = "infimed_jax.rl.difficulty:Plan"


def add(steps: argparse._SubParsersAction) -> None:
    p = add_command(
        steps, "assess", assess, "Have a model rate random samples of each source, and decide which to keep."
    )
    p.add_argument("--input", type=Path, action="append", required=True, help="a prepared dataset, repeatable")
    p.add_argument("--output", type=Path, required=True, help="folder for report.html, ratings and decision.json")
    add_fields(p, ASSESS, ("samples", "threshold", "max_tokens", "seed"))
    p.add_argument("--cache", type=Path, help="folder of replies and account [OUTPUT/cache]")
    add_endpoint(p)

    p = add_command(
        steps, "reflect", reflect, "Make chains of thought by rejection sampling, with reflective patterns."
    )
    p.add_argument("--input", type=Path, required=True, help="a prepared dataset of questions")
    p.add_argument("--output", type=Path, required=True, help="folder of the new dataset")
    add_fields(p, REFLECT, ("draws", "keep", "temperature", "max_tokens", "sparse_words", "seed"))
    p.add_argument("--cache", type=Path, help="folder of replies and account [OUTPUT.cache]")
    add_max_bad_records(p)
    add_endpoint(p)

    p = add_command(
        steps, "difficulty", difficulty, "Keep the RL candidates that a checkpoint answers right sometimes."
    )
    p.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or one checkpoint")
    p.add_argument("--input", type=Path, required=True, help="a prepared dataset of questions")
    p.add_argument("--output", type=Path, required=True, help="folder of the new dataset")
    add_fields(p, DIFFICULTY, ("draws", "low", "high", "between", "extreme", "seed"))
    add_max_bad_records(p)
    add_settings(p, files=False)

    text = "Flag or mask identifiers that patterns find in text; no promise of anonymity."
    p = add_command(steps, "scrub", scrub, text)
    p.add_argument("--input", type=Path, required=True, help="a prepared dataset")
    p.add_argument("--output", type=Path, required=True, help="folder of the new dataset")
    p.add_argument("--mode", choices=("flag", "mask"), default="mask", help="[%(default)s]")
    add_max_bad_records(p)
    add_engine(p)


def assess(args: argparse.Namespace) -> None:
    endpoint = endpoint_of(args)
    from data_prep.llm.quality.assess import Plan, assess

    with progress_bar("assess") as bar:
        result = assess(args.input, args.output, endpoint, build(Plan, args), cache=args.cache, on_progress=bar)
    for name, row in result["sources"].items():
        print(f"{name}: {'keep' if row['keep'] else 'exclude'} ({row['reason']}; {row['n']} of {row['drawn']} rated)")
    _print_account(result["account"])
    print(f"Outputs: {args.output} (report.html, decision.json, assessment.json, ratings.jsonl)")


def reflect(args: argparse.Namespace) -> None:
    endpoint = endpoint_of(args)
    from data_prep.llm.reflection.reflect import Plan, reflect, unsampled

    with progress_bar("reflect") as bar:
        result = reflect(
            args.input,
            args.output,
            endpoint,
            build(Plan, args),
            cache=args.cache,
            max_bad_records=args.max_bad_records,
            on_progress=bar,
        )
    print(f"{result['reached']:,} of {result['questions']:,} questions reached their answer; "
          f"patterns: {_counts(result['patterns'])}; draws rejected: {_counts(result['rejected'])}; "
          f"left out: {_counts(result['left_out'] | result['failed'])}")  # fmt: skip
    if warning := unsampled(result):
        print(f"warning: {warning}")
    _print_account(result["account"])
    print(f"Outputs: {args.output}, {args.output}.json")


def difficulty(args: argparse.Namespace) -> None:
    from data_prep.steps.difficulty import measure
    from infimed_jax.data.training import open_for_training
    from infimed_jax.rl.difficulty import Plan
    from infimed_jax.sampling.policy import Policy

    plan = build(Plan, args)
    open_for_training(args.input)  # before gigabytes of weights are read
    policy = Policy.open(args.checkpoint, args.settings)
    with progress_bar("difficulty") as bar:
        result = measure(
            args.input,
            args.output,
            plan,
            policy=policy,
            checkpoint=policy.metadata["leaves_sha256"][:16],
            max_bad_records=args.max_bad_records,
            on_progress=bar,
        )
    print(f"{result['questions']:,} questions, {result['mean_right']:.1%} of the answers right; "
          f"questions with 0, 1, 2, … right: {' '.join(map(str, result['histogram']))}; "
          f"kept: {result['samples']:,}; left out: {_counts(result['left_out'])}")  # fmt: skip
    print(f"Outputs: {args.output}, {args.output}.json, {args.output}.png")


def scrub(args: argparse.Namespace) -> None:
    from data_prep.privacy import scrub

    with progress_bar("scrub") as bar:
        result = scrub(
            args.input,
            args.output,
            args.mode,
            engine=engine_of(args),
            max_bad_records=args.max_bad_records,
            on_progress=bar,
        )
    print(f"{args.mode}: {_counts(result['found'])} in {result['samples_with_findings']:,} samples")
    print(f"left out: {_counts(result['left_out'])}; in metadata, left alone: {_counts(result['metadata'])}")
    print(result["note"])
    print(f"Outputs: {args.output}, {args.output}.json")


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name}: {n:,}" for name, n in values.items() if n) or "none"


def _print_account(account: dict[str, Any]) -> None:
    spent = account["spent"]
    cost = f", {spent['cost']:.4f} in money" if spent["cost"] else ""
    print(f"{account['endpoint']} ({account['reach']}): {_counts(account['counts'])}; in all runs with this cache "
          f"{spent['prompt_tokens']:,} prompt and {spent['reply_tokens']:,} reply tokens{cost}")  # fmt: skip
