"""`evaluate`: grade a checkpoint's replies to a prepared test set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from infimed_jax.errors import UserError
from launch.cli.arguments import add_command, add_settings
from launch.cli.progress import progress_bar

if TYPE_CHECKING:
    from infimed_jax.evaluation.statistics import Accuracy


def add(commands: argparse._SubParsersAction) -> None:
    p = add_command(commands, "evaluate", evaluate, "Answer and grade a prepared test set with a checkpoint.")
    p.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or one checkpoint")
    p.add_argument("--dataset", type=Path, required=True, help="a prepared dataset, as `data ingest` writes it")
    p.add_argument("--output", type=Path, required=True, help="folder for replies.jsonl and summary.json")
    p.add_argument("--protocol", default="strict", help="strict, medevalkit-fixed or medevalkit-2025-06 [%(default)s]")
    p.add_argument("--benchmark", default="", metavar="NAME|MODULE|FILE.py",
                   help="how questions are asked and graded; see infimed_jax/evaluation/benchmarks "
                   "[the one whose adapter made each sample]")  # fmt: skip
    p.add_argument("--reasoning", action="store_true", help="ask for reasoning and a boxed answer")
    p.add_argument("--all-images", action="store_true",
                   help="send all images of a question, also where a medevalkit protocol's harness sends fewer: "
                   "one of MMMU's")  # fmt: skip
    p.add_argument("--blind", action="store_true", help="the control: the same questions without their images")
    p.add_argument("--contamination", type=Path, action="append", default=[], metavar="REPORT",
                   help="a report of `data decontaminate` on the checkpoint's training data, repeatable: "
                   "also print the accuracy of the questions that it lists")  # fmt: skip
    p.add_argument("--limit", type=int, default=0, help="ask only the first LIMIT questions [all]")
    add_settings(p, files=False)


def evaluate(args: argparse.Namespace) -> None:
    if args.limit < 0:
        raise UserError(f"--limit {args.limit} counts questions: it must not be negative")
    import jax

    from infimed_jax.data.storage import open_samples
    from infimed_jax.evaluation.benchmark import load_benchmark
    from infimed_jax.evaluation.contamination import GROUPING, WORDS, mark
    from infimed_jax.evaluation.respondents import Terms, ask_policy
    from infimed_jax.evaluation.run import evaluate
    from infimed_jax.evaluation.statistics import majority_baseline
    from infimed_jax.runs.history import history_of, learnt_from
    from infimed_jax.sampling.policy import Policy

    policy = Policy.open(args.checkpoint, args.settings)
    dataset = open_samples(args.dataset)
    samples = [dataset[i] for i in range(min(len(dataset), args.limit or len(dataset)))]
    if args.contamination:
        samples = mark(samples, dataset, args.contamination)
    if learnt := learnt_from(history_of(policy.metadata), dataset.manifest["origins"]):
        sources = ", ".join(learnt)
        print(f"warning: {args.checkpoint} learnt from {sources}, so it may answer by memory", file=sys.stderr)
    terms = Terms(
        policy.config.sampling, args.protocol, args.reasoning, not args.blind, args.benchmark, args.all_images
    )
    key = jax.random.key(policy.config.train.seed)
    with progress_bar("evaluate", "questions") as bar:
        respond = ask_policy(policy, terms, key, lambda done, total, _: bar(done, total, ""))
        result = evaluate(samples, respond, terms, folder=args.output, name=str(args.checkpoint))
    print(f"{args.protocol}: {_shown(result.accuracy)}; "
          f"majority answer per template {majority_baseline(samples).accuracy:.1%}")  # fmt: skip
    if args.benchmark and (published := load_benchmark(args.benchmark).published.get(args.protocol)):
        print("published: " + ", ".join(f"{model} {score:.1%}" for model, score in published.items()))
    for what, share in result.groups().get(GROUPING, {}).items():
        print(f"  training data hold {WORDS[what]}: {_shown(share)}")
    print(f"Outputs: {args.output}")


def _shown(share: Accuracy) -> str:
    return f"{share.accuracy:.1%} of {share.n:,} [{share.low:.1%}, {share.high:.1%}]"
