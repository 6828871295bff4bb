"""One training step as a compiled function: sums of gradients, one division, one guarded update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Float

from infimed_jax import config
from infimed_jax.arrays import Array
from infimed_jax.data.batch import Batch
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.models.params import Params
from infimed_jax.train.state import TrainState, merge_params

LossFn = Callable[[Params, Any], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
"""`(params, batch) -> (loss_sum, aux)`: everything a SUM over the rows, `aux["weight"]` the divisor of all of them."""

Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Any, float], tuple[TrainState, Metrics]]


@functools.lru_cache(maxsize=8)
def next_token_loss(model: config.Model, compute: Compute) -> LossFn:
    """Cross-entropy of the next token, weighted by `Batch.loss_weights`. Equal arguments give the same function."""

    def loss_fn(params: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
        hidden = forward.hidden_states(params, batch, model, compute)
        targets = forward.next_tokens(batch.tokens)
        logprobs, entropy = forward.token_logprobs(params, hidden, targets, batch.loss_weights, model, compute)
        weights = batch.loss_weights
        return -jnp.sum(weights * logprobs), {"weight": jnp.sum(weights), "entropy": jnp.sum(weights * entropy)}

    return loss_fn


@functools.lru_cache(maxsize=16)
def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, micro_batches: int = 1) -> TrainStep:
    """`step(state, batch, learning_rate) -> (state, metrics)`, jitted, the state donated.

    `batch` is any pytree of arrays with a leading B, a multiple of `micro_batches`. Loss and gradients are sums over
    all rows divided once by the global `weight`, so k micro-batches equal one and n devices equal one. Metrics:
    `loss`, `grad_norm` (before clipping), `weight`, `non_finite` (0 or 1), and every aux sum divided by `weight`.
    Where the loss or the gradient is not finite (a weight of 0 included), parameters and moments stay as they are.
    """

    def step(state: TrainState, batch: Any, learning_rate: Float[Array, ""]) -> tuple[TrainState, Metrics]:
        loss, aux, grads = _summed_gradients(loss_fn, state, batch, micro_batches)
        with jax.named_scope("optimizer"):
            weight = aux["weight"]
            grads = jax.tree.map(lambda g: g / weight, grads)
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss / weight) & jnp.isfinite(grad_norm)
            direction, opt = optimizer.update(grads, state.opt, state.trainable)
            moved = jax.tree.map(lambda p, d: p - learning_rate * d, state.trainable, direction)
            keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
            new_state = TrainState(
                keep(moved, state.trainable), state.frozen, keep(opt, state.opt), state.step + jnp.int32(1)
            )
        metrics = {name: value / weight for name, value in aux.items() if name != "weight"}
        metrics |= {"loss": loss / weight, "grad_norm": grad_norm, "weight": weight}
        metrics["non_finite"] = (~finite).astype(jnp.int32)
        return new_state, metrics

    jitted = jax.jit(step, donate_argnums=0)
    return lambda state, batch, learning_rate: jitted(state, batch, jnp.float32(learning_rate))


def _summed_gradients(
    loss_fn: LossFn, state: TrainState, batch: Any, micro_batches: int
) -> tuple[Array, dict[str, Array], Params]:
    """Sums over all micro-batches of the loss, of aux and of the trainable part's gradients."""

    def objective(trainable: Params, micro: Any) -> tuple[Array, dict[str, Array]]:
        return loss_fn(merge_params(trainable, state.frozen), micro)

    value_and_grad = jax.value_and_grad(objective, has_aux=True)

    def piece(micro: Any) -> tuple[Array, dict[str, Array], Params]:
        (loss, aux), grads = value_and_grad(state.trainable, micro)
        return loss, aux, grads

    if micro_batches == 1:
        return piece(batch)
    pieces = jax.tree.map(lambda leaf: _interleave(leaf, micro_batches), batch)

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, piece(micro)), None

    _, aux = jax.eval_shape(objective, state.trainable, jax.tree.map(lambda leaf: leaf[0], pieces))
    zero = jnp.float32(0), jax.tree.map(lambda _: jnp.float32(0), aux), jax.tree.map(jnp.zeros_like, state.trainable)
    total, _ = jax.lax.scan(add, zero, pieces)
    return total


def _interleave(rows: Array, micro_batches: int) -> Array:
    """[B, ...] -> [k, B/k, ...] taking every k-th row: each device keeps its own rows, so nothing moves.

    A reshape to [k, B/k] would be an all-to-all (measured in the compiled program).
    """
    sharding = jax.typeof(rows).sharding
    shape = (rows.shape[0] // micro_batches, micro_batches, *rows.shape[1:])
    split = None if sharding.mesh.empty else PartitionSpec(sharding.spec[0], None, *sharding.spec[1:])
    return jnp.reshape(rows, shape, out_sharding=split).swapaxes(0, 1)
