"""One prefill under construction: which prompts its rows hold, where in them, and with which images."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.data.batch import Segment, build_row, image_spans, stack_rows
from infimed_jax.sampling import decode
from infimed_jax.sampling.sampler import Settings
from infimed_jax.sampling.trunks import Request, TrunkKey, power_of_two, split, trunk_key
from infimed_jax.sampling.weights import Decoder

PREFILL_TOKENS = 4096
"""Tokens of a prefill on one shard of the batch; enough to fill a device, few enough not to pad short queues much."""
ENCODE_IMAGES = 8
"""Images encoded at once, a static shape."""
PACKED = 4
"""A row with shared trunks has room for so many times the longest prompt, in tokens and in images."""


@dataclass(frozen=True)
class Place:
    """Where a prompt's tokens stand among the rows."""

    row: int
    start: int
    """Place in the row of its first token, which is its trunk's where it shares one."""
    cut: int
    """Tokens that stand there; what follows is its branch."""
    branch: int
    """Place in the row of the branch."""


@dataclass
class Prefill:
    """Rows of one shape a context, so that one program serves all prefills of it."""

    context: int
    """Tokens of the longest prompt, rounded up."""
    packed: bool
    """Rows hold trunks with their branches, and whole prompts beside them; otherwise one prompt each."""
    slots: int
    shards: int
    rows: list[list[Segment]] = field(default_factory=list)
    places: dict[int, Place] = field(default_factory=dict)
    """By the prompt's identity."""
    _trunks: dict[TrunkKey, tuple[int, int]] = field(default_factory=dict)
    """The trunks of the last row: (place of the first token, number in the row)."""

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        return min(PACKED * self.context, max(self.context, PREFILL_TOKENS)) if self.packed else self.context

    @property
    def height(self) -> int:
        """Rows at most."""
        rows = max(1, PREFILL_TOKENS // self.tokens)
        return min(self.slots, self.shards * (1 << (rows.bit_length() - 1)))

    def add(self, request: Request) -> bool:
        """Whether the request's prompt stands among the rows, which it may do already."""
        if id(request.prompt) in self.places:
            return True
        if request.context > self.context:
            return False
        if self.packed and self.rows and self._append(request):
            return True
        if len(self.rows) == self.height:
            return False
        self.rows.append([])
        self._trunks = {}
        return self._append(request)

    def _append(self, request: Request) -> bool:
        """Whether the last row has room for the prompt: for its branch alone where its trunk stands there already."""
        prompt, row = request.prompt, self.rows[-1]
        place = sum(map(len, row))
        images = {id(image) for segment in row for image in segment.pixels} | {id(image) for image in prompt.pixels}
        if self.packed and len(images) > PACKED * max(1, len(prompt.pixels)):
            return False
        trunk, branch = split(prompt, request.trunk) if self.packed and request.trunk else (prompt, None)
        key = trunk_key(prompt, len(trunk), len(trunk.pixels))
        start, number = self._trunks.get(key, (place, 0))
        new = [] if number else [trunk]
        if branch is not None and len(branch):
            new.append(replace(branch, continues=number or len(row) + 1))
        if place + sum(map(len, new)) > self.tokens:
            return False
        row += new
        self._trunks[key] = start, number or len(row) + 1 - len(new)
        self.places[id(prompt)] = Place(len(self.rows) - 1, start, len(trunk), place + (0 if number else len(trunk)))
        return True

    def run(self, decoder: Decoder, slots: decode.Slots, admitted: Mapping[int, Request]) -> decode.Slots:
        """`slots` with each request in its slot; distinct images are encoded once."""
        # A second, shorter program for the few distinct prompts that a group's slots make room for.
        short = max(self.shards, self.height // 4)
        height = short if len(self.rows) <= short else self.height
        per_row = [list({id(i): i for segment in row for i in segment.pixels}.values()) for row in self.rows]
        most = max(len(request.prompt.pixels) for request in admitted.values())
        width = power_of_two(PACKED * most if self.packed else max(map(len, per_row)))
        table, number = _encode(decoder, [image for row in per_row for image in row], height * width, self.shards)
        images = np.zeros((height, width), np.int32)
        for r, row in enumerate(per_row):
            images[r, : len(row)] = [number[id(image)] for image in row]
        layout = functools.partial(build_row, context=self.tokens, images=width, model=decoder.model)
        batch = stack_rows([layout(row) for row in self.rows] + [layout([])] * (height - len(self.rows)))
        # The table has what is seen of the images.
        batch = replace(batch, pixels=jax.tree.map(lambda x: x[:, :0], batch.pixels))
        return decode.prefill(decoder, slots, batch, table, images, self._admission(slots, admitted, decoder.model))

    def _admission(self, slots: decode.Slots, admitted: Mapping[int, Request], model: config.Model) -> decode.Admission:
        size, history = len(slots.token), slots.history

        def zeros(dtype: str = "int32") -> np.ndarray:
            return np.zeros(size, dtype)

        new = decode.Admission(
            source=np.full(size, -1, np.int32),
            place=np.zeros((size, self.context), np.int32) if self.packed else None,
            token=zeros(),
            length=zeros(),
            position=np.zeros((size, model.position_axes), np.int32),
            limit=zeros(),
            request=zeros(),
            settings=Settings.filled(lambda name: zeros(Settings.dtype(name))),
            prompt=None if history is None else np.zeros(history.prompt.shape, bool),
        )
        for slot, request in admitted.items():
            prompt, sampling, place = request.prompt, request.sampling, self.places[id(request.prompt)]
            new.source[slot] = place.row
            if new.place is not None:
                position = np.arange(len(prompt) - 1)
                first = np.where(position < place.cut, place.start, place.branch - place.cut)
                new.place[slot, : len(position)] = first + position
            new.token[slot], new.length[slot] = prompt.tokens[-1], len(prompt) - 1
            new.position[slot] = model.positions(prompt.visual, image_spans(prompt, model))[:, -1]
            new.limit[slot], new.request[slot] = sampling.max_tokens, request.number
            for name, values in vars(new.settings).items():
                values[slot] = getattr(sampling, name)
            if new.prompt is not None:
                new.prompt[slot, prompt.tokens] = True
        return new


def _encode(decoder: Decoder, images: Sequence[Any], room: int, shards: int) -> tuple[jax.Array, dict[int, int]]:
    """The table of the distinct images' visual tokens, and each image's place in it by identity."""
    distinct = list({id(image): image for image in images}.values())
    chunk = shards * max(1, ENCODE_IMAGES // shards)
    table = decode.empty_table(max(1, -(-room // chunk)) * chunk, decoder.model, decoder.compute.dtype)
    for first in range(0, len(distinct), chunk):
        some = distinct[first : first + chunk]
        some += [decoder.model.blank_image()] * (chunk - len(some))
        pixels = jax.tree.map(lambda *images: np.stack(images), *some)
        table = decode.encode(decoder, table, pixels, np.int32(first))
    return table, {id(image): number for number, image in enumerate(distinct)}
