"""One step of synchronous GRPO, read top to bottom: rollout, score, update, on plain arrays."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infimed_jax import config
from infimed_jax.data.chat import Tokenizer
from infimed_jax.data.images import ImageCache
from infimed_jax.data.sample import Sample
from infimed_jax.errors import UserError
from infimed_jax.models.lora import merge_lora, scale_of
from infimed_jax.models.params import Params
from infimed_jax.rl.advantages import group_advantages, without_variance
from infimed_jax.rl.loss import Scorer, on_policy
from infimed_jax.rl.rewards import Attempt, Reward, RewardFn, rewards_of
from infimed_jax.rl.rollout import Layout, training_rows
from infimed_jax.runs.meter import batch_counts
from infimed_jax.runs.metrics import Row
from infimed_jax.sampling.engine import Completion
from infimed_jax.sampling.policy import Policy
from infimed_jax.sharding import local_rows, place_batch
from infimed_jax.train.optimizer import learning_rate
from infimed_jax.train.state import TrainState
from infimed_jax.train.step import TrainStep

OF_COMPUTED = ("ratio", "clip_fraction", "kl", "logprob_gap")
"""Sums that `grpo_loss` takes over the tokens whose loss it computes."""


@dataclass(frozen=True)
class Plan:
    """What stays the same through a run."""

    cfg: config.Config
    tokenizer: Tokenizer
    reward: RewardFn
    layout: Layout
    longest_prompt: int
    """Tokens; with it the sampler's cache has one shape."""
    update: TrainStep
    logprobs: Scorer
    reference: Params | None
    """The frozen policy that the penalty holds on to; None where `kl_coefficient` is 0."""
    images: ImageCache = field(default_factory=ImageCache)


@dataclass(frozen=True)
class Reply:
    """A completion as a person reads it."""

    sample: str
    text: str
    reward: Reward
    finish: str


