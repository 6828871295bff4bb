"""Log-probabilities of targets over a large vocabulary, without ever holding the logits of a whole row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from infimed_jax.arrays import Array
from infimed_jax.sharding import defer_grad_reduction, reshape_rows, spec_of


def target_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log p(target) and the entropy of p, in float32 nats; both 0 where the weight is 0.

    Weights only select: results are not multiplied by them. At most `chunk` positions of each row have logits at a
    time, and they are recomputed in the backward pass. Each row's weighted positions are moved to its front, and a
    chunk in which no row has one is skipped: where only answers carry loss this is most of the head's work.
    The entropy carries no gradient. That of `unembedding` is added up over the chunks on each device, then once over
    the devices: a sum a chunk would be a third of all that a step of the 4B model sends.
    """
    tokens = hidden.shape[1]
    chunk = min(chunk, tokens)
    chunks = -(-tokens // chunk)
    wanted = weights != 0
    order = jnp.argsort(~wanted, axis=1, stable=True)
    inverse = jnp.argsort(order, axis=1)
    unembedding = defer_grad_reduction(unembedding, spec_of(hidden)[0])
    front = (_permute(hidden, order, inverse), _rows(targets, order), _rows(wanted, order))
    pieces = [_split(x, chunks, chunk) for x in front]

    @jax.checkpoint
    def piece(hidden: Array, targets: Array, wanted: Array) -> tuple[Array, Array]:
        def compute(hidden: Array) -> tuple[Array, Array]:
            logprobs, entropy = _chunk_logprobs(hidden, unembedding, targets)
            return jnp.where(wanted, logprobs, 0.0), jnp.where(wanted, entropy, 0.0)

        def skip(hidden: Array) -> tuple[Array, Array]:
            zeros = jnp.zeros_like(hidden[..., 0], jnp.float32)
            return zeros, zeros

        return jax.lax.cond(wanted.any(), compute, skip, hidden)

    _, (logprobs, entropy) = jax.lax.scan(lambda _, xs: (None, piece(*xs)), None, tuple(pieces))
    return _permute(_join(logprobs, tokens), inverse, order), _rows(_join(entropy, tokens), inverse)


def _chunk_logprobs(
    hidden: Float[Array, "B C D"], unembedding: Float[Array, "D V"], targets: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    batch, vocab = spec_of(hidden)[0], spec_of(unembedding)[1]
    logits = jnp.einsum(
        "bcd,dv->bcv",
        hidden,
        unembedding,
        preferred_element_type=jnp.float32,
        out_sharding=PartitionSpec(batch, None, vocab),
    )
    shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    log_total = jnp.log(jnp.exp(shifted).sum(-1))
    # A masked sum instead of a gather: it stays local where the vocabulary is split over devices.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    logprobs = jnp.where(hit, shifted, 0.0).sum(-1) - log_total
    fixed = jax.lax.stop_gradient(shifted)
    entropy = jax.lax.stop_gradient(log_total) - (jnp.exp(fixed) * fixed).sum(-1) / jnp.exp(fixed).sum(-1)
    return logprobs, entropy


def _split(x: Array, chunks: int, chunk: int) -> Array:
    """[B,T,…] → [chunks,B,chunk,…], padded with zeros (False for the selection) at the row's end."""
    padding = [(0, 0), (0, chunks * chunk - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return reshape_rows(jnp.pad(x, padding), x.shape[0], chunks, chunk, *x.shape[2:]).swapaxes(0, 1)


def _join(x: Array, tokens: int) -> Array:
    """[chunks,B,chunk] → [B,T], padding cut off."""
    return reshape_rows(x.swapaxes(0, 1), x.shape[1], x.shape[0] * x.shape[2])[:, :tokens]


def _rows(x: Array, order: Int[Array, "B T"]) -> Array:
    """Row b of the result is `x[b, order[b]]`."""
    return jax.vmap(lambda row, index: row.at[index].get(mode="promise_in_bounds", unique_indices=True))(x, order)


@jax.custom_vjp
def _permute(x: Array, order: Array, inverse: Array) -> Array:
    """`_rows` for a permutation; its gradient is the inverse permutation, a gather where JAX would scatter."""
    return _rows(x, order)


def _permute_fwd(x: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return _rows(x, order), inverse


def _permute_bwd(inverse: Array, gradient: Array) -> tuple[Array, None, None]:
    return _rows(gradient, inverse), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)
