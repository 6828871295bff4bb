"""The loop under a step that counts: when rows are read, when states are saved, what ends a run."""

import os
import signal
from contextlib import nullcontext

import jax.numpy as jnp
import numpy as np
import pytest

from infimed_jax.errors import Interrupted, UserError
from infimed_jax.runs.checkpoint import abstract_like
from infimed_jax.runs.loop import Run, Stepped, open_run, read_result, run_steps


def _run(cfg, step, total, **options):
    """The run's folder, its rows, and the value that its last state holds."""
    with open_run(cfg) as run:
        state = {"w": jnp.zeros(4)}
        if run.start:
            state = run.checkpoints.restore(abstract_like(state), run.start)
        state = run_steps(run, state, lambda *a: step(run, *a), total, lambda: {"config": {}}, **options)
        return run.folder, run.metrics.rows, float(state["w"][0])


def _row(number: int, skipped: int = 0) -> dict:
    row = {"step": number, "seconds": 1.0, "skipped": skipped}
    return row | ({"skipped_ids": [f"toy/{number}"]} if skipped else {})


@pytest.mark.parametrize("on_devices", [False, True])
def test_a_row_is_read_while_the_next_step_runs_and_before_a_save(stage, on_devices):
    events = []

    def step(run: Run, state, number, beat):
        events.append(f"step {number}")

        def read():
            events.append(f"read {number}")
            return _row(number)

        return {"w": state["w"] + number}, Stepped(read, on_devices=on_devices)

    _, rows, value = _run(stage(checkpoint_every=3), step, 4)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and value == 1 + 2 + 3 + 4
    late = ["step 1", "step 2", "read 1", "step 3", "read 2", "read 3", "step 4", "read 4"]
    assert events == (late if on_devices else [f"{what} {n}" for n in (1, 2, 3, 4) for what in ("step", "read")])


@pytest.mark.parametrize("on_devices", [False, True])
def test_a_stopped_run_continues_with_its_state_and_rows(stage, on_devices):
    def step(run: Run, state, number, beat):
        if number == 2 and not run.start:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"w": state["w"] * 2 + number}, Stepped(lambda: _row(number), on_devices=on_devices)

    cfg = stage(checkpoint_every=100)
    with pytest.raises(Interrupted, match=r"sft stopped after step 2 of 5 and saved in .*: the same command continues"):
        _run(cfg, step, 5)
    folder, rows, value = _run(cfg, step, 5)
    expected = 0
    for number in range(1, 6):
        expected = 2 * expected + number
    assert value == expected and [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert (folder / "config.yaml").exists() and (folder / "tokenizer/tokenizer.json").exists()


@pytest.mark.parametrize(("skipped", "ends"), [([2, 2], True), ([2, 0, 2], False), ([0, 1, 2], False), ([2, 1], False)])
def test_only_steps_without_any_update_end_a_run(stage, skipped, ends):
    """Two updates a step, three at most: which of a step's updates were skipped is not known."""

    def step(run: Run, state, number, beat):
        return state, Stepped(lambda: _row(number, skipped[number - 1]))

    refused = r"4 updates in a row .* step 2 on samples toy/2: continue in another train.output, with a lower"
    with pytest.raises(UserError, match=refused) if ends else nullcontext():
        _run(stage(max_skipped_updates=3, checkpoint_every=100), step, len(skipped), updates=2)


def test_an_error_of_a_save_comes_at_the_next_step(stage, monkeypatch):
    def step(run: Run, state, number, beat):
        steps.append(number)
        if number == 2:  # the save of step 1 is awaited before step 3 at the latest
            monkeypatch.setattr(run.checkpoints, "wait", refuse)
        return {"w": state["w"] + np.float32(1)}, Stepped(lambda: _row(number))

    def refuse(seconds=None):
        raise UserError("the disk is full")

    steps = []
    with pytest.raises(UserError, match="the disk is full"):
        _run(stage(checkpoint_every=1), step, 9)
    assert steps == [1, 2]


def test_what_ends_a_run_closes_its_metrics(stage):
    def step(run: Run, state, number, beat):
        if number == 3:
            raise UserError("no")
        return state, Stepped(lambda: _row(number))

    cfg = stage()
    with pytest.raises(UserError, match="no"), open_run(cfg) as run:
        run_steps(run, {"w": jnp.zeros(2)}, lambda *a: step(run, *a), 5, dict)
    assert run.metrics._file.closed and [row["step"] for row in run.metrics.rows] == [1, 2]


def test_a_folder_that_another_run_writes_is_refused_and_free_again_after_it(stage):
    cfg = stage()
    with open_run(cfg), pytest.raises(UserError, match=r"another run is writing .*: wait for it"), open_run(cfg):
        pass
    with open_run(cfg) as run:
        assert run.start == 0


def test_a_damaged_result_is_one_line(stage):
    with open_run(stage()) as run:
        (run.folder / "result.json").write_bytes(b'{"loss": 1')
        with pytest.raises(UserError, match=r"result\.json is damaged .*: remove it and run the same command"):
            read_result(run)
