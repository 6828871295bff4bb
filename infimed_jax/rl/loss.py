"""The GRPO objective: clipped policy gradient and a KL penalty, averaged over all completion tokens of an update.

Sources: DeepSeekMath (arXiv 2402.03300) for the objective and the k3 estimator, DAPO (arXiv 2503.14476) for the
asymmetric clip and the token mean, dual-clip PPO (arXiv 1912.09729) for the bound at negative advantages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from infimed_jax import config
from infimed_jax.arrays import Array
from infimed_jax.data.batch import Batch
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.sharding import reshape_rows
from infimed_jax.train.step import LossFn

Scorer = Callable[[Any, Batch], jax.Array]
"""`(params, batch) -> f32[B,T]` log-probabilities."""

LOG_RATIO_BOUND = 20.0
"""|log ratio| beyond which exponentials are held: e^20 is finite in float32, and far outside every clip."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GrpoBatch:
    """Packed completions with what the loss needs at each position t, which speaks of `tokens[b, t+1]`."""

    batch: Batch
    """`loss_weights` are 1 where t+1 is a completion token, else 0."""
    old_logprobs: jax.Array
    """f32[B,T]; of the policy that sampled: the training graph's, or, on-policy, what the sampler itself reported."""
    reference_logprobs: jax.Array
    """f32[B,T]; of the frozen reference; zeros, and not read, where `kl_coefficient` is 0."""
    advantages: jax.Array
    """f32[B,T]; the completion's advantage on each of its tokens."""


def on_policy(grpo: config.Grpo) -> bool:
    """Whether a rollout serves one update: then the old policy is the one being trained."""
    return grpo.prompts == grpo.update_prompts


def policy_loss(
    new: Float[Array, "*shape"],
    old: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    grpo: config.Grpo,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """Loss a token, the probability ratio new / old, and where a clip decides (no gradient flows there)."""
    ratio = jnp.exp(jnp.clip(new - old, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    plain = -advantages * ratio
    bounded = -advantages * jnp.clip(ratio, 1.0 - grpo.clip_low, 1.0 + grpo.clip_high)
    loss = jnp.maximum(plain, bounded)
    clipped = bounded > plain
    if grpo.dual_clip > 0:
        ceiling = -advantages * grpo.dual_clip
        dual = (advantages < 0) & (loss > ceiling)
        loss = jnp.where(dual, ceiling, loss)
        clipped = clipped | dual
    return loss, ratio, clipped


def k3(new: Float[Array, "*shape"], reference: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Estimate a token of KL(new || reference): r - log r - 1 with r = reference / new; never negative."""
    log_ratio = jnp.clip(reference - new, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return jnp.expm1(log_ratio) - log_ratio  # expm1 keeps tiny divergences: exp(x) - x - 1 loses all below 1e-3


def completion_logprobs(
    params: Any, batch: Batch, model: config.Model, compute: Compute, temperature: float = 1.0
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of `tokens[b, t+1]` and entropy at t where `loss_weights` is not 0, else 0; float32, nats.

    The one function for old, new and reference log-probabilities. `temperature` is the sampler's: logits are linear
    in the hidden state, so dividing that is the same.
    """
    hidden = forward.hidden_states(params, batch, model, compute)
    if temperature != 1.0:
        hidden = hidden / temperature
    targets = forward.next_tokens(batch.tokens)
    return forward.token_logprobs(params, hidden, targets, batch.loss_weights, model, compute)


@functools.lru_cache(maxsize=4)
def make_scorer(model: config.Model, compute: Compute, temperature: float, pieces: int) -> Scorer:
    """`logprobs(params, batch) -> f32[B,T]`, jitted: in the train step's pieces, none that is all padding."""

    @jax.jit
    def logprobs(params: Any, batch: Batch) -> jax.Array:
        def piece(_: None, rows: Batch) -> tuple[None, jax.Array]:
            def compute_all(rows: Batch) -> jax.Array:
                return completion_logprobs(params, rows, model, compute, temperature)[0]

            return None, jax.lax.cond(
                jnp.any(rows.loss_weights > 0), compute_all, lambda rows: jnp.zeros_like(rows.loss_weights), rows
            )

        split = jax.tree.map(
            lambda x: reshape_rows(x, x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), batch
        )
        _, scored = jax.lax.scan(piece, None, split)
        return reshape_rows(scored.swapaxes(0, 1), *batch.tokens.shape)

    return logprobs


def grpo_loss(model: config.Model, compute: Compute, grpo: config.Grpo) -> LossFn:
    """`loss_fn(params, batch: GrpoBatch) -> (sum of the loss, sums)` for `train.step.make_train_step`.

    Sums over completion tokens: `weight` (the divisor) of all; of those computed `computed` (their number), `ratio`,
    `clip_fraction`, `kl` against the reference, and, on-policy, `logprob_gap`: the absolute difference to the
    sampler's, which it reports at temperature 1 only. A piece of a batch is not computed where its loss is known to be
    0: all padding, or, without a reference, no advantage (groups without variance, which are often half).
    """
    return _grpo_loss(model, compute, _read_by_the_loss(grpo))


def _read_by_the_loss(grpo: config.Grpo) -> config.Grpo:
    """`grpo` with everything else at one value, so that runs which differ there share a compiled program."""
    return config.Grpo(
        prompts=1 if on_policy(grpo) else 2,
        update_prompts=1,
        temperature=grpo.temperature,
        kl_coefficient=grpo.kl_coefficient,
        clip_low=grpo.clip_low,
        clip_high=grpo.clip_high,
        dual_clip=grpo.dual_clip,
    )


@functools.lru_cache(maxsize=4)
def _grpo_loss(model: config.Model, compute: Compute, grpo: config.Grpo) -> LossFn:
    def sums(params: Any, batch: GrpoBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        weights = batch.batch.loss_weights
        new, _ = completion_logprobs(params, batch.batch, model, compute, grpo.temperature)
        old = jax.lax.stop_gradient(new) if on_policy(grpo) else batch.old_logprobs
        loss, ratio, clipped = policy_loss(new, old, batch.advantages, grpo)
        parts = {"computed": jnp.ones_like(weights), "ratio": ratio, "clip_fraction": clipped}
        if on_policy(grpo) and grpo.temperature == 1.0:
            parts["logprob_gap"] = jnp.abs(new - batch.old_logprobs)
        if grpo.kl_coefficient > 0:
            parts["kl"] = k3(new, batch.reference_logprobs)
            loss = loss + grpo.kl_coefficient * parts["kl"]
        aux = {name: jnp.sum(weights * jax.lax.stop_gradient(part)) for name, part in parts.items()}
        return jnp.sum(weights * loss), aux

    def loss_fn(params: Any, batch: GrpoBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        shapes = jax.eval_shape(sums, params, batch)

        def nothing(params: Any, batch: GrpoBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        weights = batch.batch.loss_weights
        contributes = weights if grpo.kl_coefficient > 0 else weights * batch.advantages
        loss, aux = jax.lax.cond(jnp.any(contributes != 0), sums, nothing, params, batch)
        return loss, aux | {"weight": jnp.sum(weights)}

    return loss_fn
