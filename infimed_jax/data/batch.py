"""The Batch that every model function reads, and the one function that lays segments into a row of it.

Mask, positions, image slots and loss weights come from here alone, for training, scoring and prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import jax
import numpy as np

PADDING_SEGMENT = 0
NO_IMAGE = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of packed segments; host side as NumPy arrays, device side as global arrays sharded over rows."""

    tokens: jax.Array | np.ndarray
    """i32[B,T]; padding is 0, but only `segment_ids` says what is padding."""
    segment_ids: jax.Array | np.ndarray
    """i32[B,T]; 1, 2, … in order of the row, 0 is padding."""
    positions: jax.Array | np.ndarray
    """i32[B,T]; restarting at 0 in each segment, or where the segment that it continues ends."""
    loss_weights: jax.Array | np.ndarray
    """f32[B,T]; weight of predicting `tokens[b, t+1]` at t; 0 at a segment's end and where t+1 is an image position."""
    visual_index: jax.Array | np.ndarray
    """i32[B,T]; -1 for text, else the index into the row's M*P visual tokens."""
    pixels: jax.Array | np.ndarray
    """u8[B,M,S,S,3]; unused image slots are 0."""
    prefix_ids: jax.Array | np.ndarray | None = None
    """i32[B,T]; the segment that a token's own continues and sees, 0 for none. None where no segment does."""


@dataclass(frozen=True)
class Segment:
    """One rendered sample: tokens with image spans already expanded to P places each."""

    tokens: np.ndarray
    """i32[n]"""
    targets: np.ndarray
    """f32[n]; weight of the loss on predicting THIS token (0 for prompts, image places and the first token)."""
    visual: np.ndarray
    """bool[n]; image places, in runs of P, in the order of `pixels`."""
    pixels: tuple[np.ndarray, ...] = ()
    """u8[S,S,3] each. Segments of a row that hold the same array object share its image slot."""
    continues: int = 0
    """Number in the row, from 1, of an earlier segment whose tokens this one sees and goes on from; 0 for none."""

    def __len__(self) -> int:
        return len(self.tokens)


def build_row(segments: Sequence[Segment], *, context: int, images: int, visual_tokens: int, image_size: int) -> Batch:
    """One row (fields without the B axis) of at most `context` tokens and `images` distinct images.

    Raises ValueError where the segments do not fit or an image span is incomplete: nothing is ever cut.
    """
    tokens = np.zeros(context, np.int32)
    segment_ids = np.zeros(context, np.int32)
    positions = np.zeros(context, np.int32)
    loss_weights = np.zeros(context, np.float32)
    visual_index = np.full(context, NO_IMAGE, np.int32)
    prefix_ids = np.zeros(context, np.int32)
    pixels = np.zeros((images, image_size, image_size, 3), np.uint8)
    slots: dict[int, int] = {}
    start = 0
    for number, segment in enumerate(segments, start=1):
        n = len(segment)
        end = start + n
        if end > context:
            raise ValueError(f"segments of {sum(map(len, segments))} tokens do not fit a row of {context}")
        if segment.visual.sum() != len(segment.pixels) * visual_tokens:
            raise ValueError(
                f"{segment.visual.sum()} image places for {len(segment.pixels)} images of {visual_tokens} visual tokens"
            )
        for image in segment.pixels:
            if id(image) not in slots:
                if len(slots) == images:
                    raise ValueError(f"more than {images} images in a row")
                slots[id(image)] = len(slots)
                pixels[slots[id(image)]] = image
        tokens[start:end] = segment.tokens
        segment_ids[start:end] = number
        positions[start:end] = np.arange(n) + (len(segments[segment.continues - 1]) if segment.continues else 0)
        prefix_ids[start:end] = segment.continues
        loss_weights[start : end - 1] = np.where(segment.visual[1:], 0.0, segment.targets[1:])
        if segment.pixels:
            first = np.array([slots[id(image)] * visual_tokens for image in segment.pixels], np.int32)
            visual_index[start:end][segment.visual] = (first[:, None] + np.arange(visual_tokens)).ravel()
        start = end
    branches = any(segment.continues for segment in segments)
    return Batch(tokens, segment_ids, positions, loss_weights, visual_index, pixels, prefix_ids if branches else None)


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Rows of one shape as a NumPy batch with the leading B axis."""
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(Batch)}
    prefixes = columns.pop("prefix_ids")
    if all(ids is None for ids in prefixes):
        return Batch(**{name: np.stack(column) for name, column in columns.items()})
    columns["prefix_ids"] = [np.zeros_like(rows[0].segment_ids) if ids is None else ids for ids in prefixes]
    return Batch(**{name: np.stack(column) for name, column in columns.items()})


def unmask(batch: Batch) -> Batch:
    """The ancestor's packing (`data.mask_segments=False`): each row one causal sequence with running positions.

    Loss weights stay: no segment's first token is learnt from its neighbour.
    """
    used = batch.segment_ids != PADDING_SEGMENT
    running = np.arange(batch.tokens.shape[-1], dtype=np.int32)
    return replace(batch, segment_ids=used.astype(np.int32), positions=np.where(used, running, 0).astype(np.int32))
