"""One stage of training: next-token cross-entropy on packed batches.

The same command continues a stopped run exactly: the next batches and losses are those of a run that was never stopped.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infimed_jax.config import Config
from infimed_jax.cost.memory import choose_remat
from infimed_jax.data.batch import NO_IMAGE, Batch
from infimed_jax.data.chat import Tokenizer
from infimed_jax.data.loader import Loader, make_loader
from infimed_jax.data.packing import TOO_LONG, TOO_MANY_IMAGES
from infimed_jax.data.training import open_for_training
from infimed_jax.errors import UserError
from infimed_jax.models.compute import Compute
from infimed_jax.models.lora import merge_lora, scale_of
from infimed_jax.models.params import Params
from infimed_jax.processes import gather, process_prefix
from infimed_jax.runs.loop import Beat, OnStep, Run, Stepped, few, open_run, read_result, run_steps, write_result
from infimed_jax.runs.meter import Meter, Trace, batch_counts
from infimed_jax.runs.metrics import Row
from infimed_jax.sharding import row_shards
from infimed_jax.train.image_check import ImageCheck
from infimed_jax.train.optimizer import learning_rate, make_optimizer
from infimed_jax.train.start import bound_content, check_start, first_params, open_state
from infimed_jax.train.state import TrainState
from infimed_jax.train.step import Metrics, make_train_step, next_token_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished stage; all but `params` and `history` is in result.json."""

    params: Params
    """The whole model on the devices, adapters merged: what learnt in float32, the rest in the compute dtype."""
    history: list[Row]
    """The lines of metrics.jsonl."""
    stage: str
    steps: int
    tokens: int
    """Non-padding, all steps together."""
    tokens_per_step: float
    samples_per_step: float
    loss_first: float
    """Mean of the first 5 % of the steps."""
    loss_last: float
    """Mean of the last 5 % of the steps."""
    seconds: float
    """In steps, waiting for data and compiling included; without start, saves and pauses between resumes."""
    compile_seconds: float
    tokens_per_second: float
    """Without compiling."""
    skipped_updates: int
    data: dict[str, Any]
    """The loader's report: rows, fill, dropped samples and unreadable records."""


def train(
    cfg: Config, *, params: Params | None = None, on_step: OnStep | None = None, profile_steps: int = 0
) -> TrainResult:
    """Run the stage `cfg` describes, or what is left of it, in `cfg.train.output`.

    Starts from `params`, or `train.init_from`, or random values; a checkpoint in the output folder goes before all
    three. A finished run is not run again. `profile_steps` steps are traced, after the first two. Raises Interrupted
    after Ctrl-C or SIGTERM, with the state saved; UserError where the folder holds another run, a batch has nothing to
    learn, the data is for evaluation only, or updates stay non-finite.
    """
    check_start(cfg, params)
    samples = open_for_training(cfg.data.dataset)
    with open_run(cfg, on_step) as run:
        loader = make_loader(cfg, samples=samples, tokenizer=run.tokenizer, mesh=run.mesh, start_step=run.start)
        content = bound_content(run) | {"batches_sha256": loader.fingerprint}
        state, metadata = open_state(run, content, lambda: first_params(run, params))
        if run.finished(loader.steps):
            log.info("%s is finished: %s", cfg.train.stage, run.folder)
            return _result(run, state, read_result(run)["data"])
        _announce(run, state, loader)
        with Trace(run.folder, min(run.start + 3, loader.steps), profile_steps) as trace:
            compute = _compute(run, state, loader)
            stage = _Stage(run, loader, compute, metadata.get("bad_records", {}), trace)
            state = run_steps(
                run, state, stage.step, loader.steps, lambda: metadata | {"bad_records": stage.bad_records()}
            )
        result = _result(run, state, stage.report())
        write_result(run, result)
        return result


class _Stage:
    """What a step is: the next batch, the compiled step, and the row read from it."""

    def __init__(self, run: Run, loader: Loader, compute: Compute, bad_before: Mapping[str, str], trace: Trace) -> None:
        cfg = run.cfg
        self._run, self._loader, self._trace = run, loader, trace
        self._step = make_train_step(next_token_loss(cfg.model, compute), make_optimizer(cfg.optimizer), run.pieces)
        self._images = ImageCheck(run, loader, compute)
        self._batches = iter(loader)
        self._meter = Meter(cfg, run.mesh, loader.steps)
        self._bad_before = bad_before

    def step(self, state: TrainState, number: int, beat: Beat) -> tuple[TrainState, Stepped]:
        cfg = self._run.cfg
        beat("waiting for data")
        since = time.perf_counter()
        batch, bad, ids = next(self._batches)
        waited = time.perf_counter() - since
        if number == self._run.start + 1 and jax.process_index() == 0:
            text = describe_row(batch, self._run.tokenizer)
            log.info("first sample (%s), «learnt»:\n%s", ids[0] if ids else "padding", text)
        self._trace.before(number)
        beat("compiling or computing")
        rate = learning_rate(cfg.optimizer, number - 1, self._loader.steps)
        state, metrics = self._step(state, batch, rate)
        metrics |= batch_counts(batch, cfg.model.visual_tokens)
        metrics["bad_records"] = jnp.sum(bad)
        self._trace.after(number, metrics)
        gain = self._images.measure(state, number)
        return state, Stepped(lambda: self._row(number, metrics, rate, waited, ids) | gain(), on_devices=True)

    def _row(self, number: int, metrics: Metrics, rate: float, waited: float, ids: list[str]) -> Row:
        """The step's row; UserError where too many records are bad, or no token carried loss."""
        samples = self._loader.samples(number - 1)
        row = self._meter.row(number, jax.device_get(metrics), rate, samples, waited)
        if row["bad_records"]:
            rows = [*self._run.metrics.rows, row]
            self._loader.check_bad_records(*(sum(row[name] for row in rows) for name in ("bad_records", "samples")))
        if row["skipped"]:
            words = "%sstep %d: loss or gradient not finite, update skipped; samples %s"
            log.warning(words, process_prefix(), number, few(ids))
            row["skipped_ids"] = ids = [name for part in gather(ids) for name in part]
        if row["weight"] == 0:  # a template that masks every label would otherwise give loss 0 for a whole run
            raise UserError(
                f"step {number}: no token of the batch carries loss (samples {few(ids)}): look at the first sample "
                "printed at the start, and fix the data or its rendering"
            )
        return row

    def bad_records(self) -> dict[str, str]:
        """Id → reason, from all processes and the whole run; the others are asked only where a step counted one."""
        new = [row for row in self._run.metrics.rows if row["step"] > self._run.start and row["bad_records"]]
        parts = gather(self._loader.report()["bad_record_ids"]) if new else []
        return dict(sorted(item for part in (self._bad_before, *parts) for item in part.items()))

    def report(self) -> dict[str, Any]:
        """The loader's report, from all processes, with the bad records that were met before the last resume."""
        report, bad = self._loader.report(), self.bad_records()
        counts = dict(sorted(Counter(bad.values()).items()))
        read = sum(gather(report["records_read"]))
        return report | {"records_read": read, "bad_records": counts, "bad_record_ids": bad}


