"""A GRPO run: rollouts of one policy on a dataset's questions, each followed by its updates.

What a step does is a pure function of the state, the seed and the step's number, so a stopped run goes on exactly as if
it had not been stopped. The folder holds what a training run's does, and replies.jsonl: one group a step, to be read.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import jax
import jax.numpy as jnp
import numpy as np

from infimed_jax import config
from infimed_jax.cost.chips import GIB
from infimed_jax.data.training import open_for_training
from infimed_jax.errors import UserError
from infimed_jax.files import to_json, write_text
from infimed_jax.models.compute import Compute
from infimed_jax.models.lora import merge_lora, scale_of
from infimed_jax.models.params import Params
from infimed_jax.plugins import fingerprint
from infimed_jax.rl.loss import grpo_loss, make_scorer
from infimed_jax.rl.rewards import RewardFn, load_reward
from infimed_jax.rl.rollout import Questions, plan_layout, prompt_order, questions
from infimed_jax.rl.step import Plan, Reply, grpo_step
from infimed_jax.runs.checkpoint import Metadata
from infimed_jax.runs.loop import Beat, OnStep, Run, Stepped, open_run, run_steps, write_result
from infimed_jax.runs.meter import memory_bytes
from infimed_jax.runs.metrics import Row
from infimed_jax.train.optimizer import make_optimizer
from infimed_jax.train.start import bound_content, check_start, first_params, open_state
from infimed_jax.train.state import TrainState, split_params
from infimed_jax.train.step import make_train_step

REPLIES = "replies.jsonl"
EDGE = 0.1
"""Share of the steps whose mean is a run's first and its last reward."""

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
    params: Params | None = None,
    on_step: OnStep | None = None,
    reward: RewardFn | None = None,
) -> GrpoResult:
    """Align `params`, or those of `train.init_from`, on the questions of `data.dataset`, in `cfg.train.output`.

    `reward` replaces the one that `grpo.reward` names.

    A stopped run is continued. The reference of the KL penalty is what the run starts from, also on resume. Raises
    Interrupted after Ctrl-C or SIGTERM, with the state saved; UserError where there is no start, the folder holds
    another run, the data is for evaluation only, nothing of it can be asked, a completion fits no row, or updates stay
    non-finite.
    """
    reward = reward or load_reward(cfg.grpo.reward)
    check_start(cfg, params)
    if params is None and not cfg.train.init_from:
        raise UserError("grpo starts from a tuned model: give --init-from RUN (train.init_from)")
    samples = open_for_training(cfg.data.dataset)
    with open_run(cfg, on_step) as run:
        pool = questions(samples, run.tokenizer, cfg)
        plan, state, metadata = _open(run, params, pool, reward)
        _announce(run, plan, pool)

        def step(state: TrainState, number: int, beat: Beat) -> tuple[TrainState, Stepped]:
            since = time.perf_counter()
            places = prompt_order(len(pool.numbers), cfg.grpo.prompts, cfg.train.seed, number - 1)
            asked = [samples[int(place)] for place in pool.numbers[places]]
            state, metrics, replies = grpo_step(plan, state, number - 1, asked, beat)
            row = _row(cfg, number, metrics, time.perf_counter() - since)
            if row["skipped"]:
                row["skipped_ids"] = sorted({sample.id for sample in asked})
            _write_replies(file, number, replies[: cfg.grpo.group_size])
            return state, Stepped(lambda: row)

        with _open_replies(run.folder, run.start) as file:
            updates = cfg.grpo.prompts // cfg.grpo.update_prompts
            state = run_steps(run, state, step, cfg.grpo.steps, lambda: metadata, updates=updates)
        result = _result(run, state, pool)
        write_result(run, result)
        return result


def _open(run: Run, params: Params | None, pool: Questions, reward: RewardFn) -> tuple[Plan, TrainState, Metadata]:
    """The run's plan, its state, and the metadata of its checkpoints; the start itself is not kept."""
    start, before = first_params(run, params)
    content = bound_content(run) | {"questions_sha256": pool.fingerprint}
    content |= {"init_from_sha256": before.get("leaves_sha256", ""), "reward_sha256": fingerprint(run.cfg.grpo.reward)}
    state, metadata = open_state(run, content, lambda: (start, before))
    return _plan(run, start, pool, reward), state, metadata


def _plan(run: Run, start: Params, pool: Questions, reward: RewardFn) -> Plan:
    cfg = replace(run.cfg, train=replace(run.cfg.train, micro_batches=run.pieces, rows_per_device=0))
    layout, compute = plan_layout(pool, cfg), Compute.of(cfg.train)
    reference = None
    if cfg.grpo.kl_coefficient > 0:
        adapted = (cfg.model.language,) if cfg.train.lora.rank else ()
        learnt, frozen = split_params(start, tuple(part for part in cfg.train.train if part not in adapted))
        # In the very dtypes of the state, so that the first divergence is exactly 0.
        reference = jax.tree.map(lambda x: x.astype(jnp.float32), learnt)
        reference |= jax.tree.map(lambda x: x.astype(cfg.train.compute_dtype), frozen)
    return Plan(
        cfg=cfg,
        tokenizer=run.tokenizer,
        reward=reward,
        layout=layout,
        longest_prompt=pool.longest,
        update=make_train_step(grpo_loss(cfg.model, compute, cfg.grpo), make_optimizer(cfg.optimizer), layout.pieces),
        logprobs=make_scorer(cfg.model, compute, cfg.grpo.temperature, layout.pieces),
        reference=reference,
    )


def _row(cfg: config.Config, number: int, metrics: Row, seconds: float) -> Row:
    return {
        "step": number,
        **metrics,
        "seconds": seconds,
        "tokens_per_second": metrics["tokens"] / seconds,
        "memory_gib": memory_bytes(jax.local_devices()) / GIB,
        "seconds_left": seconds * (cfg.grpo.steps - number),
    }


def _announce(run: Run, plan: Plan, pool: Questions) -> None:
    layout = plan.layout
    run.announce(run.cfg.grpo.steps)
    dropped = ", ".join(f"{count} {reason}" for reason, count in pool.dropped.items()) or "none"
    log.info("questions: %d, longest prompt %d tokens; left out: %s", len(pool.numbers), pool.longest, dropped)
    log.info(
        "update: %d completions in at most %d rows of %d tokens and %d images, %d rows at once; %s",
        run.cfg.grpo.update_prompts * run.cfg.grpo.group_size,
        layout.rows,
        layout.context,
        layout.images,
        layout.piece,
        "a prompt is computed once a row" if layout.shared else "each completion brings its prompt",
    )


def _open_replies(folder: Path, start: int) -> TextIO:
    """Open replies.jsonl for appending; lines past step `start` are dropped, since those steps run again."""
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
        file.write(
            to_json(values | {"reward": {"total": reply.reward.total, **reply.reward.parts}}, ensure_ascii=False) + "\n"
        )


def _result(run: Run, state: TrainState, pool: Questions) -> GrpoResult:
    rows = run.metrics.rows
    edge = max(1, round(EDGE * len(rows)))
    return GrpoResult(
        params=merge_lora(state.params, scale_of(run.cfg.train.lora)),
        history=rows,
        steps=len(rows),
        tokens=sum(row["tokens"] for row in rows),
        reward_first=float(np.mean([row["reward"] for row in rows[:edge]])),
        reward_last=float(np.mean([row["reward"] for row in rows[-edge:]])),
        seconds=sum(row["seconds"] for row in rows),
        skipped_updates=sum(row["skipped"] for row in rows),
        dropped=pool.dropped,
    )
