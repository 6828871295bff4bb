"""One stage's training run, read top to bottom: open, start or resume, step, save, report.

A run's folder holds config.yaml, checkpoints/, metrics.jsonl, tensorboard/ and, once it is finished, result.json. The
same command continues a stopped run exactly: the next batches and losses are those of a run that was never stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import yaml

from infimed_jax import config, sharding
from infimed_jax.config import Config, ConfigError
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.data.loader import Loader, make_loader
from infimed_jax.errors import Interrupted, UserError
from infimed_jax.files import write_json
from infimed_jax.models.compute import Compute
from infimed_jax.models.infimed import abstract_params, init_params
from infimed_jax.train import telemetry
from infimed_jax.train.checkpoint import CHECKPOINTS, Checkpoints, Metadata, load_params
from infimed_jax.train.optimizer import learning_rate, make_optimizer
from infimed_jax.train.state import Params, TrainState, abstract_state, init_state
from infimed_jax.train.step import Metrics, TrainStep, make_train_step, next_token_loss
from infimed_jax.train.stopping import stop_requests
from infimed_jax.train.telemetry import MetricsLog, Row

RESULT = "result.json"

OnStep = Callable[[int, int, Row], None]
"""`(step, total_steps, metrics)`; steps count from 1."""

_FREE = {
    *("mesh", "sampling", "grpo"),
    *("data.dataset", "data.tokenizer", "data.prefetch", "data.threads", "data.max_bad_records"),
    *("train.output", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.max_skipped_updates", "train.remat", "train.attention", "train.logit_chunk", "train.micro_batches"),
}
"""Settings that may change on resume: they alter how a step is computed, not what it computes. (Another mesh, kernel or
number of micro-batches adds in another order, so its losses are equal to rounding; all else equal, they are the same
bits.) Dataset and tokenizer may move: the fingerprint is of their content."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished stage; all but `params` and `history` is in result.json."""

    params: Params
    """The whole model on the devices: what learnt in float32, the rest in the compute dtype."""
    history: list[Row]
    """The lines of metrics.jsonl."""
    stage: str
    steps: int
    tokens: int
    """Non-padding, all steps together."""
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


def train(cfg: Config, *, params: Params | None = None, on_step: OnStep | None = None) -> TrainResult:
    """Run the stage `cfg` describes, or what is left of it, in `cfg.train.output`.

    Starts from `params`, or `train.init_from`, or random values; a checkpoint in the output folder goes before all
    three. A finished run is not run again. Raises Interrupted after Ctrl-C or SIGTERM, with the state saved; UserError
    where the folder holds another run, a batch has nothing to learn, or updates stay non-finite.
    """
    if not cfg.train.output:
        raise ConfigError("train.output is empty: name the run's folder")
    if params is not None and cfg.train.init_from:
        raise UserError("parameters were given and train.init_from is set: choose one")
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.local_rows(cfg.train.global_batch // cfg.train.micro_batches, mesh)
    folder = Path(cfg.train.output)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / CHECKPOINTS, cfg.train.keep_checkpoints)
    try:
        with jax.set_mesh(mesh):
            return _run(cfg, mesh, folder, checkpoints, params, on_step)
    finally:
        checkpoints.close()


def _run(
    cfg: Config,
    mesh: jax.sharding.Mesh,
    folder: Path,
    checkpoints: Checkpoints,
    params: Params | None,
    on_step: OnStep | None,
) -> TrainResult:
    start = checkpoints.latest_step() or 0
    loader = make_loader(cfg, mesh=mesh, start_step=start)
    state, metadata = _open_state(cfg, checkpoints, start, loader.fingerprint, params)
    main = jax.process_index() == 0
    if start == loader.steps and (folder / RESULT).exists():
        log.info("%s is finished: %s", cfg.train.stage, folder)
        return _result(cfg, state, telemetry.read_metrics(folder), json.loads((folder / RESULT).read_text())["data"])
    if main:
        (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(cfg), sort_keys=False), encoding="utf-8")
    _announce(cfg, mesh, state, start, loader.steps)
    metrics_log = MetricsLog(folder, start, cfg.train.log_every, active=main)
    try:
        state = _steps(cfg, state, loader, checkpoints, metadata, metrics_log, on_step)
    finally:
        metrics_log.close()
    checkpoints.wait()
    result = _result(cfg, state, metrics_log.rows, _data_report(loader, metadata))
    if main:
        write_json(folder / RESULT, {k: v for k, v in vars(result).items() if k not in ("params", "history")})
    return result