def _compute(run: Run, state: TrainState, loader: Loader) -> Compute:
    cfg = run.cfg
    largest = tuple(max(sizes) for sizes in zip(*loader.shapes, strict=True))
    remat = choose_remat(cfg, state, run.mesh, cfg.train.global_batch // run.pieces, largest)
    return replace(Compute.of(cfg.train), remat=remat)


def _announce(run: Run, state: TrainState, loader: Loader) -> None:
    cfg, mesh, data = run.cfg, run.mesh, loader.report()
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.trainable, state.frozen))
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = cfg.train.global_batch // run.pieces // row_shards(mesh)
    learns = ", ".join(cfg.train.train)
    if cfg.train.lora.rank:
        learns += f"; of text LoRA adapters of rank {cfg.train.lora.rank} on {', '.join(cfg.train.lora.targets)}"
    run.announce(loader.steps)
    log.info("mesh: %s; %d %s devices", axes, mesh.size, mesh.devices.flat[0].device_kind)
    log.info("parameters: %s learn (%s), %s frozen", f"{trained:,}", learns, f"{frozen:,}")
    log.info("batch: %d rows in %d pieces of %d rows a device", cfg.train.global_batch, run.pieces, rows)
    log.info("compute: %s, attention %s", cfg.train.compute_dtype, cfg.train.attention)
    log.info(
        "data: %s samples in %s rows, %.1f %% filled; left out: %s",
        *(f"{data['samples']:,}", f"{data['rows']:,}", 100 * data["fill"], _left_out(data["dropped"]) or "none"),
    )


def _left_out(counts: Mapping[str, int]) -> str:
    parts = [f"{count} {reason}" for reason, count in counts.items()]
    if {TOO_LONG, TOO_MANY_IMAGES} & counts.keys():
        parts.append("to keep what no row holds raise data.context or data.images_per_row")
    return ", ".join(parts)


def _result(run: Run, state: TrainState, data: dict[str, Any]) -> TrainResult:
    cfg, rows = run.cfg, run.metrics.rows
    tokens = sum(row["tokens"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    compiling = sum(row["compile_seconds"] for row in rows)
    return TrainResult(
        params=merge_lora(state.params, scale_of(cfg.train.lora)),
        history=rows,
        stage=cfg.train.stage,
        steps=int(state.step),
        tokens=tokens,
        tokens_per_step=tokens / max(len(rows), 1),
        samples_per_step=sum(row["samples"] for row in rows) / max(len(rows), 1),
        loss_first=mean_loss(rows),
        loss_last=mean_loss(rows, last=True),
        seconds=seconds,
        compile_seconds=compiling,
        tokens_per_second=tokens / max(seconds - compiling, 1e-9),
        skipped_updates=sum(row["skipped"] for row in rows),
        data=data,
    )


def describe_row(batch: Batch, tokenizer: Tokenizer) -> str:
    """The first segment of this process's first row that holds one, as text: «what is learnt», [36 image places]."""
    tokens, segments, weights, visual = (
        np.asarray(x.addressable_shards[0].data) if isinstance(x, jax.Array) else x
        for x in (batch.tokens, batch.segment_ids, batch.loss_weights, batch.visual_index)
    )
    filled = np.flatnonzero((segments == 1).any(axis=1))
    if not len(filled):
        return "(this process's first rows are padding)"
    row = filled[0]
    places = segments[row] == 1
    learnt = np.concatenate([[False], weights[row, :-1] > 0])[places]  # the weight at t is of predicting t + 1
    image = (visual[row] != NO_IMAGE)[places]
    pieces = []
    for (is_image, is_learnt), run in itertools.groupby(
        zip(image, learnt, tokens[row][places], strict=True), key=lambda place: (place[0], place[1])
    ):
        ids = [token for _, _, token in run]
        text = f"[{len(ids)} image places]" if is_image else tokenizer.decode(ids)
        pieces.append(f"«{text}»" if is_learnt else text)
    return "".join(pieces)


def mean_loss(rows: Sequence[Row], share: float = 0.05, *, last: bool = False) -> float:
    """Mean over the first (or last) `share` of the steps, one at least; skipped updates do not count."""
    losses = [row["loss"] for row in rows if not row["skipped"]]
    if not losses:
        return float("nan")
    count = max(1, round(share * len(losses)))
    return float(np.mean(losses[-count:] if last else losses[:count]))
