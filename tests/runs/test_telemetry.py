"""Counts against place-by-place counting, the printed sample against its rendering, and torn metrics files."""

import json
from pathlib import Path

import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.data.chat import load_tokenizer, render
from infimed_jax.data.sample import Sample, Turn
from infimed_jax.runs.meter import batch_counts
from infimed_jax.runs.metrics import MetricsLog, read_metrics
from infimed_jax.train.stage import describe_row, mean_loss

PLACES = 4
"""Visual tokens of an image."""


def _segment(rng: np.random.Generator, images: list[np.ndarray]) -> Segment:
    text = int(rng.integers(3, 8))
    visual = np.repeat([False, True, False], [1, PLACES * len(images), text])
    targets = np.where(visual, 0, rng.integers(0, 2, len(visual))).astype(np.float32)
    return Segment(rng.integers(1, 99, len(visual)).astype(np.int32), targets, visual, tuple(images))


def test_counts_equal_counting_place_by_place():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(4)]
    # One image, an image that two segments share, no image, a row of padding.
    plan = [[[pictures[0]]], [[pictures[1]], [pictures[1], pictures[2]]], [[]], []]
    segments = [[_segment(rng, images) for images in row] for row in plan]
    batch = stack_rows([build_row(row, context=48, images=3, visual_tokens=PLACES, image_size=8) for row in segments])
    counts = {name: int(value) for name, value in batch_counts(batch, PLACES).items()}
    learnt = sum(
        segment.targets[t] > 0 and not segment.visual[t]
        for row in segments
        for segment in row
        for t in range(1, len(segment))
    )
    assert counts == {
        "tokens": sum(len(segment) for row in segments for segment in row),
        "loss_tokens": learnt,
        "images": 1 + 2 + 0 + 0,
        "pairs": sum(len(segment) * (len(segment) + 1) // 2 for row in segments for segment in row),
    }


def test_the_printed_sample_shows_places_and_what_is_learnt(tokenizer_folder: Path):
    tokenizer = load_tokenizer(tokenizer_folder)
    turns = (Turn("user", (0, "\nwhat is the heart?")), Turn("assistant", ("large",)))
    sample = Sample("toy/train/0", "toy", "train", "open", (b"",), turns)
    segment = render(sample, tokenizer, PLACES, [np.zeros((8, 8, 3), np.uint8)])
    shape = {"context": 96, "images": 1, "visual_tokens": PLACES, "image_size": 8}
    batch = stack_rows([build_row([], **shape), build_row([segment, segment], **shape)])
    text = describe_row(batch, tokenizer)
    assert text == (
        "<|im_start|>user\n[4 image places]\nwhat is the heart?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n«large<|im_end|>»\n"
    )


LOGGING = config.Config(train=config.Train(log_every=1))


def _row(step: int, loss: float = 1.0, skipped: int = 0) -> dict:
    return {"step": step, "loss": loss, "skipped": skipped}


def test_resuming_drops_the_lines_of_steps_that_run_again_and_a_torn_one(tmp_path: Path):
    with MetricsLog(tmp_path, 0, LOGGING) as log:
        for step in (1, 2, 3):
            log.write(_row(step, loss=step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    with MetricsLog(tmp_path, 2, LOGGING) as log:
        log.write(_row(3, loss=30))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1, 2, 30]


def test_a_loss_that_is_not_finite_is_null_in_the_file_and_itself_in_memory(tmp_path: Path):
    """Also after a resume, which writes the lines before it again."""
    for start in (0, 1):
        with MetricsLog(tmp_path, start, LOGGING) as log:
            log.write(_row(start + 1, loss=float("nan"), skipped=1))
        assert all(np.isnan(row["loss"]) for row in log.rows)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines] == [None, None]
    assert [np.isnan(row["loss"]) for row in read_metrics(tmp_path)] == [True, True]


def test_processes_other_than_the_first_write_nothing(tmp_path: Path):
    with MetricsLog(tmp_path, 0, LOGGING, active=False) as log:
        log.write(_row(1))
    assert log.rows == [_row(1)] and not any(tmp_path.iterdir())


def test_mean_loss_takes_a_twentieth_and_no_skipped_update():
    rows = [_row(step, loss=float(step)) for step in range(1, 41)]
    assert mean_loss(rows) == 1.5 and mean_loss(rows, last=True) == 39.5
    rows[0] = _row(1, loss=float("nan"), skipped=1)
    assert mean_loss(rows) == 2.5
    assert mean_loss(rows[2:3]) == 3
    assert np.isnan(mean_loss([])) and mean_loss(rows[1:], last=True) == pytest.approx(39.5)
