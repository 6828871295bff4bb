"""Whether training sees the images: the loss of held rows with their own images, and with one another's.

A model that reads nothing from its images learns the texts alone, and its loss falls all the same. Here the loss is
measured twice on the same samples: once as they are, and once with their images permuted, so that each sample has
another's image. The difference is what the images are worth, in nats a target token.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float
from scipy import special

from infimed_jax import config
from infimed_jax.arrays import Array
from infimed_jax.data.batch import NO_IMAGE, PADDING_SEGMENT, Batch, stack_rows, unmask
from infimed_jax.data.loader import Loader
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.models.params import Params
from infimed_jax.runs.loop import Run
from infimed_jax.runs.metrics import Row
from infimed_jax.sharding import local_rows, place_batch
from infimed_jax.train.state import TrainState, merge_params

IMAGES = 64
"""Distinct images that the held samples have at least."""
MOST_ROWS = 512
"""Rows among which they are looked for."""
COST = 0.01
"""Share of a run's computation that the check may take."""
PATIENCE = 0.1
"""Share of the steps before a warning: at its start a model sees nothing yet."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """Rows with images, as they are and with their images permuted; all arrays are NumPy's."""

    rows: Batch
    """[R, ...]"""
    permuted: Any
    """The pixels of the same rows, each image in the place of another."""
    images: np.ndarray
    """i32[R,T]; the number of the image of a place's segment; -1 where it has none, or one that none could replace."""