def _open_state(
    cfg: Config, checkpoints: Checkpoints, start: int, fingerprint: str, params: Params | None
) -> tuple[TrainState, Metadata]:
    """The state at step `start`, and the metadata that its checkpoints carry."""
    optimizer = make_optimizer(cfg.optimizer)
    metadata: Metadata = {"config": config.to_dict(cfg), "fingerprint": fingerprint, "history": [], "bad_records": {}}
    if start:
        saved = checkpoints.metadata(start)
        _check_same_run(checkpoints.folder, saved, metadata)
        return checkpoints.restore(abstract_state(cfg, optimizer), start), saved | {"config": metadata["config"]}
    abstract = abstract_params(cfg.model)
    if cfg.train.init_from:
        params, before = load_params(cfg.train.init_from, _on_mesh(abstract))
        metadata["history"] = before.get("history", [])
    elif params is None:
        params = init_params(jax.random.key(cfg.train.seed), cfg.model)
    else:
        params = jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), params, _on_mesh(abstract))
    metadata["history"] = [*metadata["history"], {"stage": cfg.train.stage, "fingerprint": fingerprint}]
    return init_state(params, cfg, optimizer), metadata


def _on_mesh(abstract: Params) -> Params:
    """`eval_shape` gives abstract shardings; a restore wants those of the current mesh."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, leaf.sharding.spec)
        ),
        abstract,
    )


def _check_same_run(folder: Path, saved: Metadata, ours: Metadata) -> None:
    before, now = (_flat(metadata["config"]) for metadata in (saved, ours))
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not {name, name.split(".")[0]} & _FREE
    ]
    if not changed and saved["fingerprint"] != ours["fingerprint"]:
        changed = ["the data, the tokenizer or the packing has changed"]
    if changed:
        raise UserError(
            f"cannot resume {folder.parent}: {'; '.join(changed)}; restore that or name another train.output"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _announce(cfg: Config, mesh: jax.sharding.Mesh, state: TrainState, start: int, total: int) -> None:
    trained, frozen = telemetry.parameter_counts(state.trainable, state.frozen)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    log.info("%s: %d steps%s", cfg.train.stage, total, f", continued after step {start}" if start else "")
    log.info("mesh: %s; %d %s devices", axes, mesh.size, mesh.devices.flat[0].platform)
    log.info("parameters: %s learn (%s), %s frozen", f"{trained:,}", ", ".join(cfg.train.train), f"{frozen:,}")


def _steps(
    cfg: Config,
    state: TrainState,
    loader: Loader,
    checkpoints: Checkpoints,
    metadata: Metadata,
    metrics_log: MetricsLog,
    on_step: OnStep | None,
) -> TrainState:
    """The loop proper: from the loader's start step to its last, saving as it goes."""
    loss_fn = next_token_loss(cfg.model, Compute.of(cfg.train))
    step_fn: TrainStep = make_train_step(loss_fn, make_optimizer(cfg.optimizer), cfg.train.micro_batches)
    total = loader.steps
    batches = iter(loader)
    clock = _Clock()

    def record(step: int, metrics: Metrics, ids: list[str], waited: float) -> None:
        row = _row(step, jax.device_get(metrics), learning_rate(cfg.optimizer, step - 1, total), clock.lap(), waited)
        _check_weight(row, ids)
        metrics_log.write(row)
        _check_skips(cfg, metrics_log.rows, ids)
        if step % cfg.train.log_every == 0 or step == total:
            log.info("step %d/%d  loss %.4f  %.0f tokens/s", step, total, row["loss"], row["tokens_per_second"])
        if on_step is not None:
            on_step(step, total, row)

    pending: tuple[int, Metrics, list[str], float] | None = None
    with stop_requests() as asked:
        for step in range(loader.start_step + 1, total + 1):
            since = time.perf_counter()
            batch, ids = next(batches)
            waited = time.perf_counter() - since
            if step == loader.start_step + 1 and jax.process_index() == 0:
                text = telemetry.describe_row(batch, load_tokenizer(cfg.data.tokenizer))
                log.info("first sample (%s), «learnt»:\n%s", ids[0] if ids else "padding", text)
            state, metrics = step_fn(state, batch, learning_rate(cfg.optimizer, step - 1, total))
            metrics |= telemetry.batch_counts(batch, cfg.model.projector.visual_tokens)
            # The step before is read while this one runs, so that the devices never wait for the host.
            if pending is not None:
                record(*pending)
            pending = step, metrics, ids, waited
            stop = asked(step)
            if stop or step == total or step % cfg.train.checkpoint_every == 0:
                record(*pending)
                pending = None
                bad = metadata["bad_records"] | loader.report()["bad_record_ids"]
                checkpoints.save(step, state, metadata | {"bad_records": bad})
            if stop and step < total:
                checkpoints.wait()
                raise Interrupted(
                    f"{cfg.train.stage} stopped after step {step} of {total} and saved in {cfg.train.output}: "
                    "the same command continues from there"
                )
    return state


