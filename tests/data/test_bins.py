"""Bins: the textbook's for First-Fit-Decreasing; for both packers whole, within the budgets, and above the bound."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax.data import bins
from infimed_jax.data.bins import first_fit_decreasing, least_bins, minimum_bin_slack


def textbook(lengths, images, context, budget):
    """First-Fit-Decreasing, one item and one bin at a time."""
    held = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], -images[i], i)):
        for members in held:
            tokens = sum(lengths[i] for i in members) + lengths[item]
            if tokens <= context and sum(images[i] for i in members) + images[item] <= budget:
                members.append(item)
                break
        else:
            held.append([item])
    return [sorted(members) for members in held]


def lists(offsets, items):
    return [items[a:b].tolist() for a, b in itertools.pairwise(offsets)]


@st.composite
def problems(draw):
    context, budget = draw(st.integers(1, 40)), draw(st.integers(0, 4))
    kinds = draw(st.lists(st.tuples(st.integers(1, context), st.integers(0, budget)), min_size=1, max_size=8))
    items = draw(st.lists(st.sampled_from(kinds), max_size=70))  # few kinds: runs of equal items are the fast path
    return [a for a, _ in items], [b for _, b in items], context, budget


@settings(max_examples=400, deadline=None)
@given(problems())
def test_first_fit_decreasing_is_the_textbooks(problem):
    assert lists(*first_fit_decreasing(*problem)) == textbook(*problem)


@pytest.mark.parametrize("pack", [first_fit_decreasing, minimum_bin_slack])
@settings(max_examples=200, deadline=None)
@given(problem=problems(), scale=st.sampled_from([1, 5, 30_000]))
def test_every_item_once_within_both_budgets_and_no_fewer_bins_than_can_be(pack, problem, scale):
    lengths, images, context, budget = problem
    before = bins._SAMPLE_SIZE
    bins._SAMPLE_SIZE = scale  # so that a few items are packed as millions are
    try:
        packed = lists(*pack(*problem))
    finally:
        bins._SAMPLE_SIZE = before
    assert sorted(itertools.chain(*packed)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= context for members in packed)
    assert all(sum(images[i] for i in members) <= budget for members in packed)
    assert least_bins(*problem) <= len(packed) <= len(textbook(*problem))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_bound_is_martello_and_toths(problem):
    """Their L2, item by item: for every size below which items are left out of account."""
    lengths, images, context, budget = problem
    bounds = [-(-sum(images) // budget) if budget else 0]
    for small in range(context // 2 + 1):
        alone = [n for n in lengths if n > context - small]
        large = [n for n in lengths if context - small >= n > context / 2]
        rest = [n for n in lengths if context / 2 >= n >= small]
        room = len(large) * context - sum(large)
        bounds.append(len(alone) + len(large) + max(0, -(-(sum(rest) - room) // context)))
    assert least_bins(*problem) == max(bounds)


def test_similar_lengths_are_filled_to_the_last_token():
    """The paper's caption mix: 144 image tokens and about 50 of text."""
    rng = np.random.default_rng(0)
    lengths = 144 + np.clip(rng.lognormal(np.log(45), 0.45, 100_000), 5, 1500).astype(int)
    images = np.ones(len(lengths), int)
    fills = [lengths.sum() / 4096 / (len(pack(lengths, images, 4096, 24)[0]) - 1)
             for pack in (first_fit_decreasing, minimum_bin_slack)]  # fmt: skip
    assert fills[0] < 0.986 < 0.998 < fills[1]


@pytest.mark.parametrize("pack", [first_fit_decreasing, minimum_bin_slack])
def test_a_large_set_is_conserved_within_both_budgets(pack):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 0.8, 100_000), 20, 4096).astype(int)
    images = rng.integers(0, 9, len(lengths))
    offsets, order = pack(lengths, images, 4096, 24)
    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    assert np.add.reduceat(lengths[order], offsets[:-1]).max() <= 4096
    assert np.add.reduceat(images[order], offsets[:-1]).max() <= 24


@pytest.mark.parametrize("pack", [first_fit_decreasing, minimum_bin_slack])
@pytest.mark.parametrize(("length", "images"), [(0, 0), (9, 0), (3, 3), (3, -1)])
def test_items_beyond_a_budget_are_the_callers_mistake(pack, length, images):
    with pytest.raises(ValueError, match="each item needs"):
        pack([3, length], [0, images], 8, 2)
