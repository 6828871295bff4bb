"""`evaluate`: grade a model's replies, or a file of them, to prepared test sets and benchmarks as published."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infimed_jax.errors import UserError
from launch.cli.arguments import add_command, add_settings
from launch.cli.endpoint import add_endpoint, endpoint_of
from launch.cli.progress import progress_bar

if TYPE_CHECKING:
    from data_prep.sources.source import Source
    from infimed_jax.data.sample import Sample
    from infimed_jax.evaluation.respondents import Respondent, Terms
    from infimed_jax.evaluation.run import Evaluation
    from infimed_jax.progress import Report
    from infimed_jax.sampling.policy import Policy


def add(commands: argparse._SubParsersAction) -> None:
    p = add_command(commands, "evaluate", evaluate, "Answer and grade test sets with a model.")
    who = p.add_mutually_exclusive_group(required=True)
    who.add_argument("--checkpoint", type=Path, help="a run's folder, or one checkpoint")
    who.add_argument("--hf", type=Path, help="a folder in Hugging Face format")
    who.add_argument("--predictions", type=Path, metavar="FILE.jsonl",
                     help='replies of any model, {"id": …, "response": …} a line')  # fmt: skip
    add_endpoint(p, who)
    judge = p.add_argument_group("judge of open questions, with the endpoint's options")
    judge.add_argument("--judge-endpoint", metavar="URL", help="OpenAI-compatible base address of the judge")
    judge.add_argument("--judge-model", default="", help="the model's name there")
    judge.add_argument("--judge-repeats", type=int, default=1,
                       help="verdicts on each reply; several are drawn, and give a spread [%(default)s]")  # fmt: skip
    p.add_argument("--lenient", action="store_true",
                   help="pass over unknown ids, repeated ids and null responses of --predictions")  # fmt: skip
    p.add_argument("--dataset", type=Path, action="append", default=[],
                   help="a prepared dataset, as `data ingest` writes it; repeatable")  # fmt: skip
    p.add_argument("--benchmark", action="append", default=[], metavar="NAME=FOLDER",
                   help="a benchmark's published files, read in place; repeatable. NAME, or MODULE or FILE.py, alone: "
                   "how the questions of --dataset are asked and graded [by the mark of each question's adapter]; see "
                   "infimed_jax/evaluation/benchmarks")  # fmt: skip
    p.add_argument("--output", type=Path, required=True,
                   help="folder for report.html, results.json, results.csv and, of each set, replies.jsonl, "
                   "scores.jsonl and summary.json; the same command goes on after a stop")  # fmt: skip
    p.add_argument("--protocol", default="strict", help="strict, medevalkit-fixed or medevalkit-2025-06 [%(default)s]")
    p.add_argument("--reasoning", action="store_true", help="ask for reasoning and a boxed answer")
    p.add_argument("--blind", action="store_true", help="the control: the same questions without their images")
    p.add_argument(
        "--all-images",
        action="store_true",
        help="send all images of a question, also where the protocol's harness sends fewer (MMMU's first)",
    )
    p.add_argument("--contamination", type=Path, action="append", default=[], metavar="REPORT",
                   help="a report of `data decontaminate` on the checkpoint's training data, repeatable: "
                   "also print the accuracy of the questions that it lists")  # fmt: skip
    p.add_argument("--page-images", choices=("cleared", "all", "none"), default="cleared",
                   help="images on the page: of sources that may be passed on, all, or none [%(default)s]")  # fmt: skip
    p.add_argument("--limit", type=int, default=0, help="ask only the first LIMIT questions of each set [all]")
    add_settings(p, files=False)


@dataclass(frozen=True)
class _Set:
    """The questions of one test set, read anew in each pass."""

    read: Callable[[], Iterator[Sample]]
    origins: tuple[str, ...]
    """`source/split`"""
    limit: int

    def __iter__(self) -> Iterator[Sample]:
        return itertools.islice(self.read(), self.limit or None)


def evaluate(args: argparse.Namespace) -> None:
    if args.limit < 0:
        raise UserError(f"--limit {args.limit} counts questions: it must not be negative")
    if args.predictions and (args.settings or args.blind):
        raise UserError("--predictions are replies that were given: settings and --blind change nothing of them")
    if bool(args.judge_endpoint) != bool(args.judge_model) or args.judge_repeats < 1:
        raise UserError("a judge needs --judge-endpoint, --judge-model and at least one of --judge-repeats")
    if args.model and not args.endpoint:
        raise UserError("--model is the name of a model at --endpoint: give its address too")
    import jax

    from infimed_jax import config
    from infimed_jax.evaluation.page import write_evaluation_page
    from infimed_jax.evaluation.respondents import Terms
    from infimed_jax.evaluation.run import evaluate
    from infimed_jax.evaluation.table import macro_line, write_results
    from infimed_jax.sampling.policy import Policy

    grading, sets = _sets(args)
    folder = args.checkpoint or args.hf
    policy = Policy.open(folder, args.settings, export=args.hf is not None) if folder else None
    sampling = policy.config.sampling if policy else config.load([], args.settings).sampling
    terms = Terms(sampling, args.protocol, args.reasoning, not args.blind, grading, args.all_images)
    results: dict[str, Evaluation] = {}
    judged: dict[str, Any] = {}
    for name, questions in sets.items():
        if policy:
            _warn_learnt(args, policy, questions)
        with progress_bar("evaluate", "questions") as bar:
            results[name] = evaluate(
                questions,
                _respondent(args, policy, terms, lambda done, total, _, bar=bar: bar(done, total, "")),
                terms,
                folder=args.output / name if len(sets) > 1 else args.output,
                name=str(folder or args.predictions or f"{args.model} at {args.endpoint}"),
            )
        if jax.process_index() == 0:
            label, place = (f"{name}, ", args.output / name) if len(sets) > 1 else ("", args.output)
            _print(results[name], label)
            if args.judge_endpoint:
                judged[name] = _judge(args, results[name], place, label)
    if jax.process_index() == 0:
        if len(results) > 1:
            print(macro_line(results))
        facts = _provenance(policy, terms)
        write_results(args.output, results, facts, judged)
        images = _images(args.page_images, results, sets)
        write_evaluation_page(args.output / "report.html", results, judged, images, facts)
        print(f"Outputs: {args.output}")


def _respondent(args: argparse.Namespace, policy: Policy | None, terms: Terms, report: Report) -> Respondent:
    import jax

    from infimed_jax.evaluation.respondents import PolicyRespondent, Predictions

    if policy:
        return PolicyRespondent(policy, terms, jax.random.key(policy.config.train.seed), report)
    if args.predictions:
        return Predictions(args.predictions, args.lenient)
    from data_prep.llm.respond import EndpointRespondent

    return EndpointRespondent(endpoint_of(args), args.output.with_name(f"{args.output.name}.calls"), terms, report)


def _judge(args: argparse.Namespace, result: Evaluation, folder: Path, label: str) -> dict[str, Any]:
    """What the judge says of the open questions: printed, written to `judged.jsonl`, and returned as a summary."""
    from data_prep.llm.judge import expected_tokens, judge, open_questions
    from infimed_jax.files import to_json, write_text

    endpoint = endpoint_of(args, url=args.judge_endpoint, model=args.judge_model)
    records, protocol = open_questions(result), result.terms.protocol
    if not records:
        print(f"{label}judge: no open question")
        return {}
    tokens = expected_tokens(records, protocol, args.judge_repeats)
    price = endpoint.budget.price(tokens, 0)
    cost = f", {price:,.2f} in the currency of the prices" if price else ""
    print(f"{label}judge: {len(records) * args.judge_repeats:,} verdicts, about {tokens:,} tokens{cost}")
    judged, account = judge(
        records, protocol, endpoint, args.output.with_name(f"{args.output.name}.calls"), args.judge_repeats
    )
    write_text(folder / "judged.jsonl", "".join(to_json(row) + "\n" for row in judged.rows()))
    summary = judged.summary
    if summary["accuracy"] is None:
        print(f"{label}judge {endpoint.model}: no verdict on {len(records):,} open questions")
    else:
        low, high = summary["interval"]
        print(
            f"{label}judge {endpoint.model}: {summary['accuracy']:.1%} of {len(records):,} open questions "
            f"[{low:.1%}, {high:.1%}], by rule {summary['rule_accuracy']:.1%}; agrees with the rule on "
            f"{summary['agreement']:.1%}; {summary['null']:,} verdicts null"
        )
    return summary | {"model": endpoint.model, "account": dict(account)}


def _sets(args: argparse.Namespace) -> tuple[str, dict[str, _Set]]:
    """How questions of prepared sets are graded, and all sets by name. UserError: there is none, or two of one name."""
    from infimed_jax.data.storage import open_samples
    from infimed_jax.evaluation.benchmark import load_benchmark
    from infimed_jax.evaluation.contamination import mark

    grading = [value for value in args.benchmark if "=" not in value]
    if len(grading) > 1 or (grading and len(args.benchmark) > 1):
        raise UserError("--benchmark names one set of rules for --dataset, or NAME=FOLDER for each set of files")
    sets: list[tuple[str, _Set]] = []
    for value in (value for value in args.benchmark if "=" in value):
        name, _, folder = value.partition("=")
        sets.append((load_benchmark(name).name, _published(name, Path(folder), args.limit)))
    for folder in args.dataset:
        samples = open_samples(folder)
        marked = mark(samples, samples, args.contamination) if args.contamination else samples
        sets.append((folder.resolve().name, _Set(lambda marked=marked: iter(marked), (*samples.manifest["origins"],),
                                                 args.limit)))  # fmt: skip
    if not sets:
        raise UserError("nothing to evaluate: name --benchmark NAME=FOLDER or --dataset FOLDER")
    if len(dict(sets)) < len(sets):
        names = ", ".join(name for name, _ in sets)
        raise UserError(f"two sets have one name ({names}): evaluate them apart")
    return (grading or [""])[0], dict(sets)


def _published(name: str, folder: Path, limit: int) -> _Set:
    """A benchmark's published files. UserError: no adapter reads them, or a question cannot be read."""
    from data_prep.sources import find_source
    from data_prep.sources.source import with_options
    from infimed_jax.data.sample import Skipped
    from infimed_jax.evaluation.benchmark import load_benchmark

    benchmark = load_benchmark(name)
    if not benchmark.adapters:
        raise UserError(f"--benchmark {name}: it names no adapter that reads its files: ingest them, and use --dataset")
    source = _readable(
        [with_options(find_source(adapter), {})[0] for adapter in benchmark.adapters], folder, benchmark.split
    )

    def read() -> Iterator[Sample]:
        for record in source.samples(folder, benchmark.split):
            if isinstance(record, Skipped):
                detail = f" ({record.detail})" if record.detail else ""
                raise UserError(
                    f"{folder}: {record.id}: {record.reason}{detail}: no question of a benchmark is left out"
                )
            yield record

    return _Set(read, (f"{source.name}/{benchmark.split}",), limit)


