"""The image check: who is swapped with whom, its interval, a run that sees its images and one that cannot."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from infimed_jax.data.batch import NO_IMAGE, Segment, build_row
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.data.storage import write_samples
from infimed_jax.models.params import init_params
from infimed_jax.runs.metrics import read_metrics
from infimed_jax.train.image_check import IMAGES, gain, hold
from infimed_jax.train.stage import train
from tests import tiny, two_sizes
from tests.train.conftest import MODEL

P = MODEL.visual_tokens


def row(images, model=MODEL, each=1):
    """A row of one segment for each `each` images: four words, then the images' places."""
    segments = []
    for start in range(0, len(images), each):
        own = tuple(images[start : start + each])
        places = sum(model.span(image).tokens for image in own)
        visual = np.array([False] * 4 + [True] * places)
        segments.append(Segment(np.arange(len(visual), dtype=np.int32), (~visual).astype(np.float32), visual, own))
    return build_row(segments, context=256, images=2, model=model)


def image(number, model=MODEL):
    return np.full_like(model.blank_image(), number)


def test_every_image_has_another_ones_place_and_segments_are_counted_by_their_own():
    rows = [row([image(2 * n), image(2 * n + 1)]) for n in range(IMAGES // 2)]
    held = hold([row([image(0)]), row([image(0)]), *rows], MODEL)  # the second row brings nothing new
    assert held.rows.tokens.shape[0] == 1 + IMAGES // 2
    own, other = held.rows.pixels.reshape(-1, 2, *image(0).shape)[..., 0, 0, 0], held.permuted[..., 0, 0, 0]
    used = held.rows.visual_index.max(axis=1)[:, None] >= P * np.arange(2)
    assert (own != other)[used].all() and set(own[used]) == set(other[used]) == set(range(IMAGES))
    assert (own == other)[~used].all()
    for tokens, images, visual, content in zip(
        held.rows.segment_ids, held.images, held.rows.visual_index, own, strict=True
    ):
        for segment in (1, 2):
            slot = visual[(tokens == segment) & (visual != NO_IMAGE)][:1] // P
            assert set(images[tokens == segment]) == ({int(content[slot[0]])} if len(slot) else set())
        assert (images[tokens == 0] == -1).all()


def test_too_few_images_are_no_check():
    assert hold([row([image(n)]) for n in range(IMAGES - 1)], MODEL) is None
    assert hold([row([image(7)])] * 200, MODEL) is None


def test_images_of_two_sizes_replace_their_like_and_one_without_a_like_is_not_counted():
    model = two_sizes.MODEL()
    small, large = (model.host_arrays(Image.new("RGB", size)) for size in ((8, 8), (16, 8)))
    assert model.span(small) != model.span(large)
    rows = [row([{**small, "cells": small["cells"] + n}], model) for n in range(IMAGES)]
    held = hold([row([{**large, "cells": large["cells"] + 200}], model), *rows], model)
    before, after = held.rows.pixels["cells"], held.permuted["cells"]
    assert [bool((before[r] != after[r]).any()) for r in range(IMAGES + 1)] == [False] + [True] * IMAGES
    np.testing.assert_array_equal(held.rows.pixels["grid"], held.permuted["grid"])
    assert (held.images[0] == -1).all()


def test_the_interval_is_the_paired_t_interval_where_each_image_has_one_target():
    rng = np.random.default_rng(0)
    difference, images = rng.normal(0.1, 1.0, (8, 10)), np.arange(80).reshape(8, 10)
    row = gain(difference, np.ones((8, 10)), images)
    expected = scipy.stats.ttest_1samp(difference.reshape(-1), 0).confidence_interval(0.95)
    assert row["image_gain"] == pytest.approx(difference.mean())
    assert (row["image_gain_low"], row["image_gain_high"]) == pytest.approx((expected.low, expected.high))
    repeated = gain(np.repeat(difference, 3, 1), np.ones((8, 30)), np.repeat(images, 3, 1))
    assert repeated == pytest.approx(row)  # more targets of the same images tell nothing new


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Red or blue images, all different, and a question that only they answer."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(96):
        pixels = rng.integers(0, 60, (16, 16, 3), np.uint8)
        pixels[..., 0 if number % 2 else 2] += 180
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        turns = (Turn("user", (0, "\nwhat is this?")), Turn("assistant", ("yes" if number % 2 else "no",)))
        samples.append(Chat(f"toy/train/{number}", "toy", "train", (buffer.getvalue(),), turns))
    write_samples(tmp_path / "coloured", samples, name="toy")
    return tmp_path / "coloured"


def test_a_run_that_sees_and_one_whose_projector_is_zero(stage, coloured, caplog):
    cfg = stage(rate=1e-2, global_batch=16, steps=40, train=("vision", "projector", "text"))
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset=str(coloured)))
    caplog.set_level("INFO")
    train(cfg)
    rows = read_metrics(cfg.train.output)
    measured = [row for row in rows if "image_gain" in row]
    assert [row["step"] for row in measured] == [1, 40]
    assert measured[-1]["image_gain_low"] > 0.05
    assert "does not use its images" not in caplog.text

    with tiny.one_device():
        blind = init_params(jax.random.key(0), cfg.model)
    blind["projector"] = jax.tree.map(np.zeros_like, blind["projector"])
    settings = dataclasses.replace(cfg.train, train=("text",), output=f"{cfg.train.output}_blind")
    train(dataclasses.replace(cfg, train=settings), params=blind)
    last = read_metrics(settings.output)[-1]
    assert last["image_gain"] == last["image_gain_low"] == last["image_gain_high"] == 0
    assert "step 40: the loss does not rise when each image is replaced" in caplog.text
    assert "step 1: the loss does not rise" not in caplog.text


@pytest.mark.parametrize("global_batch", [16])
def test_it_costs_one_percent_of_the_computation(global_batch, stage, coloured, caplog):
    """Two forward passes of the held rows; a step is three of its batch (Kaplan et al. 2020, arXiv 2001.08361)."""
    cfg = stage(global_batch=global_batch, steps=1)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset=str(coloured)))
    caplog.set_level("INFO")
    train(cfg)
    words = next(m for m in caplog.messages if m.startswith("image check:")).split()
    rows, every = int(words[2]), int(words[-2])
    computed = math.ceil(rows / global_batch) * global_batch
    assert 2 * computed / (3 * global_batch * every) <= 0.01 < 2 * computed / (3 * global_batch * (every - 1))
