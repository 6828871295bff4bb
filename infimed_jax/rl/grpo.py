"""A GRPO run: open, start or resume, step, save, report.

What a step does is a pure function of the state, the seed and the step's number, so a stopped run goes on exactly as if
it had not been stopped. The folder holds what a training run's does, and replies.jsonl: one group a step, to be read.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from infimed_jax import config
from infimed_jax.data.chat import Tokenizer
from infimed_jax.data.sample import Sample
from infimed_jax.errors import Interrupted, UserError
from infimed_jax.files import make_folder, to_json, write_json, write_text
from infimed_jax.models.compute import Compute
from infimed_jax.models.lora import merge_lora, scale_of
from infimed_jax.models.params import abstract_params
from infimed_jax.rl.loss import grpo_loss, make_scorer
from infimed_jax.rl.rewards import score
from infimed_jax.rl.rollout import Questions, plan_layout, prompt_order, questions
from infimed_jax.rl.step import Plan, Reply, RewardFn, grpo_step
from infimed_jax.runs.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    Metadata,
    abstract_like,
    keep_tokenizer,
    leaves_fingerprint,
    read_metadata,
)
from infimed_jax.runs.curve import CURVE, draw_curve
from infimed_jax.runs.guard import Watchdog, stop_requests
from infimed_jax.runs.history import history_of, stage_entry
from infimed_jax.runs.meter import memory_bytes
from infimed_jax.runs.metrics import MetricsLog, Row, progress_line
from infimed_jax.sharding import micro_batches, run_mesh
from infimed_jax.train.loop import OnStep
from infimed_jax.train.optimizer import make_optimizer
from infimed_jax.train.state import Params, TrainState, init_state, split_params
from infimed_jax.train.step import make_train_step

REPLIES = "replies.jsonl"
RESULT = "result.json"

_BOUND = {
    "data": ("context", "images_per_row"),
    "train": ("train", "lora", "compute_dtype", "global_batch", "micro_batches", "seed"),
}
"""Settings that a resumed run must share, beside those of the model, the optimizer and GRPO itself."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GrpoResult:
    params: Params
    """After the last update, on the devices, adapters merged."""
    history: list[Row]
    """The lines of metrics.jsonl."""
    steps: int
    tokens: int
    """Trained on, prompts included, non-padding."""
    reward_first: float
    """Mean of the first tenth of the steps."""
    reward_last: float
    """Mean of the last tenth of the steps."""
    seconds: float
    """In steps, compiling included."""
    skipped_updates: int
    dropped: dict[str, int]
    """Samples that could not be asked, by reason."""


def grpo(
    cfg: config.Config,
    *,
    params: Params,
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    on_step: OnStep | None = None,
    reward: RewardFn = score,
) -> GrpoResult:
    """Align `params` in `cfg.train.output` with `grpo.steps` rollouts, or what a stopped run has left of them.

    The reference of the KL penalty is `params` as given, also on resume. Raises Interrupted after Ctrl-C or SIGTERM,
    with the state saved; UserError where the folder holds another run, nothing can be asked, a completion fits no row,
    or updates stay non-finite.
    """
    if not cfg.train.output:
        raise config.ConfigError("train.output is empty: name the run's folder")
    mesh = run_mesh(cfg)
    cfg = replace(cfg, train=replace(cfg.train, micro_batches=micro_batches(cfg.train, mesh), rows_per_device=0))
    found = questions(samples, tokenizer, cfg)
    folder = Path(cfg.train.output)
    make_folder(folder)
    checkpoints = Checkpoints(folder / CHECKPOINTS, cfg.train.keep_checkpoints)
    try:
        with jax.set_mesh(mesh):
            params = _place(params, cfg.model)
            plan = _plan(cfg, params, tokenizer, found, reward)
            return _run(plan, found, params, samples, checkpoints, on_step)
    finally:
        checkpoints.close()


def _place(params: Params, model: config.Model) -> Params:
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, like.sharding.spec)),
        params,
        abstract_params(model),
    )


