"""The one attention entry: a mask specification, a backend chosen by platform, no silent fallback."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int

from infimed_jax.ops.attention_rows import rows_attention
from infimed_jax.ops.attention_splash import splash_attention
from infimed_jax.ops.attention_xla import xla_attention

log = logging.getLogger(__name__)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_segments", "key_segments", "query_positions", "key_positions", "query_prefixes"),
    meta_fields=("causal",),
)
@dataclass(frozen=True)
class Mask:
    """Which keys a query sees; a specification, never a dense array. None means no restriction."""

    causal: bool = False
    """A key is seen only where its position is at most the query's; without positions, the index is the position."""
    query_segments: Int[Array, "B T"] | None = None
    """A query sees the keys of its own segment. Segment 0 is padding: it sees nothing and is not seen."""
    key_segments: Int[Array, "B S"] | None = None
    query_positions: Int[Array, "B T"] | None = None
    key_positions: Int[Array, "B S"] | None = None
    query_prefixes: Int[Array, "B T"] | None = None
    """A query sees the keys of this segment too, causally: the one that its own continues; 0 for none."""

    def __post_init__(self) -> None:
        if (self.query_segments is None) != (self.key_segments is None):
            raise ValueError("Mask: give query_segments and key_segments, or neither")
        if (self.query_positions is None) != (self.key_positions is None):
            raise ValueError("Mask: give query_positions and key_positions, or neither")
        if self.query_positions is not None and not self.causal:
            raise ValueError("Mask: positions restrict nothing unless causal")
        if self.query_prefixes is not None and self.query_segments is None:
            raise ValueError("Mask: prefixes are segments: give query_segments and key_segments")


BACKENDS = {"xla": xla_attention, "rows": rows_attention, "splash": splash_attention}
_BY_PLATFORM = {"tpu": "splash", "cpu": "rows"}
KNOWS_PREFIXES = ("xla", "rows")


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention, scaled by 1/sqrt(H), N/K queries to a key head; a query that sees nothing returns zeros.

    `implementation` is "xla", "rows" (CPU), "splash" (TPU), or None for the platform's own, XLA elsewhere; the choice
    is logged once. Raises ValueError for an unknown name and for what the backend cannot do.
    """
    name = implementation or platform_choice(jax.default_backend())
    if name not in BACKENDS:
        raise ValueError(f"unknown attention implementation {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name](q, k, v, mask)


def shares_prefixes(implementation: str | None) -> bool:
    """Whether that backend (None: the platform's own) takes a mask with `query_prefixes`."""
    return (implementation or platform_choice(jax.default_backend())) in KNOWS_PREFIXES


@functools.cache
def platform_choice(platform: str) -> str:
    name = _BY_PLATFORM.get(platform, "xla")
    log.info("attention: %s on %s", name, platform)
    return name
