"""`reflect`: chains of thought by rejection sampling, and reflective patterns where a source says little itself.

A vision-language model is asked each question several times, and never sees the answer. What reaches the gold
answer under the one answer grammar, in the asked form, is kept. For sources whose answers are a few words
(information-sparse; InfiMed, arXiv 2505.23867, names the idea and publishes neither prompts nor patterns), what was
kept is built into one of the patterns of `chains`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from data_prep.llm import (
    BY_ENDPOINT,
    CallFailed,
    ChatClient,
    Endpoint,
    Message,
    Reply,
    check_sources,
    parts,
    run_jobs,
    speech,
)
from data_prep.llm.reflection.chains import (
    REFLECTIVE,
    Chain,
    Made,
    boxed,
    corrected,
    holds,
    read_chain,
    reexamined,
    verified,
)
from data_prep.steps.step import (
    MAX_BAD_RECORDS,
    UNREADABLE_RECORDS,
    NoSamples,
    counted,
    finished_report,
    make_at_once,
    readable,
    refuse_damage,
    refuse_other_files,
)
from infimed_jax.data.images import ImageError
from infimed_jax.data.prompts import LETTERS, exchange
from infimed_jax.data.sample import Question, Sample
from infimed_jax.data.storage import Samples
from infimed_jax.data.training import open_for_training
from infimed_jax.errors import UserError
from infimed_jax.progress import Report
from infimed_jax.rl.rewards.verifiable import well_formed

VERSION = 2
"""Version of prompts, patterns, joints and the report; raise it when they change."""
SYSTEM = {
    "en": "You are an experienced physician who reads medical images. First reason step by step about what the image "
    "shows, inside <think> and </think>. Then give the answer alone in \\boxed{}, and nothing after it.",
    "zh": "你是一位经验丰富、擅长阅读医学影像的医生。请先在<think>和</think>之间逐步推理影像所见，"
    "然后仅在\\boxed{}中给出答案，其后不要再写任何内容。",
}
LOOK_AGAIN = {
    "en": "Look at the image once more. Inside <think> and </think>, describe what in it bears on the question, "
    "whether or not it fits what you said. Then give your answer alone in \\boxed{}.",
    "zh": "请再看一遍影像。在<think>和</think>之间描述影像中与该问题有关的所见，无论其是否支持你之前的说法，"
    "然后仅在\\boxed{}中给出你的答案。",
}


@dataclass(frozen=True)
class Plan:
    """How chains of thought are sampled and which are kept."""

    draws: int = 4
    """Replies sampled for a question."""
    keep: int = 1
    """Maximum samples made from a question."""
    temperature: float = 1.0
    """Sampling temperature at the endpoint."""
    max_tokens: int = 2048
    """Maximum tokens of a reply, thoughts included."""
    sparse_words: int = 5
    """Sources whose median gold answer has at most this many words get reflective patterns; our choice, 0: none do."""
    seed: int = 0
    """Seed of draws and patterns."""

    def __post_init__(self) -> None:
        if min(self.draws, self.keep, self.max_tokens) < 1:
            raise UserError("draws, samples kept and tokens of a reply must be at least 1")
        if self.temperature <= 0 < self.draws - 1:
            raise UserError("several draws need a temperature above 0: else they are one")
        if self.sparse_words < 0:
            raise UserError("the words of a sparse answer must not be negative")


@dataclass(frozen=True)
class Outcome:
    """What became of one question."""

    made: tuple[Made, ...]
    right: int
    """Draws that reached the gold answer in the asked form."""
    reasons: tuple[str, ...]
    """Why draws were rejected; fixed phrases."""
    failed: str = ""
    """Why it could not be asked."""
    alike: bool = False
    """Several draws, all equal."""


def reflect(
    folder: Path,
    output: Path,
    endpoint: Endpoint,
    plan: Plan | None = None,
    *,
    cache: Path | None = None,
    max_bad_records: float = MAX_BAD_RECORDS,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Write the dataset `output` of questions with reasoning and the report `output.json`, which is returned.

    Ids are the question's with `/reflect-N`; where a sample comes from stands in its `meta`. Replies are kept in
    `cache` (by default `output.cache` beside it), so a stopped run goes on where it was and a second one sends nothing.
    UserError: a source may not be sent to the endpoint, the budget is reached, or nothing reached its answer.
    """
    plan = plan or Plan()
    dataset = open_for_training(folder)
    check_sources(endpoint, (origin.partition("/")[0] for origin in dataset.manifest["origins"]))
    recipe = {
        "step": "reflect",
        "version": VERSION,
        "from": dataset.fingerprint,
        "address": endpoint.chat_url,
        "model": endpoint.model,
        "image_side": endpoint.image_side,
        "plan": vars(plan),
    }
    finished = finished_report(output, recipe)
    if finished is not None and not any(reason.startswith(BY_ENDPOINT) for reason in finished["rejected"]):
        return finished  # else what the endpoint failed at is asked again
    refuse_other_files(output, [folder])
    unreadable: list[str] = []
    asked, left_out, words = _questions(dataset, unreadable)
    refuse_damage(unreadable, len(dataset), max_bad_records)
    sparse = {source: plan.sparse_words > 0 and median(found) <= plan.sparse_words for source, found in words.items()}
    outcomes: dict[int, Outcome] = {}
    right = 0

    def done(item: tuple[int, Sample], outcome: Outcome) -> None:
        nonlocal right
        outcomes[item[0]] = outcome
        right += bool(outcome.made)
        if on_progress is not None:
            on_progress(len(outcomes), len(asked), f"{len(outcomes)}/{len(asked)} questions, {right} reached")

    async def job(client: ChatClient, item: tuple[int, Sample]) -> Outcome:
        return await _ask(client, item[1], plan, sparse[item[1].source])

    cache = cache or output.with_name(f"{output.name}.cache")
    output.parent.mkdir(parents=True, exist_ok=True)
    account = run_jobs(endpoint, cache, ((number, dataset[number]) for number in asked), job, done)
    report = {
        "from": str(folder),
        "plan": vars(plan),
        "left_out": left_out,
        UNREADABLE_RECORDS: unreadable,
        "median_answer_words": {source: median(found) for source, found in sorted(words.items())},
        "reflective_sources": sorted(source for source, value in sparse.items() if value),
        **_count(asked, outcomes),
        "account": account,
    }

    made = repr([(number, outcome.made) for number, outcome in sorted(outcomes.items())])
    try:
        return make_at_once(
            output,
            name="reflection",
            recipe=recipe | {"chains": hashlib.sha256(made.encode()).hexdigest()},
            origin=dataset,
            samples=_samples(dataset, outcomes, endpoint),
            report=report,
        )
    except NoSamples as error:
        counted = ", ".join(f"{reason}: {n}" for reason, n in (report["rejected"] | report["failed"]).items())
        fix = unsampled(report) or "try another model or --draws"
        if sum(report["failed"].values()) == len(asked):
            fix = "fix that and run the same command"
        raise UserError(f"no reply to {folder} reached its answer ({counted}): {fix}") from error