def _readable(sources: Sequence[Source], folder: Path, split: str) -> Source:
    """The first adapter that finds its files in the folder. UserError: none does, or they cannot be read."""
    from data_prep.reading.files import NoFiles

    absent = []
    for source in sources:
        try:
            next(source.samples(folder, split), None)
            return source
        except NoFiles as error:
            absent.append(str(error))
    raise UserError("; ".join(absent))


def _images(which: str, results: dict[str, Evaluation], sets: dict[str, _Set]) -> dict[str, bytes]:
    """The first image of each case that the page shows, of those that may be shown."""
    from data_prep.sources import SOURCES
    from infimed_jax.evaluation.page import draw_cases

    images: dict[str, bytes] = {}
    for name, result in results.items() if which != "none" else ():
        wanted = {record.id for record in draw_cases(result)}
        for sample in sets[name]:
            cleared = sample.source in SOURCES and SOURCES[sample.source].allow_external_api
            if sample.id in wanted and sample.images and (which == "all" or cleared):
                images[sample.id] = sample.images[0]
    return images


def _warn_learnt(args: argparse.Namespace, policy: Policy, questions: _Set) -> None:
    from infimed_jax.runs.history import history_of, learnt_from

    if learnt := learnt_from(history_of(policy.metadata), questions.origins):
        sources = ", ".join(learnt)
        print(f"warning: {args.checkpoint} learnt from {sources}, so it may answer by memory", file=sys.stderr)


def _print(result: Evaluation, name: str) -> None:
    from infimed_jax.evaluation.contamination import GROUPING, WORDS
    from infimed_jax.evaluation.table import published_scores, score_line, shown, warnings

    print(f"{name}{score_line(result)}")
    for model, share in published_scores(result).items():
        print(f"  published for {model}: {share:.1%}")
    for what, share in result.groups().get(GROUPING, {}).items():
        print(f"  training data hold {WORDS[what]}: {shown(share)}")
    for words in warnings(result):
        print(f"warning: {name}{words}", file=sys.stderr)


def _provenance(policy: Policy | None, terms: Terms) -> dict[str, Any]:
    from datetime import UTC, datetime
    from importlib.metadata import version

    import jax

    from infimed_jax.runs.history import history_of

    packages = ("jax", "flax", "transformers", "numpy", "pillow")
    device = jax.devices()[0]
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages},
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "protocol": terms.protocol,
    }
    if policy is None:
        return facts
    stages = [entry.get("stage", "") for entry in history_of(policy.metadata)]
    return facts | {"seed": policy.config.train.seed, "model_sha256": policy.fingerprint, "stages": stages}
