"""One stage's training run, read top to bottom: open, start or resume, step, save, report.

A run's folder holds config.yaml, tokenizer/, checkpoints/, metrics.jsonl, tensorboard/ and, once it is finished,
result.json and curve.png; it may be moved. The same command continues a stopped run exactly: the next batches and
losses are those of a run that was never stopped.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from infimed_jax import config, sharding
from infimed_jax.config import Config, ConfigError
from infimed_jax.cost.memory import choose_remat
from infimed_jax.data.batch import NO_IMAGE, Batch
from infimed_jax.data.chat import Tokenizer, load_tokenizer
from infimed_jax.data.loader import Loader, make_loader
from infimed_jax.data.packing import TOO_LONG, TOO_MANY_IMAGES
from infimed_jax.errors import Interrupted, UserError
from infimed_jax.files import make_folder, write_json
from infimed_jax.models.compute import Compute
from infimed_jax.models.lora import merge_lora, scale_of
from infimed_jax.models.params import abstract_params, init_params
from infimed_jax.processes import gathered, speaker
from infimed_jax.runs.checkpoint import CHECKPOINTS, Checkpoints, Metadata, keep_tokenizer, leaves_fingerprint
from infimed_jax.runs.curve import CURVE, draw_curve
from infimed_jax.runs.guard import Watchdog, stop_requests
from infimed_jax.runs.history import history_of, stage_entry
from infimed_jax.runs.identity import check_same_run
from infimed_jax.runs.meter import Meter, Trace, averaged, batch_counts
from infimed_jax.runs.metrics import MetricsLog, Row, progress_line, read_metrics
from infimed_jax.runs.parameters import load_params
from infimed_jax.train.optimizer import learning_rate, make_optimizer
from infimed_jax.train.state import Params, TrainState, abstract_state, init_state
from infimed_jax.train.step import Metrics, TrainStep, make_train_step, next_token_loss

RESULT = "result.json"

OnStep = Callable[[int, int, Row], None]
"""`(step, total_steps, metrics)`; steps count from 1."""

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
    """The loader's report: rows, fill, what was dropped and what could not be read."""


def train(
    cfg: Config, *, params: Params | None = None, on_step: OnStep | None = None, profile_steps: int = 0
) -> TrainResult:
    """Run the stage `cfg` describes, or what is left of it, in `cfg.train.output`.

    Starts from `params`, or `train.init_from`, or random values; a checkpoint in the output folder goes before all
    three. A finished run is not run again. `profile_steps` steps are traced, the first two aside. Raises Interrupted
    after Ctrl-C or SIGTERM, with the state saved; UserError where the folder holds another run, a batch has nothing to
    learn, or updates stay non-finite.
    """
    if not cfg.train.output:
        raise ConfigError("train.output is empty: name the run's folder")
    if params is not None and cfg.train.init_from:
        raise UserError("parameters were given and train.init_from is set: choose one")
    mesh = sharding.run_mesh(cfg)
    sharding.micro_batches(cfg.train, mesh)  # refuses what does not split, before anything is written
    folder = Path(cfg.train.output)
    make_folder(folder)
    checkpoints = Checkpoints(folder / CHECKPOINTS, cfg.train.keep_checkpoints)
    try:
        with jax.set_mesh(mesh):
            return _run(cfg, mesh, folder, checkpoints, params, on_step, profile_steps)
    finally:
        checkpoints.close()


def _run(
    cfg: Config,
    mesh: jax.sharding.Mesh,
    folder: Path,
    checkpoints: Checkpoints,
    params: Params | None,
    on_step: OnStep | None,
    profile_steps: int,
) -> TrainResult:
    start = checkpoints.latest_step() or 0
    loader = make_loader(cfg, mesh=mesh, start_step=start)
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    state, metadata = _open_state(cfg, checkpoints, start, loader.fingerprint, tokenizer, params)
    main = jax.process_index() == 0
    if start == loader.steps and (folder / RESULT).exists():
        log.info("%s is finished: %s", cfg.train.stage, folder)
        return _result(cfg, state, read_metrics(folder), json.loads((folder / RESULT).read_text())["data"])
    if main:
        (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(cfg), sort_keys=False), encoding="utf-8")
        keep_tokenizer(tokenizer, folder)
    _announce(cfg, mesh, state, loader)
    metrics_log = MetricsLog(folder, start, cfg, active=main)
    trace = Trace(folder, min(start + 3, loader.steps), profile_steps)
    try:
        state = _steps(cfg, mesh, state, loader, checkpoints, metadata, metrics_log, trace, on_step)
    finally:
        trace.close()
        metrics_log.close()
    checkpoints.wait()
    checkpoints.verify(loader.steps, state)
    result = _result(cfg, state, metrics_log.rows, _data_report(loader, metadata, metrics_log.rows))
    if main:
        draw_curve(result.history, f"{cfg.train.stage}: {folder}", folder / CURVE)
        write_json(folder / RESULT, {k: v for k, v in vars(result).items() if k not in ("params", "history")})
    return result