def grpo_step(
    plan: Plan, state: TrainState, step: int, asked: Sequence[Sample], on_phase: Callable[[str], None] = lambda _: None
) -> tuple[TrainState, Row, list[Reply]]:
    """One rollout of `asked` (`grpo.prompts` samples) and its updates; `state` is donated.

    `on_phase` hears what begins, and each burst of a rollout, so that a watchdog can name what hangs.
    """
    cfg, settings, tokenizer, mesh = plan.cfg, plan.cfg.grpo, plan.tokenizer, jax.sharding.get_mesh()
    clock = [time.perf_counter()]

    on_phase("rollout")
    # Rollout. A group is `group_size` times the same object, side by side: its prompt is prefilled once.
    params = merge_lora(state.params, scale_of(cfg.train.lora), cfg.train.compute_dtype)
    policy = Policy.of(params, cfg, tokenizer, plan.images)
    prompts = [p for p in policy.prompts(asked, reasoning=True) for _ in range(settings.group_size)]
    completions = policy.answer(
        prompts,
        rollout_sampling(cfg),
        jax.random.fold_in(jax.random.key(cfg.train.seed), step),
        longest=plan.longest_prompt,
        on_progress=lambda done, total, _: on_phase(f"rollout, {done} of {total} completions"),
    )
    del params, policy  # with the caches, which died with the engine: the update gets the memory
    clock.append(time.perf_counter())

    # Score.
    on_phase("scoring")
    attempts = [
        Attempt(asked[number // settings.group_size], tokenizer.decode(c.text_tokens), c.finish == "stop")
        for number, c in enumerate(completions)
    ]
    rewards = rewards_of(plan.reward, attempts, settings)
    replies = [
        Reply(attempt.sample.id, attempt.reply, earned, completion.finish)
        for attempt, earned, completion in zip(attempts, rewards, completions, strict=True)
    ]
    totals = np.array([reply.reward.total for reply in replies]).reshape(-1, settings.group_size)
    advantages = group_advantages(totals, settings.normalize_std).ravel()
    local = local_rows(plan.layout.rows, mesh)
    batches, gaps = [], []
    groups = np.arange(len(prompts)).reshape(-1, settings.group_size)
    for part in np.split(np.arange(len(groups)), settings.prompts // settings.update_prompts):
        # Groups that teach nothing come last: without a reference, pieces of theirs alone need not be computed.
        part = groups[part[np.argsort(without_variance(totals[part]), kind="stable")]].ravel()
        rows = training_rows(
            [prompts[i] for i in part], [completions[i] for i in part], advantages[part], plan.layout, cfg.model
        )
        batch = place_batch(jax.tree.map(lambda x: x[local], rows), mesh)
        if not on_policy(settings):  # else the update itself computes them
            old = plan.logprobs(state.params, batch.batch)
            if settings.temperature == 1.0:  # at which the sampler reports its own
                gaps.append(jnp.abs(old - batch.old_logprobs))
            batch = replace(batch, old_logprobs=old)
        if plan.reference is not None:
            batch = replace(batch, reference_logprobs=plan.logprobs(plan.reference, batch.batch))
        batches.append(jax.block_until_ready(batch))
    clock.append(time.perf_counter())

    # Update.
    total = settings.steps * len(batches)
    updates = []
    for number, batch in enumerate(batches):
        on_phase(f"update {number + 1} of {len(batches)}")
        rate = learning_rate(cfg.optimizer, step * len(batches) + number, total)
        state, sums = plan.update(state, batch, rate)
        updates.append(jax.device_get(sums) | {"learning_rate": rate})
    clock.append(time.perf_counter())
    counts = [jax.device_get(batch_counts(batch.batch, cfg.model.visual_tokens)) for batch in batches]
    metrics = rollout_metrics(replies, completions, totals) | update_metrics(updates, gaps)
    metrics |= {name: int(sum(count[name] for count in counts)) for name in counts[0]}
    seconds = dict(zip(("rollout_seconds", "score_seconds", "update_seconds"), np.diff(clock).tolist(), strict=True))
    return state, metrics | seconds, replies


def rollout_sampling(cfg: config.Config) -> config.Sampling:
    """The rollout's decoding: the policy itself at `grpo.temperature`, on the slots of `sampling`."""
    return replace(
        cfg.sampling,
        temperature=cfg.grpo.temperature,
        top_p=cfg.grpo.top_p,
        top_k=0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        max_tokens=cfg.grpo.max_response,
    )


def rollout_metrics(replies: Sequence[Reply], completions: Sequence[Completion], totals: np.ndarray) -> Row:
    """Means over the completions, also of each part of their rewards; `no_variance` is the share of groups that taught
    nothing.

    `entropy` is the sampled tokens' mean surprisal, nats: at temperature 1 its expectation is the policy's entropy.
    """
    lengths = [len(c.tokens) for c in completions]
    parts = {name: float(np.mean([reply.reward.parts[name] for reply in replies])) for name in replies[0].reward.parts}
    metrics = {
        "reward": float(totals.mean()),
        "no_variance": float(without_variance(totals).mean()),
        "entropy": -float(np.concatenate([c.logprobs for c in completions]).mean()),
        "response_tokens": float(np.mean(lengths)),
        "response_tokens_max": float(max(lengths)),
        "truncated": float(np.mean([c.finish == "length" for c in completions])),
    }
    if taken := parts.keys() & metrics.keys():
        raise UserError(f"grpo.reward gave a part {min(taken)!r}, which is a metric already: give it another name")
    return metrics | parts


def update_metrics(updates: Sequence[dict[str, Any]], gaps: Sequence[jax.Array]) -> Row:
    """`loss` over a rollout's tokens, the rest over those computed, `grad_norm` over its updates.

    A skipped update counts as `skipped` and for nothing else; means over nothing are left out.
    """
    good = [u for u in updates if not u["non_finite"]]
    tokens = np.array([u["weight"] for u in good], np.float64)
    computed = tokens * [u["computed"] for u in good]
    metrics = {"skipped": len(updates) - len(good), "learning_rate": float(updates[0]["learning_rate"])}
    if good:
        metrics["grad_norm"] = float(np.mean([u["grad_norm"] for u in good]))
        metrics["loss"] = float(np.average([u["loss"] for u in good], weights=tokens))
        metrics["computed"] = float(computed.sum() / tokens.sum())
    for name in OF_COMPUTED if computed.sum() > 0 else ():
        if name in good[0]:
            metrics[name] = float(np.sum([u[name] for u in good] * tokens) / computed.sum())
    if gaps:
        metrics["logprob_gap"] = sum(float(jnp.sum(gap)) for gap in gaps) / sum(float(u["weight"]) for u in updates)
        metrics["logprob_gap_max"] = max(float(jnp.max(gap)) for gap in gaps)
    return metrics
