"""How sure an accuracy is: intervals and tests whose unit is the image, not the question.

Questions about one image are not independent, so standard errors are clustered by image (Miller 2024, "Adding Error
Bars to Evals", arXiv 2411.00640, section 2.2). With G images, n questions, scores s and residuals r = s - mean(s):

    SE^2 = G / (G - 1) * 1 / n^2 * sum over images of (sum of r over the image's questions)^2

which with one question an image is the usual var(s) / n; that one also stands in where every image has the same share
of right answers, which few images may by chance.

Intervals of a share must hold for few questions too, where the normal one does not (Brown, Cai and DasGupta 2001,
"Interval Estimation for a Binomial Proportion"). With one question an image they lie halfway between Clopper-Pearson's
and Jeffreys'. With several, they are Wilson's for the number of independent questions that would be as uncertain
(Korn and Graubard 1998), by Student's t; two further images, one all right and one all wrong, each of weight 1/20, keep
that number from being overestimated where nearly all images agree. `tests/evaluation/test_coverage.py` simulates them.
Differences are normal.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import special

from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.answers import gold_value
from infimed_jax.evaluation.text import normalize

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""
POWER80 = 0.8416212335729143
"""80 % quantile of it."""
FEW_IMAGES = 30
"""Below so many distinct images an interval says little, and a warning says that."""


class Scored(Protocol):
    """A graded question: what a test needs of an evaluation's record."""

    @property
    def id(self) -> str: ...
    @property
    def image_id(self) -> str: ...
    @property
    def correct(self) -> bool: ...


@dataclass(frozen=True)
class Accuracy:
    correct: int
    n: int
    images: int
    """Distinct images, the clusters."""
    accuracy: float
    standard_error: float
    """NaN with a single image: nothing is known about others."""
    low: float
    high: float
    """95 % interval, inside [0, 1]."""


@dataclass(frozen=True)
class Comparison:
    """Run a minus run b on the same questions."""

    n: int
    images: int
    difference: float
    """Accuracy of a minus accuracy of b."""
    standard_error: float
    low: float
    high: float
    """95 % interval of the difference."""
    z: float
    p_value: float
    """Two-sided, normal, clustered by image; where all questions differ one way, the exact sign test of the images."""
    only_a: int
    """Questions that only a answers."""
    only_b: int
    """Questions that only b answers."""
    detectable: float
    """The smallest true difference that a test at 5 % finds on such questions with a chance of 80 %."""
    mcnemar_p: float
    """Two-sided exact McNemar test, which takes questions as independent."""


def accuracy(records: Sequence[Scored]) -> Accuracy:
    """Share of right answers with its clustered 95 % interval. Raises UserError for no questions."""
    if not records:
        raise UserError("no questions: an accuracy needs at least one")
    scores = np.array([float(record.correct) for record in records])
    clusters = [record.image_id for record in records]
    mean, error, images = _clustered_mean(scores, clusters)
    low, high = _share_interval(scores, clusters)
    correct = int(scores.sum())
    assert correct <= len(records)
    return Accuracy(correct, len(records), images, mean, error, low, high)


def compare(a: Sequence[Scored], b: Sequence[Scored]) -> Comparison:
    """Paired comparison of two runs, question by question; seeing against blind, or one checkpoint against another.

    Raises UserError where the two runs did not answer the same questions.
    """
    theirs = {record.id: record for record in b}
    if {record.id for record in a} != set(theirs) or len(a) != len(b) or len(theirs) != len(b) or not a:
        raise UserError(f"a paired comparison needs the same questions in both runs, not {len(a)} and {len(b)} others")
    differences = np.array([float(record.correct) - float(theirs[record.id].correct) for record in a])
    mean, error, images = _clustered_mean(differences, [record.image_id for record in a])
    low, high = _difference_interval(mean, error, images)
    only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
    z = math.nan if math.isnan(error) else mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return Comparison(
        n=len(a),
        images=images,
        difference=mean,
        standard_error=error,
        low=low,
        high=high,
        z=z,
        p_value=0.5 ** (images - 1) if math.isinf(z) else math.erfc(abs(z) / math.sqrt(2)),
        only_a=only_a,
        only_b=only_b,
        detectable=(Z95 + POWER80) * error,
        mcnemar_p=exact_mcnemar(only_a, only_b),
    )


def macro_mean(shares: Sequence[Accuracy]) -> tuple[float, float, float]:
    """Plain mean of several benchmarks' accuracies, and its 95 % interval, for benchmarks that share no image.

    NaN bounds where one of them has a single image.
    """
    if len(shares) == 1:
        return shares[0].accuracy, shares[0].low, shares[0].high
    mean = sum(share.accuracy for share in shares) / len(shares)
    half = Z95 * math.sqrt(sum(share.standard_error**2 for share in shares)) / len(shares)
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)


def exact_mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of `only_a` against `only_b` discordant pairs: a binomial test at 1/2, in exact integers."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    ways, total = 1, 0
    for k in range(fewer + 1):
        total += ways
        ways = ways * (n - k) // (k + 1)
    return total / 2 ** (n - 1)


