"""What a step costs: counts against place-by-place counting, rows from a known clock, the trace."""

import jax
import numpy as np
import pytest

from infimed_jax import config, sharding
from infimed_jax.cost import chips, flops
from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.models.infimed import config as infimed
from infimed_jax.runs import meter
from infimed_jax.runs.meter import Meter, Trace, averaged, batch_counts

PLACES = 4
"""Visual tokens of an image."""
MODEL = infimed.Model(infimed.Vision(image_size=8, patch_size=4), infimed.Projector(visual_tokens=PLACES))
METRICS = {
    "loss": 2.5,
    "tokens": 600,
    "loss_tokens": 100,
    "images": 8,
    "bad_records": 1,
    "pairs": 9000.0,
    "non_finite": 0,
}


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
    batch = stack_rows([build_row(row, context=48, images=3, model=MODEL) for row in segments])
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


def test_a_row_is_the_counts_over_the_clock_and_the_peak(model, monkeypatch):
    now = iter([10.0, 14.0, 15.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(meter, "compile_seconds", lambda: 0.0)
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 1e9)
    cfg = config.Config(model=model, train=config.Train(compute_dtype="bfloat16"))
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    rows = Meter(cfg, mesh, total=12)
    first = rows.row(1, METRICS, 1e-4, 5, waited=1.0)
    assert (first["tokens_per_second"], first["images_per_second"], first["data_wait_share"]) == (150, 2, 0.25)
    assert first["seconds_left"] == 4.0 * 11 and first["samples"] == 5 and first["skipped"] == 0
    assert first["bad_records"] == 1
    second = rows.row(2, METRICS, 1e-4, 5, waited=0.0)
    needed = flops.step_flops(model, cfg.train).of(METRICS)
    assert second["flops"] == needed and second["peak_share"] == pytest.approx(needed / 1e9)
    assert second["seconds_left"] == 2.5 * 10  # the median of 4 and 1


def test_a_line_speaks_of_the_steps_since_the_last_without_compiling():
    compiled = {"seconds": 9.0, "compile_seconds": 8.0, "tokens": 50, "images": 1, "data_wait_share": 0.0}
    plain = {"seconds": 1.0, "compile_seconds": 0.0, "tokens": 150, "images": 3, "data_wait_share": 0.5, "loss": 3.0}
    plain |= {"tokens_per_second": 150.0, "images_per_second": 3.0, "peak_share": 0.4}
    line = averaged([compiled | {"peak_share": 0.02, "loss": 4.0}, plain])
    assert (line["tokens_per_second"], line["images_per_second"], line["loss"]) == (100, 2, 3.0)
    assert line["data_wait_share"] == pytest.approx(0.05) and line["peak_share"] == pytest.approx((0.18 + 0.4) / 2)
    rollout = {"seconds": 2.0, "tokens": 30, "images": 4, "tokens_per_second": 15.0}
    assert averaged([rollout, rollout | {"tokens": 50}]) == rollout | {"tokens": 50, "tokens_per_second": 20.0}


@pytest.mark.parametrize(("steps", "expected"), [(0, []), (2, ["start", "stop"]), (50, ["start", "stop"])])
def test_a_trace_covers_its_steps_and_ends_with_the_run(tmp_path, monkeypatch, steps, expected):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    trace = Trace(tmp_path, first=3, steps=steps)
    for step in range(1, 7):
        trace.before(step)
        trace.after(step, {})
    trace.close()
    assert [name for name, _ in calls] == expected
    assert not calls or (calls[0] == ("start", 3) and calls[1][1] == min(3 + steps - 1, 6))
