"""From waiting requests to one prefill: their order, its shape, its rows and its images."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.sampling import decode
from infimed_jax.sampling.sampler import Settings
from infimed_jax.sampling.weights import Decoder

PREFILL_TOKENS = 4096
"""Tokens of a prefill on one shard of the batch; enough to fill a device, few enough not to pad short queues much."""
ENCODE_IMAGES = 8
"""Images encoded at once, a static shape."""


@dataclass(frozen=True)
class Request:
    number: int
    prompt: Segment
    sampling: config.Sampling


def in_order(requests: Sequence[Request]) -> list[Request]:
    """Long prompts first; those of one length class with the same image, then prompt, side by side."""
    first_seen: dict[int, int] = {}

    def place(request: Request) -> tuple[int, int, int]:
        prompt, number = request.prompt, request.number
        image = prompt.pixels[0] if prompt.pixels else prompt
        return (
            -bucket(len(prompt)),
            first_seen.setdefault(id(image), number),
            first_seen.setdefault(id(prompt), number),
        )

    return sorted(requests, key=place)


def bucket(length: int) -> int:
    """The prompt length compiled for: 1, 2, 3, 4, 6, 8, 12, … times 16, or times a kernel's tile of 128."""
    tile = 16 if jax.default_backend() == "cpu" else 128
    size = tile * _power_of_two(-(-length // tile))
    return size * 3 // 4 if size * 3 // 4 >= length and size >= 4 * tile else size


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 0 stays 0."""
    return 1 << (n - 1).bit_length() if n else 0


def prefill_rows(context: int, slots: int, shards: int) -> int:
    """Rows of a prefill of `context` tokens each: one number a context, so one compilation."""
    rows = max(1, PREFILL_TOKENS // context)
    return min(slots, shards * (1 << (rows.bit_length() - 1)))


def lay_out(
    decoder: Decoder, slots: decode.Slots, admitted: Mapping[int, Request], shape: tuple[int, int], shards: int
) -> decode.Slots:
    """`slots` with each request in its slot, by a prefill of `shape`: (rows, tokens of a row).

    A row holds one distinct prompt; distinct images are encoded once.
    """
    model, (rows, context) = decoder.model, shape
    prompts = list({id(request.prompt): request.prompt for request in admitted.values()}.values())
    row_of = {id(prompt): row for row, prompt in enumerate(prompts)}
    admission = _admission(slots, admitted)
    for slot, request in admitted.items():
        admission.source[slot] = row_of[id(request.prompt)]
    per_row = [list({id(image): image for image in prompt.pixels}.values()) for prompt in prompts]
    width = _power_of_two(max(map(len, per_row)))
    table, place = _encode(decoder, [image for row in per_row for image in row], rows * width, shards)
    images = np.zeros((rows, width), np.int32)
    for r, row in enumerate(per_row):
        images[r, : len(row)] = [place[id(image)] for image in row]
    layout = functools.partial(
        build_row,
        context=context,
        images=width,
        visual_tokens=model.projector.visual_tokens,
        image_size=model.vision.image_size,
    )
    batch = stack_rows([layout([prompt]) for prompt in prompts] + [layout([])] * (rows - len(prompts)))
    return decode.prefill(decoder, slots, replace(batch, pixels=None), table, images, admission)


def _admission(slots: decode.Slots, admitted: Mapping[int, Request]) -> decode.Admission:
    """What the slots begin with; `source` is still -1 everywhere."""
    size, history = len(slots.token), slots.history

    def zeros(dtype: str = "int32") -> np.ndarray:
        return np.zeros(size, dtype)

    new = decode.Admission(
        source=np.full(size, -1, np.int32),
        token=zeros(),
        length=zeros(),
        limit=zeros(),
        request=zeros(),
        settings=Settings.filled(lambda name: zeros(Settings.dtype(name))),
        prompt=None if history is None else np.zeros(history.prompt.shape, bool),
    )
    for slot, request in admitted.items():
        prompt, sampling = request.prompt, request.sampling
        new.token[slot], new.length[slot] = prompt.tokens[-1], len(prompt) - 1
        new.limit[slot], new.request[slot] = sampling.max_tokens, request.number
        for name, values in vars(new.settings).items():
            values[slot] = getattr(sampling, name)
        if new.prompt is not None:
            new.prompt[slot, prompt.tokens] = True
    return new


def _encode(decoder: Decoder, images: Sequence[np.ndarray], room: int, shards: int) -> tuple[jax.Array, dict[int, int]]:
    """The table of the distinct images' visual tokens, and each image's place in it by identity."""
    distinct = list({id(image): image for image in images}.values())
    chunk = shards * max(1, ENCODE_IMAGES // shards)
    table = decode.empty_table(max(1, -(-room // chunk)) * chunk, decoder.model, decoder.compute.dtype)
    for first in range(0, len(distinct), chunk):
        pixels = np.stack(distinct[first : first + chunk])
        padded = np.concatenate([pixels, np.zeros((chunk - len(pixels), *pixels.shape[1:]), np.uint8)])
        table = decode.encode(decoder, table, padded, np.int32(first))
    return table, {id(image): number for number, image in enumerate(distinct)}
