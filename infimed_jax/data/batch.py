"""The Batch that every model function reads, and the one function that lays segments into a row of it.

Mask, positions, image slots and loss weights come from here alone, for training, scoring and prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.arrays import Array

PADDING_SEGMENT = 0
NO_IMAGE = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of packed segments; host side as NumPy arrays, device side as global arrays sharded over rows."""

    tokens: Array
    """i32[B,T]; padding is 0, but only `segment_ids` says what is padding."""
    segment_ids: Array
    """i32[B,T]; 1, 2, … in order of the row, 0 is padding."""
    positions: Array
    """i32[B,A,T] on the family's A axes; from 0 in each segment, or from where the segment that it continues ends."""
    loss_weights: Array
    """f32[B,T]; weight of predicting `tokens[b, t+1]` at t; 0 at a segment's end and where t+1 is an image position."""
    visual_index: Array
    """i32[B,T]; -1 for text, else the index into the row's M*P visual tokens: image slot m begins at m*P."""
    pixels: Any
    """The images as the family's encoder takes them, a tree with [B,M] in front; unused image slots are 0."""
    prefix_ids: Array | None = None
    """i32[B,T]; the segment that a token's own continues and sees, 0 for none. None where no segment does."""


@dataclass(frozen=True)
class Segment:
    """One rendered sample: tokens with image spans already expanded."""

    tokens: np.ndarray
    """i32[n]"""
    targets: np.ndarray
    """f32[n]; weight of the loss on predicting THIS token (0 for prompts, image places and the first token)."""
    visual: np.ndarray
    """bool[n]; image places, in the order of `pixels`."""
    pixels: tuple[Any, ...] = ()
    """`host_arrays` of each. Segments of a row that hold the same object share its image slot."""
    continues: int = 0
    """Number in the row, from 1, of an earlier segment whose tokens this one sees and goes on from; 0 for none."""

    def __len__(self) -> int:
        return len(self.tokens)


def build_row(segments: Sequence[Segment], *, context: int, images: int, model: config.Model) -> Batch:
    """One row (fields without the B axis) of at most `context` tokens and `images` distinct images.

    Raises ValueError where the segments do not fit or an image span is incomplete: nothing is ever cut.
    """
    tokens = np.zeros(context, np.int32)
    segment_ids = np.zeros(context, np.int32)
    positions = np.zeros((model.position_axes, context), np.int32)
    loss_weights = np.zeros(context, np.float32)
    visual_index = np.full(context, NO_IMAGE, np.int32)
    prefix_ids = np.zeros(context, np.int32)
    pixels = jax.tree.map(lambda x: np.zeros((images, *x.shape), x.dtype), model.blank_image())
    slots: dict[int, int] = {}
    ends = [0]  # the position that follows each segment
    start = 0
    for number, segment in enumerate(segments, start=1):
        n = len(segment)
        end = start + n
        if end > context:
            raise ValueError(f"segments of {sum(map(len, segments))} tokens do not fit a row of {context}")
        spans = image_spans(segment, model)
        for image in segment.pixels:
            if id(image) not in slots:
                if len(slots) == images:
                    raise ValueError(f"more than {images} images in a row")
                slots[id(image)] = len(slots)
                for slot, array in zip(jax.tree.leaves(pixels), jax.tree.leaves(image), strict=True):
                    slot[slots[id(image)]] = array
        tokens[start:end] = segment.tokens
        segment_ids[start:end] = number
        positions[:, start:end] = ends[segment.continues] + model.positions(segment.visual, spans)
        ends.append(int(positions[:, start:end].max(initial=-1)) + 1)
        prefix_ids[start:end] = segment.continues
        loss_weights[start : end - 1] = np.where(segment.visual[1:], 0.0, segment.targets[1:])
        if segment.pixels:
            visual_index[start:end][segment.visual] = np.concatenate(
                [
                    slots[id(image)] * model.visual_tokens + np.arange(span.tokens)
                    for image, span in zip(segment.pixels, spans, strict=True)
                ]
            )
        start = end
    branches = any(segment.continues for segment in segments)
    return Batch(tokens, segment_ids, positions, loss_weights, visual_index, pixels, prefix_ids if branches else None)


def image_spans(segment: Segment, model: config.Model) -> list[config.ImageSpan]:
    """The span of each image; ValueError where they are not the segment's image places."""
    spans = [model.span(image) for image in segment.pixels]
    if segment.visual.sum() != sum(span.tokens for span in spans):
        sizes = "/".join(str(tokens) for tokens in sorted({span.tokens for span in spans} or {model.visual_tokens}))
        raise ValueError(f"{segment.visual.sum()} image places for {len(spans)} images of {sizes} visual tokens")
    return spans


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Rows of one shape as a NumPy batch with the leading B axis."""
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(Batch)}
    prefixes = columns.pop("prefix_ids")
    if all(ids is None for ids in prefixes):
        return Batch(**{name: _stack(column) for name, column in columns.items()})
    columns["prefix_ids"] = [np.zeros_like(rows[0].segment_ids) if ids is None else ids for ids in prefixes]
    return Batch(**{name: _stack(column) for name, column in columns.items()})


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def unmask(batch: Batch) -> Batch:
    """The ancestor's packing (`data.mask_segments=False`): each row one causal sequence with running positions.

    Loss weights stay: no segment's first token is learnt from its neighbour.
    """
    used = batch.segment_ids != PADDING_SEGMENT
    running = np.arange(batch.tokens.shape[-1], dtype=np.int32)
    positions = np.broadcast_to(np.where(used, running, 0)[:, None], batch.positions.shape)
    return replace(batch, segment_ids=used.astype(np.int32), positions=positions.astype(np.int32))
