"""Intervals and tests against SciPy, brute force, a bootstrap over images, and simulated coverage."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.evaluation.statistics import accuracy, compare, exact_mcnemar, macro_mean, majority_baseline


@dataclass(frozen=True)
class Row:
    id: str
    image_id: str
    correct: bool


def rows(scores, images=None):
    images = range(len(scores)) if images is None else images
    return [Row(f"q{i}", f"i{image}", bool(score)) for i, (score, image) in enumerate(zip(scores, images, strict=True))]


def clustered(rng, images, questions, spread):
    """Scores bool[n] whose chance varies from image to image by `spread`, and the image of each."""
    chance = np.clip(0.6 + spread * rng.standard_normal(images), 0, 1)
    index = np.repeat(np.arange(images), questions)
    return rng.random(len(index)) < chance[index], index


def test_one_question_an_image_is_the_usual_standard_error():
    scores = np.random.default_rng(0).random(200) < 0.7
    result = accuracy(rows(scores))
    assert (result.correct, result.n, result.images) == (scores.sum(), 200, 200)
    assert result.accuracy == pytest.approx(scores.mean())
    assert result.standard_error == pytest.approx(scipy.stats.sem(scores.astype(float)))
    exact = scipy.stats.binomtest(int(scores.sum()), 200).proportion_ci(0.95, method="exact")
    jeffreys = scipy.stats.beta(scores.sum() + 0.5, 200 - scores.sum() + 0.5).interval(0.95)
    assert (result.low, result.high) == pytest.approx(np.mean([exact, jeffreys], axis=0))


def test_clustered_standard_error_is_the_double_sum_over_pairs():
    scores, images = clustered(np.random.default_rng(1), 12, 7, 0.3)
    residual = scores - scores.mean()
    double = sum(
        residual[i] * residual[j] for i in range(84) for j in range(84) if images[i] == images[j]
    )  # Miller 2024, equation 4, times the small-sample factor
    expected = math.sqrt(12 / 11 * double) / 84
    assert accuracy(rows(scores, images)).standard_error == pytest.approx(expected)


def test_asking_each_question_twice_gains_nothing():
    scores, images = clustered(np.random.default_rng(2), 40, 1, 0.3)
    once, twice = accuracy(rows(scores, images)), accuracy(rows(np.tile(scores, 2), np.tile(images, 2)))
    assert twice.standard_error == pytest.approx(once.standard_error)
    assert twice.n == 2 * once.n and twice.images == once.images


def test_clustered_standard_error_agrees_with_a_bootstrap_over_images():
    rng = np.random.default_rng(3)
    scores, images = clustered(rng, 80, 5, 0.4)
    per_image = scores.reshape(80, 5).mean(1)
    draws = per_image[rng.integers(0, 80, (4000, 80))].mean(1)
    naive = scipy.stats.sem(scores.astype(float))
    error = accuracy(rows(scores, images)).standard_error
    assert error == pytest.approx(draws.std(), rel=0.05)  # 4000 draws: 1.1 % of noise, and the factor 80/79
    assert error > 1.3 * naive


def test_many_questions_of_many_images_have_the_normal_interval():
    scores, images = clustered(np.random.default_rng(4), 3000, 4, 0.3)
    result = accuracy(rows(scores, images))
    low, high = scipy.stats.norm.interval(0.95, result.accuracy, result.standard_error)
    assert (result.low, result.high) == pytest.approx((low, high), abs=1e-3)


def test_the_macro_mean_is_as_uncertain_as_a_mean_of_independent_accuracies():
    rng = np.random.default_rng(8)
    shares = [accuracy(rows(*clustered(rng, images, 3, 0.3))) for images in (40, 200, 700)]
    draws = [rng.normal(share.accuracy, share.standard_error, 100_000) for share in shares]
    mean, low, high = macro_mean(shares)
    assert mean == pytest.approx(np.mean([share.accuracy for share in shares]))
    expected = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    assert (low, high) == pytest.approx(expected, abs=1e-3)  # 100,000 draws: 2e-4


def test_the_detectable_difference_is_found_in_80_of_100_test_sets():
    rng = np.random.default_rng(9)
    smallest = compare(*_pair(rng, 20_000, 0.1)).detectable * 10  # of 200 questions
    found = sum(compare(*_pair(rng, 200, smallest)).p_value < 0.05 for _ in range(600))
    assert 0.74 < found / 600 < 0.86  # 3.5 standard errors of 600 trials


def _pair(rng, n, difference):
    """Two runs, of which the first is better by `difference`; they differ on a fifth of the questions."""
    b = rng.random(n) < 0.5
    draw = rng.random(n)
    lost, won = draw < 0.2 - difference, draw < 0.2 + difference
    return rows(np.where(b, ~lost, won)), rows(b)


@pytest.mark.parametrize("images", [2, 5, 40])
def test_all_right_or_all_wrong_is_not_taken_for_certain(images):
    index = np.repeat(np.arange(images), 3)
    right, wrong = accuracy(rows(np.ones(3 * images), index)), accuracy(rows(np.zeros(3 * images), index))
    exact = scipy.stats.binomtest(images, images).proportion_ci(0.95, method="exact")
    assert (right.low, right.high) == pytest.approx((exact.low, 1.0))
    assert (wrong.low, wrong.high) == pytest.approx((0.0, 1 - exact.low))


def test_images_that_agree_by_chance_are_not_taken_for_certain():
    scores, images = [1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2]
    result = accuracy(rows(scores, images))
    assert result.standard_error == pytest.approx(scipy.stats.sem(scores))
    assert result.low < 0.5 < result.high


def test_one_image_says_nothing_about_others():
    result = accuracy(rows([1, 0, 1], [0, 0, 0]))
    assert math.isnan(result.standard_error) and (result.low, result.high) == (0.0, 1.0)


def test_no_questions_are_refused():
    with pytest.raises(UserError):
        accuracy([])
    with pytest.raises(UserError):
        majority_baseline([])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40))
def test_interval_holds_the_accuracy_and_stays_a_share(pairs):
    result = accuracy(rows(*zip(*pairs, strict=True)))
    assert 0 <= result.low <= result.accuracy <= result.high <= 1
    assert result.correct <= result.n


def test_paired_comparison_equals_a_paired_test_where_images_are_single():
    rng = np.random.default_rng(5)
    a, b = rng.random(150) < 0.7, rng.random(150) < 0.6
    result = compare(rows(a), list(reversed(rows(b))))
    expected = scipy.stats.ttest_rel(a.astype(float), b.astype(float))
    assert result.difference == pytest.approx(a.mean() - b.mean())
    assert result.z == pytest.approx(expected.statistic)
    assert result.p_value == pytest.approx(2 * scipy.stats.norm.sf(abs(expected.statistic)))
    half = scipy.stats.norm.ppf(0.975) * scipy.stats.sem(a.astype(float) - b)
    assert (result.low, result.high) == pytest.approx((a.mean() - b.mean() - half, a.mean() - b.mean() + half))
    assert (result.only_a, result.only_b) == ((a & ~b).sum(), (b & ~a).sum())
    assert result.mcnemar_p == pytest.approx(scipy.stats.binomtest(result.only_a, result.only_a + result.only_b).pvalue)


def test_paired_comparison_clusters_the_difference_by_image():
    rng = np.random.default_rng(6)
    images = np.repeat(np.arange(30), 4)
    better = np.repeat(rng.random(30) < 0.4, 4)  # on whole images
    b = rng.random(120) < 0.5
    a = b | better
    per_image = (a.astype(float) - b).reshape(30, 4).sum(1)
    centred = per_image - 4 * per_image.sum() / 120
    result = compare(rows(a, images), rows(b, images))
    assert result.standard_error == pytest.approx(math.sqrt(30 / 29 * (centred**2).sum()) / 120)
    assert result.standard_error > compare(rows(a), rows(b)).standard_error


def test_paired_test_is_calibrated_where_the_runs_are_equally_good():
    rng = np.random.default_rng(7)
    false_alarms = 0
    for _ in range(500):
        a, images = clustered(rng, 50, 3, 0.3)
        b = np.where(rng.random(150) < 0.3, rng.permutation(a), a)
        false_alarms += compare(rows(a, images), rows(b, images)).p_value < 0.05
    assert 0.015 < false_alarms / 500 < 0.085  # 0.05 with 3.5 standard errors of 500 trials to each side


def test_comparing_a_run_with_itself_or_backwards():
    a, b = rows([1, 0, 1, 1, 0]), rows([1, 1, 0, 1, 1])
    same, there, back = compare(a, a), compare(a, b), compare(b, a)
    assert (same.difference, same.z, same.p_value, same.mcnemar_p) == (0, 0, 1, 1)
    assert there.difference == -back.difference and there.p_value == back.p_value
    assert (there.only_a, there.only_b) == (back.only_b, back.only_a)


@pytest.mark.parametrize("images", [2, 5, 40])
def test_runs_that_are_graded_alike_are_not_taken_for_equal_for_certain(images):
    index = np.repeat(np.arange(images), 3)
    run = rows(np.arange(3 * images) % 2, index)
    bound = scipy.stats.binomtest(0, images).proportion_ci(0.95, method="exact").high  # of images that differ
    assert (compare(run, run).low, compare(run, run).high) == pytest.approx((-bound, bound))


@pytest.mark.parametrize("images", [2, 5, 40])
def test_questions_that_all_differ_one_way_are_not_taken_for_certain(images):
    index = np.repeat(np.arange(images), 3)
    ones, zeros = rows(np.ones(3 * images), index), rows(np.zeros(3 * images), index)
    better, worse = compare(ones, zeros), compare(zeros, ones)
    exact = scipy.stats.binomtest(images, images)  # each image one way, as of a fair coin
    share = exact.proportion_ci(0.95, method="exact")
    assert better.p_value == worse.p_value == pytest.approx(exact.pvalue)
    assert (better.low, better.high) == pytest.approx((2 * share.low - 1, 1.0))
    assert (worse.low, worse.high) == pytest.approx((-1.0, 1 - 2 * share.low))


def test_a_single_image_cannot_be_tested():
    result = compare(rows([1, 1], [0, 0]), rows([0, 1], [0, 0]))
    assert math.isnan(result.p_value) and (result.low, result.high) == (-1.0, 1.0)


def test_other_questions_cannot_be_compared():
    for other in (rows([1]), [Row("x", "i0", True), Row("q1", "i1", True)], rows([1, 1, 1])):
        with pytest.raises(UserError, match="same questions"):
            compare(rows([1, 0]), other)


@given(st.integers(0, 120), st.integers(0, 120))
def test_mcnemar_is_the_exact_binomial_test(a, b):
    expected = scipy.stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert exact_mcnemar(a, b) == pytest.approx(expected)


def test_mcnemar_of_a_large_test_set():
    assert exact_mcnemar(9000, 8600) == pytest.approx(scipy.stats.binomtest(9000, 17600).pvalue)


def question(kind, answer, template="", options=(), **meta):
    meta = {"template": template, **meta} if template else meta
    return Question(
        id="q", source="s", split="t", images=(), kind=kind, question="Q?", answer=answer, options=options, meta=meta
    )


def test_majority_answer_of_each_template():
    samples = [question("yes_no", a, "size") for a in ("yes", "yes", "no")]
    samples += [question("yes_no", a, "side") for a in ("no", "no", "no", "yes")]
    samples += [question("open", a, "organ") for a in ("Liver", "the liver", "lung")]
    baseline = majority_baseline(samples)
    assert baseline.answers == {"yes_no: size": "yes", "yes_no: side": "no", "open: organ": "liver"}
    assert baseline.correct == (True, True, False, True, True, True, False, True, True, False)
    assert baseline.accuracy == 0.7


def test_ties_take_the_alphabetically_first_answer():
    baseline = majority_baseline([question("yes_no", a, "t") for a in ("yes", "no", "yes", "no")])
    assert baseline.answers == {"yes_no: t": "no"} and baseline.accuracy == 0.5


def test_a_choice_takes_the_stronger_of_letter_and_text():
    orders = [("ct", "mr"), ("mr", "ct"), ("ct", "mr"), ("mr", "ct")]
    by_text = [question("choice", "AB"[order.index("ct")], "modality", order) for order in orders]
    assert majority_baseline(by_text).answers == {"choice: modality": "ct"}
    assert majority_baseline(by_text).accuracy == 1
    by_letter = [question("choice", "B", "size", (f"{i} cm", f"{i + 7} cm")) for i in range(4)]
    assert majority_baseline(by_letter).answers == {"choice: size": "B"}
    mixed = [("A", ("ct", "mr")), ("A", ("ct", "mr")), ("A", ("mr", "ct")), ("B", ("ct", "mr"))]
    baseline = majority_baseline([question("choice", letter, "both", options) for letter, options in mixed])
    assert (baseline.answers, baseline.accuracy) == ({"choice: both": "A"}, 0.75)  # by text, one half


def test_template_falls_back_to_question_type_and_kinds_stay_apart():
    samples = [question("yes_no", "yes", question_type="SIZE"), question("open", "big", question_type="SIZE")]
    samples.append(question("yes_no", "no"))
    assert set(majority_baseline(samples).answers) == {"yes_no: SIZE", "open: SIZE", "yes_no: any"}


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from("abc")), min_size=1))
def test_no_constant_answer_a_template_beats_the_baseline(pairs):
    samples = [question("yes_no", answer, template) for answer, template in pairs]
    best = sum(
        max(sum((answer, template) == (guess, t) for answer, t in pairs) for guess in ("yes", "no"))
        for template in {t for _, t in pairs}
    )
    assert sum(majority_baseline(samples).correct) == best
