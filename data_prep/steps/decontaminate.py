"""Test images and questions out of a training set, and the list of test questions that were in it.

An image is found by its bytes or by its looks, a question by runs of 8 normalised words. Shorter questions ("is there a
fracture?") are everybody's: they count only with the image they were asked about, or where the test has no image. So
do longer ones that the tests ask about three images or more ("Which part of the body does this image belong to?"): 48 %
of SLAKE's English and 81 % of its Chinese training questions share a wording with its test set, without those 11 % and
15 %.

Looks are compared twice: by a hash, then, where that differs in at most 64 of 256 bits, by the correlation of what is
finer than outlines, for bodies are alike. Both thresholds were chosen on VQA-RAD's 315 images. Copies at JPEG quality
20, at half size, at 112 pixels, in grey, with another gamma, cropped by 2 % on any sides, or several of these at once,
differ in at most 64 bits and correlate by 0.95 or more. No two different images (49,455 pairs) differ in fewer than 70
bits, and the 150 nearest pairs correlate by at most 0.80; drawn phantoms, of one body each, differ in as few as 11.
Not claimed: copies that are mirrored, inverted, turned or framed, or cropped by more than 2 %. Neighbouring slices of
one volume count as one image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.engine import HERE, Engine
from data_prep.reading.hashes import (
    ALIKE,
    THRESHOLD,
    distances,
    exact_hash,
    likeness,
    ngrams,
    normalised,
    perceptual_hashes,
)
from data_prep.steps.step import (
    MAX_BAD_RECORDS,
    Slice,
    Step,
    choose_kept,
    derived,
    make_dataset,
    readable,
    removed_report,
    slices,
)
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.sample import Question, Sample
from infimed_jax.data.storage import Samples, open_samples
from infimed_jax.errors import UserError
from infimed_jax.progress import Report

VERSION = 3
"""Version of what counts as a copy, and of the report."""
IMAGE, QUESTION = "image", "question"
_LONG = 8
"""Words from which a question stands for itself."""
_COMMON = 3
"""Images from which on a wording is everybody's."""


@dataclass
class Tests:
    """What may not be learnt: images and questions of all test sets, by the ids of their samples."""

    exact: dict[str, int] = field(default_factory=dict)
    """Hash of the bytes → number of the image."""
    looks: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.uint64))
    """u64[2n, 4]; `owner[i]` is the image of row i."""
    owner: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sets: list[Samples] = field(default_factory=list)
    place: list[tuple[int, int, int]] = field(default_factory=list)
    """Each image's place: its set, its sample's number, its number there. They are read again where looks are near."""
    of_image: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    of_words: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """n-gram → ids of the samples that ask it; short and common questions only of samples without an image."""
    asked: dict[str, str] = field(default_factory=dict)
    """Sample id → its normalised question."""
    undecodable: int = 0
    common: int = 0
    """Test samples whose wording is everybody's though it is long."""

    def image(self, number: int) -> bytes:
        where, sample, place = self.place[number]
        return self.sets[where][sample].images[place]


def read_tests(folders: Sequence[Path]) -> Tests:
    """UserError: no test set, one that is no prepared dataset, or one with a damaged record: what that asks could not
    be kept out."""
    if not folders:
        raise UserError("decontamination needs at least one test set: give --test")
    tests = Tests()
    about: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    looks: list[np.ndarray] = []
    owner: list[int] = []
    for folder in folders:
        samples = open_samples(folder)
        tests.sets.append(samples)
        unreadable: list[str] = []
        for number, sample in readable(samples, range(len(samples)), unreadable):
            for place, image in enumerate(sample.images):
                key = exact_hash(image)
                if key not in tests.exact:
                    tests.exact[key] = len(tests.exact)
                    tests.place.append((len(tests.sets) - 1, number, place))
                    hashes = perceptual_hashes(image)
                    tests.undecodable += hashes is None
                    for row in () if hashes is None else hashes:
                        looks.append(row)
                        owner.append(tests.exact[key])
                tests.of_image[tests.exact[key]].append(sample.id)
            words = normalised(_question(sample))
            tests.asked[sample.id] = " ".join(words)
            if len(words) >= _LONG or not sample.images:
                shown = tuple(sorted(tests.exact[exact_hash(image)] for image in sample.images))
                for ngram in ngrams(_question(sample)):
                    tests.of_words[ngram].append(sample.id)
                    about[ngram].add(shown)
        if unreadable:
            raise UserError(
                f"{len(unreadable)} records of the test set {folder} cannot be read ({unreadable[0]} first), so what "
                "they ask would stay: prepare it again"
            )
    asked_at_all = {id for ids in tests.of_words.values() for id in ids}
    for ngram, images in about.items():
        if len(images) >= _COMMON and () not in images:
            del tests.of_words[ngram]
    tests.common = len(asked_at_all) - len({id for ids in tests.of_words.values() for id in ids})
    if looks:
        tests.looks, tests.owner = np.stack(looks), np.array(owner)
    return tests