def hold(rows: Iterable[Batch], model: config.Model) -> Held | None:
    """The first rows that have IMAGES distinct images between them; None where there are too few.

    Images of one size replace each other in a cycle, so that none stays where it is.
    """
    kept: list[Batch] = []
    places: dict[Any, dict[bytes, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for row in itertools.islice(rows, MOST_ROWS):
        used = -(-(int(row.visual_index.max(initial=NO_IMAGE)) + 1) // model.visual_tokens)
        images = [jax.tree.map(lambda x, slot=slot: x[slot], row.pixels) for slot in range(used)]
        contents = [(model.span(i), b"".join(x.tobytes() for x in jax.tree.leaves(i))) for i in images]
        if all(content in places[size] for size, content in contents):
            continue  # nothing new
        for slot, (size, content) in enumerate(contents):
            places[size][content].append((len(kept), slot))
        kept.append(row)
        if sum(len(contents) for contents in places.values() if len(contents) > 1) >= IMAGES:
            break
    else:
        return None
    batch = stack_rows(kept)
    permuted = jax.tree.map(np.copy, batch.pixels)
    number = np.full((len(kept), jax.tree.leaves(permuted)[0].shape[1]), -1, np.int32)
    numbers = itertools.count()
    for contents in places.values():
        cycle = list(contents.values()) if len(contents) > 1 else []
        for before, image in zip(cycle[-1:] + cycle[:-1], cycle, strict=True):
            each = next(numbers)
            for place in image:
                number[place] = each
                for target, source in zip(jax.tree.leaves(permuted), jax.tree.leaves(batch.pixels), strict=True):
                    target[place] = source[before[0]]
    return Held(batch, permuted, _images_of_places(batch, number, model.visual_tokens))


def _images_of_places(batch: Batch, number: np.ndarray, visual_tokens: int) -> np.ndarray:
    """i32[R,T] of `Held.images`, from the numbers i32[R,M] of the slots' images."""
    images = np.full(batch.tokens.shape, -1, np.int32)
    for row, (segments, visual) in enumerate(zip(batch.segment_ids, batch.visual_index, strict=True)):
        for segment in np.unique(segments[(visual != NO_IMAGE) & (segments != PADDING_SEGMENT)]):
            own = segments == segment
            seen = number[row, np.unique(visual[own & (visual != NO_IMAGE)] // visual_tokens)]
            images[row, own] = seen[0] if (seen >= 0).all() else -1
    return images


def gain(difference: np.ndarray, weights: np.ndarray, images: np.ndarray) -> Row:
    """Mean of a difference of weighted losses, by weight, and its 95 % interval, whose unit is the image.

    All three are [R,T]; places whose image is -1 do not count.
    """
    counted = images >= 0
    total = float(weights[counted].sum())
    sums, sizes = (np.bincount(images[counted], x[counted].astype(np.float64)) for x in (difference, weights))
    n = int(np.count_nonzero(sizes))
    mean = float(sums.sum()) / total
    error = math.sqrt(n / (n - 1) * float(((sums - mean * sizes) ** 2).sum())) / total
    half = float(special.stdtrit(n - 1, 0.975)) * error
    return {"image_gain": mean, "image_gain_low": mean - half, "image_gain_high": mean + half}


@functools.lru_cache(maxsize=2)
def _token_losses(model: config.Model, compute: Compute) -> Callable[[Params, Params, Batch], Float[Array, "B T"]]:
    @jax.jit
    def losses(trainable: Params, frozen: Params, batch: Batch) -> Float[Array, "B T"]:
        params = merge_params(trainable, frozen)
        hidden = forward.hidden_states(params, batch, model, compute)
        targets = forward.next_tokens(batch.tokens)
        logprobs, _ = forward.token_logprobs(params, hidden, targets, batch.loss_weights, model, compute)
        return jax.sharding.reshard(-batch.loss_weights * logprobs, PartitionSpec())  # every process reads all of it

    return losses


class ImageCheck:
    """Measures at the first step, at the last and, between them, as often as costs COST of the run's computation.

    The held rows are the last of the first epoch, the same on every process and after every resume.
    """

    def __init__(self, run: Run, loader: Loader, compute: Compute) -> None:
        cfg = run.cfg
        self._run, self._losses, self._total = run, _token_losses(cfg.model, compute), loader.steps
        self._held = hold(loader.last_rows(), cfg.model) if cfg.train.image_check else None
        if self._held is None:
            if cfg.train.image_check:
                log.info("image check: off, the data have fewer than %d distinct images of one size", IMAGES)
            return
        at_once = cfg.train.global_batch // run.pieces
        rows = len(self._held.images)
        # Two forward passes of the held rows; a step is a forward and a backward pass, which is two more.
        self._every = math.ceil(2 * (rows + -rows % at_once) / (3 * cfg.train.global_batch) / COST)
        local = local_rows(at_once, run.mesh)
        self._pieces = [
            tuple(
                place_batch(_rows(batch, start + local, rows, cfg.data.mask_segments), run.mesh)
                for batch in (self._held.rows, replace(self._held.rows, pixels=self._held.permuted))
            )
            for start in range(0, rows, at_once)
        ]
        log.info("image check: %d rows with %d images, every %d steps", rows, self._held.images.max() + 1, self._every)

    def measure(self, state: TrainState, step: int) -> Callable[[], Row]:
        """Start to measure where a measurement is due; what is returned waits for it and gives the row's entries."""
        if self._held is None or not (step in (1, self._total) or step % self._every == 0):
            return dict
        losses = [[self._losses(state.trainable, state.frozen, batch) for batch in pair] for pair in self._pieces]
        return lambda: self._entries(losses, step)

    def _entries(self, losses: list[list[jax.Array]], step: int) -> Row:
        assert self._held is not None
        differences = [np.asarray(permuted) - np.asarray(true) for true, permuted in losses]
        rows = len(self._held.images)
        entries = gain(np.concatenate(differences)[:rows], self._held.rows.loss_weights, self._held.images)
        words = "{image_gain:+.4f} nats a token [{image_gain_low:+.4f}, {image_gain_high:+.4f}]".format(**entries)
        log.info("step %d: with another's image the loss of %d held rows differs by %s", step, rows, words)
        if entries["image_gain_low"] <= 0 and step > PATIENCE * self._total:
            log.warning(
                "warning: step %d: the loss does not rise when each image is replaced by another's: the model does not "
                "use its images. See whether they belong to their texts, and whether the projector learns",
                step,
            )
        return entries


def _rows(batch: Batch, numbers: np.ndarray, rows: int, mask_segments: bool) -> Batch:
    """The rows of these numbers; past the last one, rows without loss."""
    piece = jax.tree.map(lambda x: x[np.minimum(numbers, rows - 1)], batch)
    piece = replace(piece, loss_weights=np.where((numbers < rows)[:, None], piece.loss_weights, np.float32(0)))
    return piece if mask_segments else unmask(piece)