def _open_state(
    cfg: Config,
    checkpoints: Checkpoints,
    start: int,
    fingerprint: str,
    tokenizer: Tokenizer,
    params: Params | None,
) -> tuple[TrainState, Metadata]:
    """The state at step `start`, and the metadata that its checkpoints carry."""
    optimizer = make_optimizer(cfg.optimizer)
    metadata: Metadata = {"config": config.to_dict(cfg), "fingerprint": fingerprint, "history": [], "bad_records": {}}
    metadata["tokenizer"] = tokenizer.fingerprint
    if start:
        saved = checkpoints.metadata(start)
        check_same_run(checkpoints.folder.parent, saved, metadata)
        return checkpoints.restore(abstract_state(cfg, optimizer), start), saved | {"config": metadata["config"]}
    abstract = sharding.on_mesh(abstract_params(cfg.model))
    if cfg.train.init_from:
        params, before = load_params(cfg.train.init_from, abstract)
        check_tokenizer(cfg, before, tokenizer)
        metadata |= {"history": history_of(before), "start": leaves_fingerprint(cfg.train.init_from)}
    elif params is None:
        params = init_params(jax.random.key(cfg.train.seed), cfg.model)
    else:
        params = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, abstract)
    metadata["history"] = [*metadata["history"], stage_entry(cfg, fingerprint)]
    return init_state(params, cfg, optimizer), metadata


def check_tokenizer(cfg: Config, before: Metadata, tokenizer: Tokenizer) -> None:
    """UserError where the parameters learnt other tokens: their ids would mean something else."""
    if before.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"train.init_from={cfg.train.init_from} was trained with another tokenizer than data.tokenizer="
            f"{cfg.data.tokenizer}: give the tokenizer of that run"
        )


def _announce(cfg: Config, mesh: jax.sharding.Mesh, state: TrainState, loader: Loader) -> None:
    start, data = loader.start_step, loader.report()
    trained, frozen = parameter_counts(state.trainable, state.frozen)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    pieces = sharding.micro_batches(cfg.train, mesh)
    rows = cfg.train.global_batch // pieces // sharding.row_shards(mesh)
    learns = ", ".join(cfg.train.train)
    if cfg.train.lora.rank:
        learns += f"; of text LoRA adapters of rank {cfg.train.lora.rank} on {', '.join(cfg.train.lora.targets)}"
    log.info("%s: %d steps%s", cfg.train.stage, loader.steps, f", continued after step {start}" if start else "")
    log.info("mesh: %s; %d %s devices", axes, mesh.size, mesh.devices.flat[0].device_kind)
    log.info("parameters: %s learn (%s), %s frozen", f"{trained:,}", learns, f"{frozen:,}")
    log.info("batch: %d rows in %d pieces of %d rows a device", cfg.train.global_batch, pieces, rows)
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


