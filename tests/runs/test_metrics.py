"""metrics.jsonl, TensorBoard, Weights & Biases, and the curve of a run."""

import contextlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.progress import clock, progress_line
from infimed_jax.runs.curve import draw_curve, smoothed
from infimed_jax.runs.metrics import Board, MetricsLog, read_metrics

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


def test_damaged_lines_are_counted_and_kept_beside(tmp_path: Path, caplog):
    good = b'{"step": 1, "loss": 2.0}\n', b'{"step": 2, "loss": null}\n'
    damage = (b"\x00" * 40 + b"\n", b'{"step": 3, "lo\n', b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "4"}\n')
    (tmp_path / "metrics.jsonl").write_bytes(good[0] + b"".join(damage) + good[1] + b'{"step": 5')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert "has 6 damaged lines" in caplog.text
    with MetricsLog(tmp_path, 2, LOGGING):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(good)
    assert all(line in (tmp_path / "metrics.damaged.jsonl").read_bytes() for line in damage)


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


def test_a_title_is_no_mathematics(tmp_path):
    draw_curve([{"step": 1, "loss": 1.0}], r"sft: /data/$a$b/\x_{", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_run_whose_every_update_was_skipped_has_no_curve(tmp_path):
    row = {"grad_norm": float("nan"), "loss": float("nan"), "tokens": 100, "seconds": 2.0, "tokens_per_second": 50.0}
    draw_curve([row | {"step": n, "skipped": 1} for n in (1, 2)], "sft: runs/x", tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


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
