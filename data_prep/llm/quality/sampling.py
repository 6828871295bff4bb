"""Which samples are rated: so many of each source, drawn at random."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from data_prep.steps.step import readable
from infimed_jax.data.storage import Samples

Place = tuple[int, int]
"""(dataset, number in it)."""


def draw(
    datasets: Sequence[Samples], count: int, seed: int
) -> tuple[dict[str, list[Place]], dict[str, int], list[str]]:
    """By source, at most `count` places in reading order, and how many there are; then the damaged records' names.

    A source that stands in several datasets is drawn from all.

    A pure function of the datasets and the seed, and of no other source: adding one changes nothing for the rest.
    """
    places, unreadable = _places(datasets)
    chosen = {source: _choose(source, found, count, seed) for source, found in sorted(places.items())}
    return chosen, {source: len(places[source]) for source in chosen}, unreadable


def _choose(source: str, found: list[Place], count: int, seed: int) -> list[Place]:
    own = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")
    order = np.random.default_rng([seed, own]).permutation(len(found))[:count]
    return [found[i] for i in sorted(order)]


def _places(datasets: Sequence[Samples]) -> tuple[dict[str, list[Place]], list[str]]:
    """Every sample's place by its source. A dataset of one source, which is the usual one, need not be read."""
    places: dict[str, list[Place]] = defaultdict(list)
    unreadable: list[str] = []  # of which source they are, nobody can tell
    for number, dataset in enumerate(datasets):
        sources = {origin.partition("/")[0] for origin in dataset.manifest["origins"]}
        if len(sources) == 1:
            places[sources.pop()] += [(number, i) for i in range(len(dataset))]
            continue
        for i, sample in readable(dataset, range(len(dataset)), unreadable):
            places[sample.source].append((number, i))
    return places, unreadable