def _steps(
    cfg: Config,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    loader: Loader,
    checkpoints: Checkpoints,
    metadata: Metadata,
    metrics_log: MetricsLog,
    trace: Trace,
    on_step: OnStep | None,
) -> TrainState:
    """The loop proper: from the loader's start step to its last, saving as it goes."""
    step_fn = _compiled_step(cfg, mesh, state, loader)
    total = loader.steps
    batches = iter(loader)
    meter = Meter(cfg, mesh, total)

    def record(step: int, metrics: Metrics, ids: list[str], waited: float) -> None:
        watchdog.beat(f"step {step}: waiting for its result")
        rate = learning_rate(cfg.optimizer, step - 1, total)
        row = meter.row(step, jax.device_get(metrics), rate, loader.samples(step - 1), waited)
        if row["bad_records"]:
            met = [*metrics_log.rows, row]
            loader.check_bad_records(*(sum(row[name] for row in met) for name in ("bad_records", "samples")))
        if row["skipped"]:
            words = "%sstep %d: loss or gradient not finite, update skipped; samples %s"
            log.warning(words, speaker(), step, _few(ids))
            row["skipped_ids"] = ids = [name for part in gathered(ids) for name in part]
        _check_weight(row, ids)
        metrics_log.write(row)
        _check_skips(cfg, metrics_log.rows, ids, checkpoints)
        if step % cfg.train.log_every == 0 or step == total:
            since_line = metrics_log.rows[-min(cfg.train.log_every, step - loader.start_step) :]
            log.info(progress_line(step, total, averaged(since_line)))
        if on_step is not None:
            on_step(step, total, row)

    pending: tuple[int, Metrics, list[str], float] | None = None
    due = False
    with stop_requests() as asked, Watchdog(cfg.train.step_timeout) as watchdog:
        for step in range(loader.start_step + 1, total + 1):
            checkpoints.wait(0)  # an error of the save under way
            watchdog.beat(f"step {step}: waiting for data")
            since = time.perf_counter()
            batch, bad, ids = next(batches)
            waited = time.perf_counter() - since
            if step == loader.start_step + 1 and jax.process_index() == 0:
                text = describe_row(batch, load_tokenizer(cfg.data.tokenizer))
                log.info("first sample (%s), «learnt»:\n%s", ids[0] if ids else "padding", text)
            trace.before(step)
            watchdog.beat(f"step {step}: compiling or computing")
            state, metrics = step_fn(state, batch, learning_rate(cfg.optimizer, step - 1, total))
            metrics |= batch_counts(batch, cfg.model.projector.visual_tokens)
            metrics["bad_records"] = jnp.sum(bad)
            trace.after(step, metrics)
            # The step before is read while this one runs, so that the devices never wait for the host.
            if pending is not None:
                record(*pending)
            pending = step, metrics, ids, waited
            stop = asked(step)
            due |= step % cfg.train.checkpoint_every == 0
            if stop or due or step == total:
                record(*pending)
                pending = None
            # In a run of skipped updates saves would push out the states from before it.
            if stop or step == total or (due and not metrics_log.rows[-1]["skipped"]):
                due = False
                watchdog.beat(f"step {step}: saving")
                bad = _bad_records(loader, metadata, metrics_log.rows)
                checkpoints.save(step, state, metadata | {"bad_records": bad, "step": step})
            if stop and step < total:
                checkpoints.wait()
                raise Interrupted(
                    f"{cfg.train.stage} stopped after step {step} of {total} and saved in {cfg.train.output}: "
                    "the same command continues from there"
                )
    return state


def _compiled_step(cfg: Config, mesh: jax.sharding.Mesh, state: TrainState, loader: Loader) -> TrainStep:
    pieces = sharding.micro_batches(cfg.train, mesh)
    largest = tuple(max(sizes) for sizes in zip(*loader.shapes, strict=True))
    remat = choose_remat(cfg, state, mesh, cfg.train.global_batch // pieces, largest)
    loss_fn = next_token_loss(cfg.model, replace(Compute.of(cfg.train), remat=remat))
    return make_train_step(loss_fn, make_optimizer(cfg.optimizer), pieces)


def _check_weight(row: Row, ids: list[str]) -> None:
    """A template that masks every label would else give loss 0 for a whole run."""
    if row["weight"] == 0:
        raise UserError(
            f"step {row['step']}: no token of the batch carries loss (samples {_few(ids)}): "
            "look at the first sample printed at the start, and mend the data or its rendering"
        )


def _check_skips(cfg: Config, rows: list[Row], ids: list[str], checkpoints: Checkpoints) -> None:
    limit = cfg.train.max_skipped_updates
    if limit and len(rows) >= limit and all(row["skipped"] for row in rows[-limit:]):
        raise UserError(
            f"{limit} updates in a row had a non-finite loss or gradient, the last at step {rows[-1]['step']} on "
            f"samples {_few(ids)}: continue in {checkpoints.elsewhere()}, with a lower optimizer.learning_rate or "
            "without these samples"
        )


def _few(ids: list[str], most: int = 8) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _bad_records(loader: Loader, metadata: Metadata, rows: list[Row]) -> dict[str, str]:
    """Id -> reason, of all processes and of the whole run; asked of the others only where a step counted one."""
    met = any(row["bad_records"] for row in rows if row["step"] > loader.start_step)
    found = gathered(loader.report()["bad_record_ids"]) if met else []
    return dict(sorted(item for part in (metadata["bad_records"], *found) for item in part.items()))


def _data_report(loader: Loader, metadata: Metadata, rows: list[Row]) -> dict[str, Any]:
    """The loader's report, of all processes, with the bad records that were met before the last resume."""
    report, bad = loader.report(), _bad_records(loader, metadata, rows)
    counts = dict(sorted(Counter(bad.values()).items()))
    read = sum(gathered(report["records_read"]))
    return report | {"records_read": read, "bad_records": counts, "bad_record_ids": bad}


def _result(cfg: Config, state: TrainState, rows: list[Row], data: dict[str, Any]) -> TrainResult:
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


def parameter_counts(trainable: Any, frozen: Any) -> tuple[int, int]:
    """Elements that learn, and elements that do not."""
    trained, fixed = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trainable, frozen))
    return trained, fixed
