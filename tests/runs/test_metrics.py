"""What a run shows: rows from a known clock, the progress line, the curve, the trace, Weights & Biases."""

import contextlib
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from infimed_jax import config, sharding
from infimed_jax.cost import chips, flops
from infimed_jax.errors import UserError
from infimed_jax.progress import clock, progress_line
from infimed_jax.runs import meter
from infimed_jax.runs.curve import draw_curve, smoothed
from infimed_jax.runs.meter import Meter, Trace, averaged
from infimed_jax.runs.metrics import Board, MetricsLog, read_metrics

METRICS = {
    "loss": 2.5,
    "tokens": 600,
    "loss_tokens": 100,
    "images": 8,
    "bad_records": 1,
    "pairs": 9000.0,
    "non_finite": 0,
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


def test_the_progress_line_shows_what_is_there():
    row = {
        "loss": 1.23456,
        "tokens_per_second": 12345.6,
        "images_per_second": 30.25,
        "peak_share": 0.4123,
        "data_wait_share": 0.02,
        "memory_gib": 5.14,
        "seconds_left": 187.9,
    }
    assert progress_line(40, 120, row) == (
        "step 40/120  loss 1.2346  12,346 tokens/s  30.2 images/s  41.2% of peak  2% waiting for data  5.1 GiB  "
        "3:07 left"
    )
    assert progress_line(1, 2, {"reward": 0.5, "loss": 0.1}) == "step 1/2  loss 0.1000  reward 0.5000"
    assert clock(7387) == "2:03:07"


def test_smoothing_is_the_mean_of_what_is_there():
    values = np.random.default_rng(0).normal(size=60)
    expected = [values[max(0, i - 1) : i + 2].mean() for i in range(60)]
    np.testing.assert_allclose(smoothed(values), expected)


@pytest.mark.parametrize("count", [1, 40])
def test_a_curve_is_drawn_for_any_run(tmp_path, count):
    row = {"grad_norm": 1.0, "tokens": 100, "seconds": 2.0, "tokens_per_second": 50.0}
    rows = [row | {"step": n, "loss": 1 / n, "skipped": int(n == 7)} for n in range(1, count + 1)]
    draw_curve(rows, "sft: runs/x", tmp_path / "curve.png")
    pixels = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] and len(np.unique(pixels)) > 10


def test_a_run_whose_every_update_was_skipped_has_no_curve(tmp_path):
    row = {"grad_norm": float("nan"), "loss": float("nan"), "tokens": 100, "seconds": 2.0, "tokens_per_second": 50.0}
    draw_curve([row | {"step": n, "skipped": 1} for n in (1, 2)], "sft: runs/x", tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


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


def _logging(project: str) -> config.Config:
    return config.Config(train=config.Train(log_every=2, wandb=project))


@pytest.mark.parametrize("active", [True, False])
def test_weights_and_biases_without_its_package_is_refused(tmp_path, monkeypatch, active):
    """On every process: one that went on alone would wait for the others until JAX gives them up."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train\.wandb=med needs the wandb package: pip install wandb"):
        MetricsLog(tmp_path, 0, _logging("med"), active=active).__enter__()


def _events(folder):
    """(step, {tag: value}, status) of every event; each record as tensorboardX's own writer would frame it."""
    found, reference = [], RecordWriter(str(folder / "reference"))
    (file,) = folder.glob("events.out.tfevents.*")
    rest = file.read_bytes()
    while rest:
        size = int.from_bytes(rest[:8], "little")
        data, rest = rest[12 : 12 + size], rest[16 + size :]
        reference.write(data)
        event = event_pb2.Event.FromString(data)
        found.append((event.step, {v.tag: v.simple_value for v in event.summary.value}, event.session_log.status))
    reference.close()
    assert (folder / "reference").read_bytes() == file.read_bytes()
    return found


def test_the_board_holds_the_numbers_not_finite_ones_too_before_it_is_closed(tmp_path):
    board = Board(tmp_path, first_step=3)
    board.write({"loss": 2.5, "skipped": 0}, 3)
    board.write({"loss": float("nan")}, 4)
    _, start, first, second = _events(tmp_path)
    assert start == (3, {}, event_pb2.SessionLog.START) and first == (3, {"loss": 2.5, "skipped": 0.0}, 0)
    assert second[0] == 4 and np.isnan(second[1]["loss"])
    board.close()


FULL = Path("/dev/full")
needs_full_disk = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, a disk that is always full")


@needs_full_disk
def test_a_full_disk_ends_the_log_at_once(tmp_path):
    with contextlib.suppress(OSError), MetricsLog(tmp_path, 0, _logging("")) as log:
        log.write({"step": 1, "loss": 1.0})
        log._file.close()
        log._file = FULL.open("a", buffering=1)
        with pytest.raises(OSError, match="No space left"):
            log.write({"step": 2, "loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


@needs_full_disk
def test_a_disk_that_is_full_for_tensorboard_alone_is_reported_once_and_the_log_goes_on(tmp_path, caplog):
    with MetricsLog(tmp_path, 0, _logging("")) as log:
        log.write({"step": 1, "loss": 1.0})
        log._board._writer._py_recordio_writer._writer = FULL.open("wb")
        for step in (2, 3, 4, 5, 6):
            log.write({"step": step, "loss": 1.0})
    assert [record.message for record in caplog.records] == [
        "TensorBoard gets no more numbers ([Errno 28] No space left on device); metrics.jsonl goes on"
    ]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_weights_and_biases_gets_the_numbers_and_a_resumed_run_its_page(tmp_path, monkeypatch):
    opened, logged = [], []
    page = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **options: opened.append(options) or page)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 2):
        with MetricsLog(tmp_path, start, _logging("med")) as log:
            for step in (start + 1, start + 2):
                log.write({"step": step, "loss": 1.0, "skipped_ids": ["a"]})
    assert logged == [(2, {"loss": 1.0}), (4, {"loss": 1.0})]
    assert opened[0]["id"] == opened[1]["id"] and opened[0]["project"] == "med" and opened[0]["resume"] == "allow"