def _plan(cfg: config.Config, params: Params, tokenizer: Tokenizer, found: Questions, reward: RewardFn) -> Plan:
    layout, compute = plan_layout(found, cfg), Compute.of(cfg.train)
    reference = None
    if cfg.grpo.kl_coefficient > 0:
        adapted = ("text",) if cfg.train.lora.rank else ()
        learnt, frozen = split_params(params, tuple(part for part in cfg.train.train if part not in adapted))
        # In the very dtypes of the state, so that the first divergence is exactly 0.
        reference = jax.tree.map(lambda x: x.astype(jnp.float32), learnt)
        reference |= jax.tree.map(lambda x: x.astype(cfg.train.compute_dtype), frozen)
    return Plan(
        cfg=cfg,
        tokenizer=tokenizer,
        reward=reward,
        layout=layout,
        longest_prompt=found.longest,
        update=make_train_step(grpo_loss(cfg.model, compute, cfg.grpo), make_optimizer(cfg.optimizer), layout.pieces),
        logprobs=make_scorer(cfg.model, compute, cfg.grpo.temperature, layout.pieces),
        reference=reference,
    )


def _run(
    plan: Plan,
    found: Questions,
    params: Params,
    samples: Sequence[Sample],
    checkpoints: Checkpoints,
    on_step: OnStep | None,
) -> GrpoResult:
    cfg, folder, main = plan.cfg, Path(plan.cfg.train.output), jax.process_index() == 0
    start = checkpoints.latest_step() or 0
    metadata = _metadata(cfg, found, plan.tokenizer)
    state = init_state(params, cfg, make_optimizer(cfg.optimizer))
    if start:
        _check_same_run(folder, checkpoints.metadata(start)["grpo"], metadata["grpo"])
        state = checkpoints.restore(abstract_like(state), start)
    elif main:
        (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(cfg), sort_keys=False), encoding="utf-8")
        keep_tokenizer(plan.tokenizer, folder)
    _announce(plan, found, start)
    metrics_log = MetricsLog(folder, start, cfg, active=main)
    try:
        state = _steps(plan, state, start, found, samples, checkpoints, metadata, metrics_log, on_step)
    finally:
        metrics_log.close()
    checkpoints.wait()
    checkpoints.verify(cfg.grpo.steps, state)
    result = _result(cfg, state, metrics_log.rows, found)
    if main:
        draw_curve(result.history, f"{cfg.train.stage}: {folder}", folder / CURVE)
        summary = {name: value for name, value in vars(result).items() if name not in ("params", "history")}
        write_json(folder / RESULT, summary)
    return result


def _steps(
    plan: Plan,
    state: TrainState,
    start: int,
    found: Questions,
    samples: Sequence[Sample],
    checkpoints: Checkpoints,
    metadata: Metadata,
    metrics_log: MetricsLog,
    on_step: OnStep | None,
) -> TrainState:
    """The loop proper: from step `start` (from 0) to the last, saving as it goes."""
    cfg, total = plan.cfg, plan.cfg.grpo.steps
    with (
        _open_replies(Path(cfg.train.output), start) as replies_file,
        stop_requests() as asked_to_stop,
        Watchdog(cfg.train.step_timeout) as watchdog,
    ):
        due = False
        for step in range(start, total):
            checkpoints.wait(0)  # an error of the save under way
            begin = time.perf_counter()
            places = prompt_order(len(found.numbers), cfg.grpo.prompts, cfg.train.seed, step)
            asked = [samples[int(number)] for number in found.numbers[places]]
            done = step + 1
            state, metrics, replies = grpo_step(
                plan, state, step, asked, lambda doing, done=done: watchdog.beat(f"step {done}: {doing}")
            )
            seconds = time.perf_counter() - begin
            row = {
                "step": done,
                **metrics,
                "seconds": seconds,
                "tokens_per_second": metrics["tokens"] / seconds,
                "memory_gib": memory_bytes(jax.local_devices()) / 2**30,
                "seconds_left": seconds * (total - done),
            }
            metrics_log.write(row)
            _write_replies(replies_file, done, replies[: cfg.grpo.group_size])
            _check_skips(cfg, metrics_log.rows, asked, checkpoints)
            if done % cfg.train.log_every == 0 or done == total:
                log.info(progress_line(done, total, row))
            if on_step is not None:
                on_step(done, total, row)
            watchdog.beat(f"step {done}: saving")
            stop = asked_to_stop(done)
            due |= done % cfg.train.checkpoint_every == 0
            # In a run of skipped updates saves would push out the states from before it.
            if stop or done == total or (due and not _all_skipped(cfg, row)):
                due = False
                checkpoints.save(done, state, metadata | {"step": done})
            if stop and done < total:
                checkpoints.wait()
                raise Interrupted(
                    f"{cfg.train.stage} stopped after step {done} of {total} and saved in {cfg.train.output}: "
                    "the same command continues from there"
                )
    return state


