"""Two processes over loopback train as one does: the same losses, one set of files, stops that both agree on."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.config import Config
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from infimed_jax.runs.checkpoint import open_checkpoint
from infimed_jax.runs.metrics import read_metrics
from infimed_jax.runs.parameters import load_params
from infimed_jax.train.stage import train
from tests import two_processes

_CHILD = """
import json, logging, os, signal, sys, time
import jax
number, port, stop_at, cfg = *map(int, sys.argv[1:4]), json.loads(sys.argv[4])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
from infimed_jax import config
from infimed_jax.errors import Interrupted, UserError
from infimed_jax.train.stage import train

logging.basicConfig(level=logging.WARNING)

def on_step(step, total, row):
    if stop_at:
        time.sleep(0.3)  # the notice takes its time to reach the other process; steps of this model take none
    if step == stop_at and number == 1:  # one process alone is told
        os.kill(os.getpid(), signal.SIGTERM)

try:
    train(config.from_dict(config.Config, cfg), on_step=on_step)
except Interrupted as stop:
    print(stop)
    sys.exit(75)
except UserError as error:
    print(error)
    sys.exit(2)
"""


def _two_processes(cfg: Config, cache: Path, stop_at: int = 0) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    return two_processes.run(_CHILD, cache, str(stop_at), json.dumps(config.to_dict(cfg)))


@pytest.mark.timeout(600)
def test_two_processes_train_stop_and_resume_as_one_does(stage, tmp_path: Path):
    alone = stage(steps=12, global_batch=4, checkpoint_every=50, output=str(tmp_path / "alone"))
    together = dataclasses.replace(alone, train=dataclasses.replace(alone.train, output=str(tmp_path / "together")))
    expected = train(alone)
    stopped = _two_processes(together, tmp_path / "cache", stop_at=1)
    assert [code for code, _, _ in stopped] == [75, 75], stopped[0][2][-2000:] + stopped[1][2][-2000:]
    lines = {output.splitlines()[-1] for _, output, _ in stopped}
    assert len(lines) == 1 and "the same command continues" in lines.pop(), "both stop after the same step"
    assert len(read_metrics(together.train.output)) < 12
    fewer = dataclasses.replace(together, train=dataclasses.replace(together.train, output=str(tmp_path / "fewer")))
    shutil.copytree(together.train.output, fewer.train.output)
    finished = _two_processes(together, tmp_path / "cache")
    assert [code for code, _, _ in finished] == [0, 0], finished[0][2][-2000:] + finished[1][2][-2000:]
    train(fewer)  # what two processes began, one ends
    rows = [read_metrics(cfg.train.output) for cfg in (alone, together, fewer)]
    losses = [[(row["loss"], row["grad_norm"]) for row in each] for each in rows]
    # Float32 sums over four devices run in another order.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)
    counts = [[(row["tokens"], row["loss_tokens"], row["images"]) for row in each] for each in rows]
    assert counts[0] == counts[1] == counts[2]
    params, _ = load_params(together.train.output)
    np.testing.assert_allclose(params["text"]["embed_tokens"], expected.params["text"]["embed_tokens"], atol=5e-4)


def _damaged(folder: Path, dataset: Path) -> Path:
    """The dataset with four of its samples unreadable, in different rows."""
    samples = list(open_samples(dataset))
    for number in (3, 9, 14, 20):
        samples[number] = dataclasses.replace(samples[number], images=(b"no image",))
    write_samples(folder, samples, name="toy")
    return folder


@pytest.mark.timeout(600)
def test_what_one_process_knows_is_written_by_the_first(stage, dataset, tmp_path: Path):
    """Bad records and the samples of skipped updates: each process meets some, the files hold all, as one alone."""
    damaged = str(_damaged(tmp_path / "damaged", dataset(count=24)))

    def run_in(folder: str) -> Config:
        # The first update of 1e30 is finite, no loss after it is.
        cfg = stage(steps=8, global_batch=4, rate=1e30, output=str(tmp_path / folder), max_skipped_updates=0)
        return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset=damaged, max_bad_records=1.0))

    alone, together = run_in("alone"), run_in("together")
    train(alone)
    ended = _two_processes(together, tmp_path / "cache")
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2][-2000:] + ended[1][2][-2000:]
    skipped = [
        {row["step"]: sorted(row["skipped_ids"]) for row in read_metrics(cfg.train.output) if row["skipped"]}
        for cfg in (alone, together)
    ]
    assert skipped[0] == skipped[1] and len(skipped[0]) >= 5
    data = [json.loads(Path(cfg.train.output, "result.json").read_text())["data"] for cfg in (alone, together)]
    assert data[0] == data[1] and sorted(data[0]["bad_record_ids"]) == [f"toy/train/{n}" for n in (14, 20, 3, 9)]
    assert open_checkpoint(together.train.output).metadata["bad_records"] == data[0]["bad_record_ids"]
    errors = [error for _, _, error in ended]
    named = [{n for n in (3, 9, 14, 20) if f"left out: toy/train/{n} (" in error} for error in errors]
    assert named[0] and named[1] and named[0] | named[1] == {3, 9, 14, 20}, "each names its own"
    for number, error in enumerate(errors):
        assert f"process {number} of 2: left out: toy/train/" in error
        own = re.findall(rf"process {number} of 2: step 8: .* update skipped; samples (.*)", error)[0].split(", ")
        assert set(own) < set(skipped[0][8]), "a part of the batch"


@pytest.mark.timeout(600)
def test_two_processes_end_over_bad_records_when_one_does(stage, dataset, tmp_path: Path):
    """The limit is two of 24 records. Each process meets some of the four: none of them passes it alone."""
    damaged = str(_damaged(tmp_path / "damaged", dataset(count=24)))

    def run_in(folder: str) -> Config:
        cfg = stage(steps=12, global_batch=4, output=str(tmp_path / folder))
        return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset=damaged, max_bad_records=0.1))

    with pytest.raises(UserError, match=r"records read of .*damaged were bad") as alone:
        train(run_in("alone"))
    together = _two_processes(run_in("together"), tmp_path / "cache")
    assert [(code, output.splitlines()[-1]) for code, output, _ in together] == [(2, str(alone.value))] * 2
    met = [[row["bad_records"] for row in read_metrics(tmp_path / folder)] for folder in ("alone", "together")]
    assert met[0] == met[1] and sum(met[0]) <= 2