@dataclass(frozen=True)
class Baseline:
    """The most frequent answer of each question template, learnt from the test answers themselves.

    No constant answer a template can do better, so what a model reaches below it needs no image. Templates with few
    questions flatter it: one alone is always right.
    """

    answers: dict[str, str]
    """`kind: template` → its most frequent answer; the alphabetically first of several equally frequent ones."""
    correct: tuple[bool, ...]
    """Right or wrong, in the order of the questions."""

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


def majority_baseline(samples: Sequence[Question]) -> Baseline:
    """A template is a kind with its `meta["template"]`, else its `meta["question_type"]`.

    A choice is answered by letter or by option text, whichever is right more often in its template.
    """
    if not samples:
        raise UserError("no questions: a baseline needs at least one")
    groups: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        template = sample.meta.get("template") or sample.meta.get("question_type") or "any"
        groups[f"{sample.kind}: {template}"].append(i)
    answers: dict[str, str] = {}
    correct = [False] * len(samples)
    for name, members in groups.items():
        readings = [[gold_value(samples[i]) for i in members]]
        if samples[members[0]].kind == "choice":
            readings.append([normalize(_option(samples[i])) for i in members])
        best = max(readings, key=lambda golds: max(Counter(golds).values()))  # the first, letters, where equal
        answers[name] = _most_frequent(best)
        for i, gold in zip(members, best, strict=True):
            correct[i] = gold == answers[name]
    return Baseline(answers, tuple(correct))


def _most_frequent(values: Sequence[str]) -> str:
    """The most frequent value; the alphabetically first of several."""
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]))[0]


def _option(sample: Question) -> str:
    return sample.options[ord(sample.answer) - ord("A")]


def _clustered_mean(scores: np.ndarray, clusters: Sequence[str]) -> tuple[float, float, int]:
    """Mean of f64[n], its clustered standard error (NaN with one cluster), and the number of clusters."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(index.max()) + 1
    mean = float(scores.mean())
    if count == 1:
        return mean, math.nan, 1
    sums = np.bincount(index, weights=scores - mean)
    error = math.sqrt(count / (count - 1) * float(sums @ sums)) / len(scores)
    if error < 1e-12:  # zero but for rounding
        error = float(scores.std(ddof=1)) / math.sqrt(len(scores))
    return mean, error, count


def _share_interval(scores: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """95 % interval of the mean of f64[n], each 0 or 1."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    n, images, right = len(scores), int(index.max()) + 1, float(scores.sum())
    if images == 1:
        return 0.0, 1.0
    if right in (0, n):
        bound = _extreme(images)
        return (1 - bound, 1.0) if right else (0.0, bound)
    if images == n:
        exact = special.betaincinv((right, right + 1), (n - right + 1, n - right), (0.025, 0.975))
        jeffreys = special.betaincinv(right + 0.5, n - right + 0.5, (0.025, 0.975))
        low, high = (exact + jeffreys) / 2
        return float(low), float(high)
    mean, questions = right / n, min(_effective_questions(scores, index), n)
    centre = mean + Z95**2 / (2 * questions)
    half = Z95 * math.sqrt((mean * (1 - mean) + Z95**2 / (4 * questions)) / questions)
    scale = 1 + Z95**2 / questions
    return (centre - half) / scale, (centre + half) / scale


def _extreme(images: int) -> float:
    """Upper bound of a share where no image has any, which has no spread to go by: Clopper-Pearson's."""
    return 1 - 0.025 ** (1 / images)


def _effective_questions(scores: np.ndarray, index: np.ndarray) -> float:
    """How many independent questions would leave the share of right answers as uncertain, scaled for Student's t."""
    n, images, weight = len(scores), int(index.max()) + 1, 1 / 20
    size, total = n / images, images + 2 * weight
    mean = (scores.sum() + weight * size) / (total * size)
    sums = np.bincount(index, weights=scores - mean)
    spread = float(sums @ sums) + weight * size**2 * (mean**2 + (1 - mean) ** 2)
    variance = total / (total - 1) * spread / (total * size) ** 2 * total / images
    return mean * (1 - mean) / variance * (Z95 / float(special.stdtrit(images - 1, 0.975))) ** 2


def _difference_interval(mean: float, error: float, images: int) -> tuple[float, float]:
    """95 % interval of a difference of shares; where all questions differ one way, from that of the share that does.

    Where none differs there is no spread to go by either: other images may, up to Clopper-Pearson's bound.
    """
    if math.isnan(error):
        return -1.0, 1.0
    if mean == error == 0:
        bound = _extreme(images)
        return -bound, bound
    if abs(mean) == 1.0:
        bound = 1 - 2 * _extreme(images)
        return (bound, 1.0) if mean > 0 else (-1.0, -bound)
    return max(mean - Z95 * error, -1.0), min(mean + Z95 * error, 1.0)
