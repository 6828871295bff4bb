"""`assess`: a language model rates a random part of every source; the means decide which sources are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.llm import BY_ENDPOINT, CallFailed, ChatClient, Endpoint, check_sources, parts, run_jobs, speech
from data_prep.llm.quality.parse import BadReply, Outcome, parse_rating
from data_prep.llm.quality.report import summarise, write_assessment
from data_prep.llm.quality.rubric import instructions
from data_prep.llm.quality.sampling import Place, draw
from infimed_jax.data.images import ImageError
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.sample import Sample
from infimed_jax.data.storage import UNREADABLE, CorruptRecord, Samples, open_samples, record_name
from infimed_jax.errors import UserError
from infimed_jax.files import to_json, write_json, write_text
from infimed_jax.progress import Report

TRIES = 3
"""Replies asked for until one is a rating; each further one is shown what was wrong."""
MAX_CHARACTERS = 12_000
"""Bound on a sample's text that the rater sees, and on a bad reply that it is shown again; cut samples are counted."""
_CUT = "\n[The sample goes on; it was cut here for this rating.]"


@dataclass(frozen=True)
class Plan:
    """How sources are rated and decided on."""

    samples: int = 500
    """Samples drawn at random from each source; the published number."""
    threshold: float = 3.0
    """Smallest mean Overall of a source that is kept; our choice, the paper gives none."""
    least_rated: float = 0.8
    """Share of the drawn samples that must have a rating for a decision; our choice. The others do not count as 0."""
    max_tokens: int = 2048
    """Maximum tokens of a reply, thoughts included."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_tokens < 1:
            raise UserError("the samples of a source and the tokens of a reply must be at least 1")
        if not 1 <= self.threshold <= 5:
            raise UserError(f"the threshold must lie in 1 to 5, as ratings do, not {self.threshold}")
        if not 0 < self.least_rated <= 1:
            raise UserError(f"the least share of rated samples must lie in (0, 1], not {self.least_rated}")


def assess(
    folders: Sequence[Path],
    output: Path,
    endpoint: Endpoint,
    plan: Plan,
    *,
    cache: Path | None = None,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Rate the datasets' sources; `output` gets assessment.json, ratings.jsonl, report.html, and decision.json.

    decision.json is what `data filter` reads: `{"sources": {name: {"keep", "reason", "mean_overall", "n", …}}}`. It is
    not written while a source lacks ratings. Returns the assessment. Replies are kept in `cache`, which is
    `output/cache` by default, so that another run of the same sends nothing.

    UserError: a source may not be sent to the endpoint, the budget is reached, the endpoint is of no use, or a source
    has too few ratings for a decision.
    """
    datasets = [open_samples(folder) for folder in folders]
    if len({dataset.fingerprint for dataset in datasets}) < len(datasets):
        raise UserError("a dataset is given twice: its samples would be rated twice")
    check_sources(endpoint, (o.partition("/")[0] for d in datasets for o in d.manifest["origins"]))
    output.mkdir(parents=True, exist_ok=True)
    (output / "decision.json").unlink(missing_ok=True)  # of an earlier run, which may have had another threshold
    chosen, sizes, unreadable = draw(datasets, plan.samples, plan.seed)
    places = [(source, place) for source, found in chosen.items() for place in found]
    outcomes: dict[Place, Outcome] = {}

    def done(item: tuple[str, Place, Sample | str], outcome: Outcome) -> None:
        outcomes[item[1]] = outcome
        if on_progress is not None:
            given_up = sum(o.rating is None for o in outcomes.values())
            on_progress(len(outcomes), len(places), f"{len(outcomes)}/{len(places)} samples, {given_up} given up")

    async def job(client: ChatClient, item: tuple[str, Place, Sample | str]) -> Outcome:
        return await _rate(client, item[0], item[2], plan)

    account = run_jobs(endpoint, cache or output / "cache", _read(datasets, places), job, done)
    ordered = [outcomes[place] for _, place in places]
    assessment = {
        "plan": vars(plan),
        "datasets": [{"folder": str(d.folder), "fingerprint": d.fingerprint} for d in datasets],
        "unreadable_records": unreadable,
        "sources": summarise(ordered, sizes, plan.threshold, plan.least_rated),
        "account": account,
    }
    _write(output, ordered, assessment)
    return assessment