class _Clock:
    """Wall and compile seconds since the lap before."""

    def __init__(self) -> None:
        self._last = time.perf_counter(), telemetry.compile_seconds()

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter(), telemetry.compile_seconds()
        before, self._last = self._last, now
        return now[0] - before[0], now[1] - before[1]


def _row(step: int, metrics: Metrics, rate: float, lap: tuple[float, float], waited: float) -> Row:
    seconds, compiling = lap
    counts = {name: int(metrics[name]) for name in ("tokens", "loss_tokens", "images")}
    floats = {name: float(value) for name, value in metrics.items() if name not in (*counts, "non_finite")}
    return {
        "step": step,
        **floats,
        **counts,
        "skipped": int(metrics["non_finite"]),
        "learning_rate": rate,
        "seconds": seconds,
        "compile_seconds": compiling,
        "tokens_per_second": counts["tokens"] / seconds,
        "data_wait_share": min(1.0, waited / seconds),
    }


def _check_weight(row: Row, ids: list[str]) -> None:
    """A template that masks every label would else give loss 0 for a whole run."""
    if row["weight"] == 0:
        raise UserError(
            f"step {row['step']}: no token of the batch carries loss (samples {_few(ids)}): "
            "look at the first sample printed at the start, and mend the data or its rendering"
        )


def _check_skips(cfg: Config, rows: list[Row], ids: list[str]) -> None:
    limit = cfg.train.max_skipped_updates
    if limit and len(rows) >= limit and all(row["skipped"] for row in rows[-limit:]):
        raise UserError(
            f"{limit} updates in a row had a non-finite loss or gradient, the last at step {rows[-1]['step']} on "
            f"samples {_few(ids)}: lower optimizer.learning_rate or remove these samples; the last checkpoint is sound"
        )


def _few(ids: list[str], most: int = 8) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _data_report(loader: Loader, metadata: Metadata) -> dict[str, Any]:
    """The loader's report, with the bad records that were met before the last resume."""
    report = loader.report()
    return report | {"bad_record_ids": metadata["bad_records"] | report["bad_record_ids"]}


def _result(cfg: Config, state: TrainState, rows: list[Row], data: dict[str, Any]) -> TrainResult:
    tokens = sum(row["tokens"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    compiling = sum(row["compile_seconds"] for row in rows)
    return TrainResult(
        params=state.params,
        history=rows,
        stage=cfg.train.stage,
        steps=int(state.step),
        tokens=tokens,
        loss_first=telemetry.mean_loss(rows),
        loss_last=telemetry.mean_loss(rows, last=True),
        seconds=seconds,
        compile_seconds=compiling,
        tokens_per_second=tokens / max(seconds - compiling, 1e-9),
        skipped_updates=sum(row["skipped"] for row in rows),
        data=data,
    )
