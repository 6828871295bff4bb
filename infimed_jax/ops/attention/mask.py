"""Which keys a query sees, as a specification that each backend turns into what its kernel wants."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
from jaxtyping import Int

from infimed_jax.arrays import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_segments", "key_segments", "query_positions", "key_positions", "query_prefixes"),
    meta_fields=("causal",),
)
@dataclass(frozen=True)
class Mask:
    """Never a dense array. None means no restriction."""

    causal: bool = False
    """A key is seen only where its position is at most the query's; without positions, the index is the position."""
    query_segments: Int[Array, "B T"] | None = None
    """A query sees the keys of its own segment. Segment 0 is padding: it sees nothing and is not seen."""
    key_segments: Int[Array, "B S"] | None = None
    query_positions: Int[Array, "B T"] | None = None
    key_positions: Int[Array, "B S"] | None = None
    query_prefixes: Int[Array, "B T"] | None = None
    """A query also sees the keys of this segment, causally: the segment that its own continues; 0 for none."""

    def __post_init__(self) -> None:
        if (self.query_segments is None) != (self.key_segments is None):
            raise ValueError("Mask: give query_segments and key_segments, or neither")
        if (self.query_positions is None) != (self.key_positions is None):
            raise ValueError("Mask: give query_positions and key_positions, or neither")
        if self.query_positions is not None and not self.causal:
            raise ValueError("Mask: positions restrict nothing unless causal")
        if self.query_prefixes is not None and self.query_segments is None:
            raise ValueError("Mask: prefixes are segments: give query_segments and key_segments")