def _question(sample: Sample) -> str:
    """The bare question; of a chat or document, all that is not the assistant's."""
    if isinstance(sample, Question):
        return sample.question
    return "\n".join(turn.text for turn in as_turns(sample) if turn.role != "assistant")


def matches(sample: Sample, tests: Tests, seen: dict[str, list[int]]) -> dict[str, set[str]]:
    """Ids of the test samples whose image, or whose question, the sample has. `seen` remembers images."""
    images = {number for image in sample.images for number in _same_images(image, tests, seen)}
    by_image = {id for number in images for id in tests.of_image[number]}
    question = _question(sample)
    words = " ".join(normalised(question))
    by_words = {id for ngram in ngrams(question) for id in tests.of_words.get(ngram, ())}
    by_words |= {id for id in by_image if tests.asked[id] and tests.asked[id] == words}
    return {IMAGE: by_image, QUESTION: by_words}


def _same_images(image: bytes, tests: Tests, seen: dict[str, list[int]]) -> list[int]:
    key = exact_hash(image)
    if key not in seen:
        found = {tests.exact[key]} if key in tests.exact else set()
        hashes = perceptual_hashes(image) if len(tests.looks) else None
        if hashes is not None:
            near = set(tests.owner[(distances(hashes, tests.looks) <= THRESHOLD).any(0)].tolist()) - found
            found |= {number for number in near if likeness(image, tests.image(number)) >= ALIKE}
        seen[key] = sorted(found)
    return seen[key]


def decontaminate(
    input: Path,
    tests: Sequence[Path],
    output: Path,
    *,
    engine: Engine = HERE,
    max_bad_records: float = MAX_BAD_RECORDS,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Write a view of what no test set has to `output`, and `output.json`, which is returned.

    The report lists the removed samples, and under `affected` the test samples that training on `input` would touch:
    by image, by question, and by both, which is the whole question learnt by heart. UserError: nothing is left.
    """
    samples = open_samples(input)
    recipe = {
        "version": VERSION,
        "threshold": [THRESHOLD, ALIKE],
        "input": samples.fingerprint,
        "tests": (fingerprints := [open_samples(folder).fingerprint for folder in tests]),
    }
    known = read_tests(tests)
    return make_dataset(
        Step(
            output,
            name=samples.name,
            recipe=recipe,
            info=derived(samples),
            view_of=[samples],
            work=partial(_clean_slice, known),
            pieces=slices(samples),
            report=partial(_report, input, [str(folder) for folder in tests], fingerprints, known),
            records=len(samples),
            max_bad_records=max_bad_records,
            inputs=tests,
        ),
        engine,
        on_progress,
    )


def _clean_slice(tests: Tests, piece: Slice, folder: Path, name: str) -> dict[str, Any]:
    touched: dict[str, set[str]] = {IMAGE: set(), QUESTION: set(), "both": set()}
    seen: dict[str, list[int]] = {}

    def why_not(sample: Sample) -> str:
        found = matches(sample, tests, seen)
        for how, ids in (found | {"both": found[IMAGE] & found[QUESTION]}).items():
            touched[how] |= ids
        return " and ".join(how for how in (IMAGE, QUESTION) if found[how])

    facts = choose_kept(piece, folder, name, why_not)
    return facts | {"touched": {how: sorted(ids) for how, ids in touched.items()}}


def _report(
    input: Path,
    folders: list[str],
    fingerprints: list[str],
    tests: Tests,
    _: dict[str, Any],
    facts: list[dict[str, Any]],
) -> dict[str, Any]:
    affected: dict[str, set[str]] = {}
    for piece in facts:
        for how, ids in piece["touched"].items():
            affected.setdefault(how, set()).update(ids)
    any_way = affected[IMAGE] | affected[QUESTION]
    return {
        "input": str(input),
        "tests": folders,
        "test_fingerprints": fingerprints,
        "threshold_bits": THRESHOLD,
        "threshold_likeness": ALIKE,
        "test_samples": len(tests.asked),
        "test_images": len(tests.exact),
        "test_images_compared_by_bytes_only": tests.undecodable,
        "test_questions_of_many_images": tests.common,
        "affected_counts": {how: len(ids) for how, ids in affected.items()} | {"any": len(any_way)},
        "affected": {how: sorted(ids) for how, ids in affected.items()} | {"any": sorted(any_way)},
    } | removed_report(facts)