def _metadata(cfg: config.Config, found: Questions, tokenizer: Tokenizer) -> Metadata:
    """What a checkpoint carries: as in a training run, and under `grpo` all that a resumed run must share."""
    values = config.to_dict(cfg)
    bound = {f"{part}.{key}": value for part in ("model", "optimizer", "grpo") for key, value in values[part].items()}
    bound |= {f"{part}.{key}": values[part][key] for part, keys in _BOUND.items() for key in keys}
    bound |= {"the questions": found.fingerprint, "the tokenizer": tokenizer.fingerprint}
    before: list[dict[str, Any]] = []
    if cfg.train.init_from:  # which may have moved
        before = history_of(read_metadata(cfg.train.init_from))
        bound["the parameters of train.init_from"] = leaves_fingerprint(cfg.train.init_from)
    return {
        "config": values,
        "fingerprint": found.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "history": [*before, stage_entry(cfg, found.fingerprint, grpo=True)],
        "grpo": bound,
    }


def _check_same_run(folder: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    keys = [key for key in ours if saved.get(key) != ours[key]]
    changed = [f"{key} was {saved[key]!r}, is {ours[key]!r}" for key in keys if key in saved]
    changed += [f"an older version began it and did not keep {key}" for key in keys if key not in saved]
    if changed:
        raise UserError(f"cannot resume {folder}: {'; '.join(changed)}; restore that or name another train.output")


def _announce(plan: Plan, found: Questions, start: int) -> None:
    settings, layout = plan.cfg.grpo, plan.layout
    log.info("%s: %d steps%s", plan.cfg.train.stage, settings.steps, f", continued after step {start}" if start else "")
    log.info("questions: %d, longest prompt %d tokens; left out: %s", len(found.numbers), found.longest, found.dropped)
    log.info(
        "update: %d completions in at most %d rows of %d tokens and %d images, %d rows at once; %s",
        settings.update_prompts * settings.group_size,
        layout.rows,
        layout.context,
        layout.images,
        layout.piece,
        "a prompt is computed once a row" if layout.shared else "each completion brings its prompt",
    )


def _check_skips(cfg: config.Config, rows: list[Row], asked: Sequence[Sample], checkpoints: Checkpoints) -> None:
    """A policy that has turned to NaN samples "!!!!" for ever: end the run instead. Whole rollouts count."""
    lost = itertools.takewhile(lambda row: _all_skipped(cfg, row), reversed(rows))
    in_a_row = sum(row["skipped"] for row in lost)
    if 0 < cfg.train.max_skipped_updates <= in_a_row:
        ids = ", ".join(sorted({sample.id for sample in asked})[:8])
        raise UserError(
            f"{in_a_row} updates in a row had a non-finite loss or gradient, the last at step {rows[-1]['step']} with "
            f"samples {ids}, …: continue in {checkpoints.elsewhere()}, with a lower optimizer.learning_rate"
        )


def _all_skipped(cfg: config.Config, row: Row) -> bool:
    return row["skipped"] == cfg.grpo.prompts // cfg.grpo.update_prompts


def _open_replies(folder: Path, start: int) -> TextIO:
    """replies.jsonl, for appending, without what follows step `start`: those steps run again."""
    file = folder / REPLIES
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= start]
    if jax.process_index() == 0:
        write_text(file, "".join(line + "\n" for line in kept))
    return file.open("a", encoding="utf-8", buffering=1)


def _write_replies(file: TextIO, step: int, replies: Sequence[Reply]) -> None:
    if jax.process_index() != 0:
        return
    for reply in replies:
        values = {"step": step, "sample": reply.sample, "reply": reply.text, "finish": reply.finish}
        file.write(to_json(values | {"reward": reply.reward._asdict()}, ensure_ascii=False) + "\n")


def _result(cfg: config.Config, state: TrainState, rows: list[Row], found: Questions) -> GrpoResult:
    edge = max(1, round(0.1 * len(rows)))
    return GrpoResult(
        params=merge_lora(state.params, scale_of(cfg.train.lora)),
        history=rows,
        steps=len(rows),
        tokens=sum(row["tokens"] for row in rows),
        reward_first=float(np.mean([row["reward"] for row in rows[:edge]])),
        reward_last=float(np.mean([row["reward"] for row in rows[-edge:]])),
        seconds=sum(row["seconds"] for row in rows),
        skipped_updates=sum(row["skipped"] for row in rows),
        dropped=found.dropped,
    )