def unsampled(report: dict[str, Any]) -> str:
    """The warning where draws never differ, as where a server takes no temperature; otherwise empty."""
    answered = report["questions"] - sum(report["failed"].values())
    if not answered or report["alike"] < answered:
        return ""
    return (
        f"all draws of each of {answered:,} questions are the same, so the endpoint does not sample and they are one "
        "draw: see its settings (transformers serve follows do_sample in the model's generation_config.json)"
    )


def _questions(dataset: Samples, unreadable: list[str]) -> tuple[dict[int, str], dict[str, int], dict[str, list[int]]]:
    """Numbers of what can be asked with their sources, the rest by reason, and the words of each source's answers.

    The names of damaged records join `unreadable`.
    """
    asked, left_out, words = {}, Counter(), defaultdict(list)
    for number, sample in readable(dataset, range(len(dataset)), unreadable):
        if reason := _problem(sample):
            left_out[reason] += 1
            continue
        asked[number] = sample.source
        words[sample.source].append(_words(sample))
    left_out = counted(dict(sorted(left_out.items())), unreadable)
    if not asked:
        raise UserError(f"{dataset.folder} has no question to reason about: {left_out}")
    return asked, left_out, words


def _problem(sample: Sample) -> str:
    if not isinstance(sample, Question) or not sample.answer.strip():
        return "no question with a gold answer"
    if sample.kind == "choice" and (len(sample.answer) != 1 or sample.answer not in LETTERS[: len(sample.options)]):
        return "answer that is no option"
    if not well_formed(boxed("x", sample.answer)):
        return "answer that no box can hold"
    return ""


