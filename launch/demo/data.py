"""The demo's data: procedural images drawn, sources ingested, a tokenizer made, a mixture for each stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.sources.phantom import write_phantom
from data_prep.sources.shapes import write_shapes
from data_prep.steps.ingest import ingest
from data_prep.steps.mix import Part, mix
from data_prep.tokenizer import make_tokenizer
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.data.prompts import as_turns, exchange
from infimed_jax.data.sample import Question
from infimed_jax.data.storage import open_samples
from launch.demo.chain import Chain

PROCEDURAL = {"phantom": write_phantom, "shapes": write_shapes}


@dataclass(frozen=True)
class Prepared:
    """The data of a run."""

    images: int
    """Procedural images drawn."""
    samples: dict[str, int]
    """Samples of each stage's mixture."""
    vocabulary: int
    """Tokens of the tokenizer."""
    skipped: dict[str, dict[str, int]]
    """Prepared dataset -> records skipped, by reason."""

    @property
    def line(self) -> str:
        samples = sum(self.samples.values())
        return f"{self.images:,} images drawn, {samples:,} samples, {self.vocabulary:,} tokens in the vocabulary"


def make_data(chain: Chain) -> Prepared:
    """Prepared datasets under `data/prepared` and mixtures under `data/mixtures`."""
    plan, folder, progress = chain.plan, chain.folder / "data", chain.progress
    wanted = _splits(plan)
    skipped: dict[str, dict[str, int]] = {}
    images = 0
    for number, (source, splits) in enumerate(wanted.items()):
        progress.update(0.8 * number / len(wanted), source)
        raw = chain.options.input
        if source in PROCEDURAL:
            raw = PROCEDURAL[source](folder / "raw" / source, chain.options.seed, plan["images"][source])
            images += sum(plan["images"][source].values())
        for split, report in ingest(source, raw, folder / "prepared" / source, splits).items():
            if report["skipped"]:
                skipped[f"{source}/{split}"] = report["skipped"]
    progress.update(0.8, "tokenizer")
    if chain.options.tokenizer is None:
        make_tokenizer(_texts(chain), chain.tokenizer_folder)
    tokenizer = load_tokenizer(chain.tokenizer_folder)
    progress.update(0.9, "mixtures")
    counts = {}
    for stage, parts in plan["mixtures"].items():
        listed = [Part(folder / "prepared" / name, cap=cap) for name, cap in parts.items()]
        counts[stage] = mix(listed, folder / "mixtures" / stage, chain.options.seed)["samples"]
    for name, reasons in skipped.items():
        progress.say(f"        skipped in {name}: {by_reason(reasons)} (listed in {folder / 'prepared' / name}.json)")
    progress.say("        assess: skipped, no LLM endpoint is configured; every source is kept unrated")
    return Prepared(images, counts, len(tokenizer), skipped)


def by_reason(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items())


def _splits(plan: dict[str, Any]) -> dict[str, list[str]]:
    """Source -> its splits that any stage or the test needs."""
    wanted: dict[str, list[str]] = {}
    for name in [name for parts in plan["mixtures"].values() for name in parts] + [plan["test"]]:
        source, split = name.split("/")
        if split not in wanted.setdefault(source, []):
            wanted[source].append(split)
    return wanted


def _texts(chain: Chain) -> Iterator[str]:
    """The texts that the tokenizer learns from: every training text, questions in both wordings; no test question."""
    names = {name for parts in chain.plan["mixtures"].values() for name in parts}
    for name in sorted(names):
        for sample in open_samples(chain.folder / "data/prepared" / name):
            other = exchange(sample, not sample.reasoning) if isinstance(sample, Question) else ()
            for turn in (*as_turns(sample), *other):
                yield from (piece for piece in (*turn.content, turn.reasoning) if isinstance(piece, str))


def test_samples(chain: Chain) -> list[Any]:
    """The held-out questions, the first `questions_at_most` of them."""
    samples = open_samples(chain.folder / "data/prepared" / chain.plan["test"])
    return [samples[i] for i in range(min(len(samples), chain.plan["questions_at_most"]))]
