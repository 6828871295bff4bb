"""`generate`: continuous batching on the host over the compiled programs of `decode`.

Prompts wait in a queue; free slots are filled by prefill, all slots decode in bursts on the device, and finished ones
are harvested between bursts. What a request draws depends on the key, its number and its own tokens, never on its
neighbours.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.errors import UserError
from infimed_jax.models.compute import Compute
from infimed_jax.sampling import decode

PREFILL_TOKENS = 4096
"""Tokens of a prefill on one shard of the batch; enough to fill a device, few enough not to pad short queues much."""
ENCODE_IMAGES = 8
"""Images encoded at once, a static shape."""


@dataclass(frozen=True)
class Completion:
    """A prompt's reply."""

    tokens: np.ndarray
    """i32[n]; the stop token is the last where `finish` is "stop": a trainer learns to end from it."""
    logprobs: np.ndarray
    """f32[n], nats: the model's own at temperature 1 over the whole vocabulary, before bans and filters."""
    finish: Literal["stop", "length"]

    @property
    def text_tokens(self) -> np.ndarray:
        """i32: the tokens without the stop token."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


@dataclass
class _Running:
    """A request in a slot and what it has generated so far, a piece a burst."""

    request: int
    tokens: list[np.ndarray] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class _Engine:
    """What stays the same through one call of `generate`."""

    weights: dict[str, Any]
    model: config.Model
    sampling: config.Sampling
    compute: Compute
    prompts: Sequence[Segment]
    shards: int
    """Devices along the batch: data * fsdp."""

    @property
    def track_seen(self) -> bool:
        return self.sampling.repetition_penalty != 1.0


def generate(
    weights: dict[str, Any],
    model: config.Model,
    prompts: Sequence[Segment],
    sampling: config.Sampling,
    *,
    stop_tokens: Sequence[int],
    banned_tokens: Sequence[int],
    key: jax.Array,
    compute: Compute,
    max_prompt: int = 0,
    on_progress: Callable[[int, int, int], None] | None = None,
    on_tokens: Callable[[int, np.ndarray], None] | None = None,
) -> list[Completion]:
    """Complete every prompt; the replies come in the prompts' order.

    Runs under `jax.set_mesh`, with weights from `sampler_weights`; several processes give the same arguments. Prompts
    that are the same object (a GRPO group) are prefilled once, images that are the same array are encoded once, within
    a prefill. `max_prompt` (tokens) keeps the cache's shape, so the compilation, from call to call; 0 takes the longest
    prompt's. After each burst `on_tokens(number, tokens)` is called for every sequence with what it gave, and
    `on_progress(replies, prompts, tokens)`.

    Raises UserError for prompts and settings that cannot be decoded, and where the model's logits are not finite.
    """
    engine = _Engine(weights, model, sampling, compute, prompts, _shards())
    banned, stops = _token_arrays(engine, banned_tokens, stop_tokens)
    _check_prompts(engine, max_prompt)
    if not prompts:
        return []
    room = _bucket(max_prompt or max(map(len, prompts))) + sampling.max_tokens
    slots = decode.empty_slots(sampling.slots, room, model.text, compute.dtype, engine.track_seen)
    queue = _schedule(prompts)
    running: dict[int, _Running] = {}
    completions: dict[int, Completion] = {}
    generated = 0
    while queue or running:
        # A prefill costs as much for one prompt as for many: wait for a quarter of the slots, or for all that wait.
        wanted = min(max(1, sampling.slots // 4), len(queue))
        if sampling.slots - len(running) >= wanted:
            while queue and len(running) < sampling.slots:
                slots = _admit(engine, slots, queue, running)
        enough = sampling.slots - min(max(1, sampling.slots // 4), len(queue)) if queue else 0
        slots, reports = decode.burst(weights, slots, banned, stops, key, np.int32(enough), model, compute, sampling)
        tokens, logprobs, counts, active = jax.device_get(reports)
        _check_finite(logprobs, counts)
        generated += int(counts.sum())
        for slot, run in list(running.items()):
            run.tokens.append(tokens[: counts[slot], slot])
            run.logprobs.append(logprobs[: counts[slot], slot])
            if on_tokens:
                on_tokens(run.request, run.tokens[-1])
            if active[slot]:
                continue
            completions[run.request] = _complete(running.pop(slot), stops)
        if on_progress:
            on_progress(len(completions), len(prompts), generated)
    return [completions[request] for request in range(len(prompts))]


def _complete(run: _Running, stops: np.ndarray) -> Completion:
    tokens = np.concatenate(run.tokens)
    return Completion(tokens, np.concatenate(run.logprobs), "stop" if tokens[-1] in stops else "length")


def _schedule(prompts: Sequence[Segment]) -> deque[int]:
    """Request numbers, long prompts first; those of one length class with the same image, then prompt, side by side."""
    first_seen: dict[int, int] = {}

    def place(number: int) -> tuple[int, int, int]:
        prompt = prompts[number]
        image = prompt.pixels[0] if prompt.pixels else prompt
        return (
            -_bucket(len(prompt)),
            first_seen.setdefault(id(image), number),
            first_seen.setdefault(id(prompt), number),
        )

    return deque(sorted(range(len(prompts)), key=place))


def _admit(engine: _Engine, slots: decode.Slots, queue: deque[int], running: dict[int, _Running]) -> decode.Slots:
    """Move requests from the queue into free slots by one prefill; `queue` and `running` are updated."""
    size, sampling = engine.sampling.slots, engine.sampling
    context = _bucket(len(engine.prompts[queue[0]]))  # the queue's longest
    height = _prefill_rows(context, size, engine.shards)
    source = np.full(size, -1, np.int32)
    token, length, request = (np.zeros(size, np.int32) for _ in range(3))
    seen = np.zeros((size, engine.model.text.vocab_size), bool) if engine.track_seen else None
    rows: dict[int, tuple[int, Segment]] = {}
    free = [slot for slot in range(sampling.slots) if slot not in running]
    while queue and free:
        prompt = engine.prompts[queue[0]]
        if id(prompt) not in rows:
            if len(rows) == height:
                break
            rows[id(prompt)] = (len(rows), prompt)
        slot, number = free.pop(0), queue.popleft()
        running[slot] = _Running(number)
        source[slot], request[slot] = rows[id(prompt)][0], number
        token[slot], length[slot] = prompt.tokens[-1], len(prompt) - 1
        if seen is not None:
            seen[slot, prompt.tokens] = True
    # A second, shorter program for the few distinct prompts that a group's slots make room for.
    short = max(engine.shards, height // 4)
    height = short if len(rows) <= short else height
    admission = decode.Admission(source, token, length, request, seen)
    return _prefill(engine, slots, [prompt for _, prompt in rows.values()], admission, context, height)


def _prefill(
    engine: _Engine,
    slots: decode.Slots,
    prompts: Sequence[Segment],
    admission: decode.Admission,
    context: int,
    height: int,
) -> decode.Slots:
    """Run one prompt a row, padded to `height` rows of `context` tokens; distinct images are encoded once."""
    per_row = [list({id(image): image for image in prompt.pixels}.values()) for prompt in prompts]
    width = _power_of_two(max(map(len, per_row)))
    table, place = _encode(engine, [image for row in per_row for image in row], height * width)
    images = np.zeros((height, width), np.int32)
    for r, row in enumerate(per_row):
        images[r, : len(row)] = [place[id(image)] for image in row]
    layout = functools.partial(
        build_row,
        context=context,
        images=width,
        visual_tokens=engine.model.projector.visual_tokens,
        image_size=engine.model.vision.image_size,
    )
    batch = stack_rows([layout([prompt]) for prompt in prompts] + [layout([])] * (height - len(prompts)))
    return decode.prefill(
        engine.weights,
        slots,
        batch.tokens,
        batch.segment_ids,
        batch.positions,
        batch.visual_index,
        table,
        images,
        admission,
        engine.model,
        engine.compute,
    )


def _encode(engine: _Engine, images: list[np.ndarray], room: int) -> tuple[jax.Array, dict[int, int]]:
    """The table of the distinct images' visual tokens, and each image's place in it by identity."""
    distinct = list({id(image): image for image in images}.values())
    chunk = engine.shards * max(1, ENCODE_IMAGES // engine.shards)
    table = decode.empty_table(max(1, -(-room // chunk)) * chunk, engine.model, engine.compute.dtype)
    for first in range(0, len(distinct), chunk):
        pixels = np.stack(distinct[first : first + chunk])
        padded = np.concatenate([pixels, np.zeros((chunk - len(pixels), *pixels.shape[1:]), np.uint8)])
        table = decode.encode(engine.weights, table, padded, np.int32(first), engine.model, engine.compute)
    return table, {id(image): number for number, image in enumerate(distinct)}


def _shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("generate runs under jax.set_mesh(make_mesh(...))")
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _bucket(length: int) -> int:
    """The prompt length compiled for: 1, 2, 3, 4, 6, 8, 12, … times 16, or times a kernel's tile of 128."""
    tile = 16 if jax.default_backend() == "cpu" else 128
    size = tile * _power_of_two(-(-length // tile))
    return size * 3 // 4 if size * 3 // 4 >= length and size >= 4 * tile else size


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 0 stays 0."""
    return 1 << (n - 1).bit_length() if n else 0


def _prefill_rows(context: int, slots: int, shards: int) -> int:
    """Rows of a prefill of `context` tokens each: one number a context, so one compilation."""
    rows = max(1, PREFILL_TOKENS // context)
    return min(slots, shards * (1 << (rows.bit_length() - 1)))


def _token_arrays(engine: _Engine, banned: Sequence[int], stops: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """bool[V] and i32[stops]; UserError for tokens that the model does not have, and for banned stop tokens."""
    vocab = engine.model.text.vocab_size
    outside = sorted(token for token in {*banned, *stops} if not 0 <= token < vocab)
    if outside:
        raise UserError(
            f"token {outside[0]} is outside the model's vocabulary of {vocab}: use the model's own tokenizer"
        )
    both = sorted(set(banned) & set(stops))
    if both:
        raise UserError(f"token {both[0]} is both banned and a stop token: take it off one list")
    mask = np.zeros(vocab, bool)
    mask[list(banned)] = True
    if mask.all():
        raise UserError("every token of the vocabulary is banned: nothing could be sampled")
    return mask, np.array(sorted(set(stops)), np.int32)


def _check_prompts(engine: _Engine, max_prompt: int) -> None:
    slots, shards = engine.sampling.slots, engine.shards
    if slots % shards:
        raise UserError(f"sampling.slots={slots} must be a multiple of mesh.data * mesh.fsdp = {shards}")
    side, vocab = engine.model.vision.image_size, engine.model.text.vocab_size
    for number, prompt in enumerate(engine.prompts):
        problem = _problem(prompt, side, engine.model.projector.visual_tokens, vocab)
        if not problem and max_prompt and len(prompt) > max_prompt:
            problem = f"has {len(prompt)} tokens, more than the {max_prompt} allowed: drop it, or raise the limit"
        if problem:
            raise UserError(f"prompt {number} {problem}")


def _problem(prompt: Segment, side: int, visual_tokens: int, vocab: int) -> str:
    """Why the prompt cannot be completed, or ""."""
    if not len(prompt):
        return "is empty: give it at least one token"
    if prompt.visual[-1]:
        return "ends in an image: put text, such as the assistant's first tokens, behind it"
    if prompt.tokens.min() < 0 or prompt.tokens.max() >= vocab:
        return f"holds tokens outside the model's vocabulary of {vocab}: use the model's own tokenizer"
    if prompt.visual.sum() != len(prompt.pixels) * visual_tokens:
        return (
            f"has {prompt.visual.sum()} image places for {len(prompt.pixels)} images of {visual_tokens} visual tokens"
        )
    for image in prompt.pixels:
        if image.shape != (side, side, 3) or image.dtype != np.uint8:
            return f"has an image of shape {image.shape} and type {image.dtype}, not uint8 of {(side, side, 3)}"
    return ""


def _check_finite(logprobs: np.ndarray, counts: np.ndarray) -> None:
    used = np.arange(len(logprobs))[:, None] < counts
    if not np.isfinite(logprobs[used]).all():
        raise UserError("the model's logits are not finite: its weights are broken, take an earlier checkpoint")