def _words(sample: Question) -> int:
    """Words of the gold answer: of the option's text in a choice, and each Chinese character for half a word."""
    text = sample.answer
    if sample.kind == "choice":
        text = sample.options[ord(sample.answer) - ord("A")]
    chinese = sum("\u4e00" <= char <= "\u9fff" for char in text)
    return len(text.split()) if not chinese else -(-chinese // 2)


async def _ask(client: ChatClient, sample: Question, plan: Plan, sparse: bool) -> Outcome:
    language = sample.meta.get("language", "en")
    try:
        question = next(turn for turn in exchange(sample, reasoning=True) if turn.role == "user")
        body = parts(question.content, sample.images, client.endpoint.image_side)
    except ImageError as error:
        return Outcome((), 0, (), f"image: {error.reason}")
    except UserError:
        return Outcome((), 0, (), "question without a wording")
    messages = [speech("system", SYSTEM[language]), speech("user", body)]

    async def draw(number: int) -> Reply | str:
        try:
            return await client.chat(
                sample.source, messages, max_tokens=plan.max_tokens, temperature=plan.temperature, seed=number
            )
        except CallFailed as failure:
            return f"{BY_ENDPOINT}{failure.kind}"

    # All are waited for, also where the budget ends one: what is sent is paid, so its reply must reach the cache.
    replies = await asyncio.gather(*(draw(number) for number in range(plan.draws)), return_exceptions=True)
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    alike = plan.draws > 1 and len({reply if isinstance(reply, str) else reply.whole for reply in replies}) == 1
    right, wrong, reasons = [], [], []
    for number, reply in enumerate(replies):
        if isinstance(reply, str):
            reasons.append(reply)
            continue
        chain, reason = read_chain(reply, number, sample)
        if not reason:
            right.append(chain)
            continue
        reasons.append(reason)
        if chain is not None:
            wrong.append(chain)
    if not right:
        failed = reasons[0] if reasons and all(reason.startswith(BY_ENDPOINT) for reason in reasons) else ""
        return Outcome((), 0, tuple(reasons), failed, alike)
    rng = random.Random(int.from_bytes(hashlib.sha256(f"{plan.seed} {sample.id}".encode()).digest()[:8], "big"))
    rng.shuffle(right)
    made = [Made("plain", chain.thoughts, (chain.draw,)) for chain in right]
    if sparse:
        first = await _reflect(client, sample, right, wrong, messages, language, rng, plan)
        made = [first, *made] if first is not None else made
    kept = [one for one in made if holds(sample, one)][: plan.keep]
    return Outcome(tuple(kept), len(right), tuple(reasons), alike=alike)


async def _reflect(
    client: ChatClient,
    sample: Question,
    right: Sequence[Chain],
    wrong: Sequence[Chain],
    messages: list[Message],
    language: str,
    rng: random.Random,
    plan: Plan,
) -> Made | None:
    """The first pattern, in random order, that the draws allow; None where none does."""
    order = list(REFLECTIVE)
    rng.shuffle(order)
    for pattern in order:
        if pattern == "corrected" and wrong:
            return corrected(sample, rng.choice(wrong), right[0], language, rng)
        if pattern == "verified" and len(right) > 1 and right[0].thoughts != right[1].thoughts:
            return verified(sample, right[0], right[1], language, rng)
        if pattern == "reexamined" and sample.images:
            look = await _second_look(client, sample, right[0], messages, language, plan)
            if look is not None:
                return reexamined(sample, right[0], look, language, rng)
    return None


async def _second_look(
    client: ChatClient, sample: Question, chain: Chain, messages: list[Message], language: str, plan: Plan
) -> Chain | None:
    """What the model says after `chain` when it is asked to look again; None unless that reaches the answer too."""
    before = speech("assistant", boxed(chain.thoughts, sample.answer))
    again = [*messages, before, speech("user", LOOK_AGAIN[language])]
    try:
        reply = await client.chat(
            sample.source, again, max_tokens=plan.max_tokens, temperature=plan.temperature, seed=chain.draw
        )
    except CallFailed:  # counted by the client; another pattern, or the plain chain, does without
        return None
    look, reason = read_chain(reply, chain.draw, sample)
    return look if not reason and look is not None and look.thoughts != chain.thoughts else None


def _samples(dataset: Samples, outcomes: dict[int, Outcome], endpoint: Endpoint) -> Iterator[Sample]:
    """In the order of the questions."""
    for number in sorted(outcomes):
        outcome = outcomes[number]
        if not outcome.made:
            continue
        sample = dataset[number]
        for place, made in enumerate(outcome.made):
            meta = {
                "parent": sample.id,
                "reflection": made.pattern,
                "reasoning_by": endpoint.model,
                "reasoning_draws": ",".join(map(str, made.draws)),
                "reasoning_right": f"{outcome.right}/{outcome.right + len(outcome.reasons)}",
            }
            yield replace(sample, id=f"{sample.id}/reflect-{place}", reasoning=made.reasoning, meta=sample.meta | meta)


def _count(asked: dict[int, str], outcomes: dict[int, Outcome]) -> dict[str, Any]:
    """Questions by what became of them, draws by why they were rejected, samples by pattern; over all and by source."""
    sources: dict[str, Counter[str]] = defaultdict(Counter)
    rejected, failed, patterns = Counter(), Counter(), Counter()
    for number, source in asked.items():
        outcome = outcomes[number]
        rejected.update(outcome.reasons)
        patterns.update(made.pattern for made in outcome.made)
        if outcome.failed:
            failed[outcome.failed] += 1
        row = sources[source]
        row["questions"] += 1
        row["reached"] += bool(outcome.made)
        row["draws"] += outcome.right + len(outcome.reasons)
        row["draws_right"] += outcome.right
    return {
        "questions": len(asked),
        "reached": sum(bool(outcome.made) for outcome in outcomes.values()),
        "alike": sum(outcome.alike and not outcome.failed for outcome in outcomes.values()),
        "patterns": dict(sorted(patterns.items())),
        "rejected": dict(sorted(rejected.items())),
        "failed": dict(sorted(failed.items())),
        "sources": {source: dict(row) for source, row in sorted(sources.items())},
    }