def _write(output: Path, outcomes: Sequence[Outcome], assessment: dict[str, Any]) -> None:
    """All files, the decision last. UserError where a source cannot be decided on."""
    lines = [to_json(_line(outcome), ensure_ascii=False) for outcome in outcomes]
    write_text(output / "ratings.jsonl", "\n".join(lines) + "\n")
    write_json(output / "assessment.json", assessment)
    write_assessment(output / "report.html", assessment)
    sources = assessment["sources"]
    undecided = [name for name, row in sources.items() if row["keep"] is None]
    if undecided:
        why = "; ".join(f"{name}: {sources[name]['reason']} ({_usual(sources[name])})" for name in undecided)
        again = any(reason.startswith(BY_ENDPOINT) for name in undecided for reason in sources[name]["unrated"])
        fix = "run the same command again" if again else "try another --model or --max-tokens: replies are kept"
        raise UserError(f"no decision is written: {why}; see {output / 'report.html'}, and {fix}")
    fields = ("keep", "reason", "mean_overall", "n")
    decision = {name: {field: row[field] for field in fields} for name, row in sources.items()}
    threshold = assessment["plan"]["threshold"]
    write_json(output / "decision.json", {"sources": decision, "threshold": threshold})


def _usual(row: dict[str, Any]) -> str:
    """Why most of a source's samples have no rating."""
    reason, count = max(row["unrated"].items(), key=lambda item: item[1])
    return f"{count} by {reason}"


def _line(outcome: Outcome) -> dict[str, Any]:
    rating = outcome.rating and {key: score.model_dump() for key, score in outcome.rating.items()}
    return vars(outcome) | {"rating": rating}


def _read(
    datasets: Sequence[Samples], places: Sequence[tuple[str, Place]]
) -> Iterator[tuple[str, Place, Sample | str]]:
    """(source, place, sample), or the name of a record that cannot be read."""
    for source, place in places:
        dataset, number = datasets[place[0]], place[1]
        try:
            found: Sample | str = dataset[number]
        except CorruptRecord:
            found = record_name(dataset, number)
        yield source, place, found


async def _rate(client: ChatClient, source: str, sample: Sample | str, plan: Plan) -> Outcome:
    """Ask until the reply is a rating. Text and images of the sample go to the endpoint, and nowhere else."""
    if isinstance(sample, str):
        return Outcome(source, sample, None, UNREADABLE)
    content, cut = shown(sample)
    try:
        body = parts(content, sample.images, client.endpoint.image_side)
    except ImageError as error:
        return Outcome(source, sample.id, None, f"image: {error.reason}", cut)
    messages = [speech("system", instructions(sample.kind != "document")), speech("user", body)]
    reason = ""
    for number in range(TRIES):  # a seed each: the same bad reply again makes the same request
        try:
            reply = await client.chat(source, messages, max_tokens=plan.max_tokens, temperature=0.0, seed=number)
        except CallFailed as failure:
            return Outcome(source, sample.id, None, f"{BY_ENDPOINT}{failure.kind}", cut)
        try:
            if reply.finish == "content_filter":
                raise BadReply("refused by the endpoint's filter")
            return Outcome(source, sample.id, parse_rating(reply.text), cut=cut)
        except BadReply as bad:
            reason = "cut by the limit of tokens" if reply.finish == "length" else str(bad)
            complaint = f"That could not be read: {reason}. Reply with the JSON object alone, all six dimensions in it."
            # servers refuse empty speech, which thoughts that were cut leave behind
            shown_again = reply.text[:MAX_CHARACTERS] if reply.text.strip() else "…"
            messages = [*messages[:2], speech("assistant", shown_again), speech("user", complaint)]
    return Outcome(source, sample.id, None, f"reply: {reason}", cut)


def shown(sample: Sample) -> tuple[list[str | int], bool]:
    """The sample as the rater sees it, images in their places, and whether its text had to be cut."""
    pieces: list[str | int] = ["<sample>\n"]
    left, cut = MAX_CHARACTERS, False
    for turn in as_turns(sample):
        words = () if sample.kind == "document" else (f"\n[{turn.role}]\n",)
        thoughts = (f"(thoughts: {turn.reasoning})\n",) if turn.reasoning else ()
        for piece in (*words, *thoughts, *turn.content):
            if isinstance(piece, str):
                cut = cut or len(piece) > left
                pieces.append(piece[:left])
                left -= len(pieces[-1])
            else:
                pieces.append(piece)
    return [*(p for p in pieces if p != ""), *([_CUT] if cut else []), "\n</sample>"], cut
