"""Continuous batching on the host over the compiled programs of `decode`: requests go in, pieces of replies come out.

Requests wait in a queue; free slots are filled by prefill, all slots decode in bursts on the device, and finished ones
are harvested between bursts. What a request draws depends on the engine's key, the request's number and its own
tokens, never on its slot or its neighbours.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.data.batch import Segment, image_spans
from infimed_jax.errors import UserError
from infimed_jax.ops.attention import shares_prefixes
from infimed_jax.progress import Report
from infimed_jax.sampling import decode
from infimed_jax.sampling.admission import Prefill
from infimed_jax.sampling.sampler import penalizes
from infimed_jax.sampling.trunks import Request, bucket, in_order
from infimed_jax.sampling.weights import Decoder

log = logging.getLogger(__name__)

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """What one burst added to a reply."""

    request: int
    tokens: np.ndarray
    """i32[n]"""
    logprobs: np.ndarray
    """f32[n], as Completion's."""
    finish: Finish | None
    """None while the reply goes on."""


@dataclass(frozen=True)
class Completion:
    """A prompt's reply."""

    tokens: np.ndarray
    """i32[n]; the stop token is the last where `finish` is "stop": a trainer learns to end from it."""
    logprobs: np.ndarray
    """f32[n], nats: the model's own at temperature 1 over the whole vocabulary, before bans and filters."""
    finish: Finish

    @property
    def text_tokens(self) -> np.ndarray:
        """i32: the tokens without the stop token."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


class Engine:
    """Slots on the devices of the current mesh, and the queue before them. Several processes make the same calls.

    `settings` gives the slots, the burst's length, and the most tokens of a reply. A slot has room for a prompt of
    `longest` tokens and such a reply. An engine without `penalties` keeps no history of replies, and refuses requests
    that need one.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: config.Sampling,
        *,
        stops: Sequence[int],
        banned: Sequence[int],
        key: jax.Array,
        longest: int,
        penalties: bool,
    ) -> None:
        self._decoder, self._settings, self._key = decoder, settings, key
        self._longest, self._penalties = longest, penalties
        self._shards = _shards()
        self._share = settings.share_images and _shares_prefixes(decoder.compute.implementation)
        if settings.slots % self._shards:
            raise UserError(
                f"sampling.slots={settings.slots} must be a multiple of mesh.data * mesh.fsdp = {self._shards}"
            )
        model = decoder.model
        self._banned, self._stops = _token_arrays(model.vocab_size, banned, stops)
        self._room = bucket(longest) + settings.max_tokens
        self._slots = decode.empty_slots(settings.slots, self._room, model, decoder.compute.dtype, penalties)
        self._submitted = 0
        self._arrived: list[Request] = []
        self._queue: deque[Request] = deque()
        self._running: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        """Whether any request is not answered yet."""
        return bool(self._arrived or self._queue or self._running)

    def submit(self, prompt: Segment, sampling: config.Sampling, number: int | None = None) -> int:
        """Queue a prompt, and return the request's number; of `sampling` all but slots and burst is used.

        A reply depends on the number, by which it draws: one of the caller's own, each once, else 0, 1, …

        Within a prefill, prompts that are the same object (a GRPO group) are computed once, images that are the same
        array are encoded once, and prompts that are equal up to the end of an image share that beginning, where
        `share_images` is set and the attention kernel knows prefixes.

        Raises UserError for a prompt or settings that cannot be decoded.
        """
        number = self._submitted if number is None else number
        problem = _problem(prompt, self._decoder.model) or self._misfit(prompt, sampling)
        if problem:
            raise UserError(f"prompt {number} {problem}")
        self._arrived.append(Request(number, prompt, sampling))
        self._submitted += 1
        return number

    def _misfit(self, prompt: Segment, sampling: config.Sampling) -> str:
        """Why the request does not fit this engine, or ""."""
        if len(prompt) > self._longest:
            return f"has {len(prompt)} tokens, more than the {self._longest} allowed: drop it, or raise the limit"
        if len(prompt) + sampling.max_tokens > self._room:
            return f"has {len(prompt)} tokens: with sampling.max_tokens={sampling.max_tokens} it exceeds {self._room}"
        if penalizes(sampling) and not self._penalties:
            return "asks for a penalty, and the engine was opened without: open it with penalties"
        return ""

    def step(self) -> list[Delta]:
        """Fill free slots, decode one burst, and return what each running request got from it.

        Raises UserError where the model's logits are not finite.
        """
        self._queue.extend(in_order(self._arrived, self._share))
        self._arrived = []
        slots, queue, running = self._settings.slots, self._queue, self._running
        # A prefill costs as much for one prompt as for many: wait for a quarter of the slots, or for all that wait.
        if slots - len(running) >= min(max(1, slots // 4), len(queue)):
            while queue and len(running) < slots:
                self._admit()
        if not running:
            return []
        enough = slots - min(max(1, slots // 4), len(queue)) if queue else 0
        self._slots, reports = decode.burst(
            self._decoder, self._slots, self._banned, self._stops, self._key, np.int32(enough), self._settings.burst
        )
        tokens, logprobs, counts, active = jax.device_get(reports)
        _check_finite(logprobs, counts)
        return [self._harvest(slot, tokens, logprobs, int(counts[slot]), bool(active[slot])) for slot in list(running)]

    def _harvest(self, slot: int, tokens: np.ndarray, logprobs: np.ndarray, count: int, active: bool) -> Delta:
        new, finish = tokens[:count, slot], None
        request = self._running[slot]
        if not active:
            del self._running[slot]
            finish = "stop" if new[-1] in self._stops else "length"
        return Delta(request, new, logprobs[:count, slot], finish)

    def _admit(self) -> None:
        """Move requests from the queue into free slots by one prefill."""
        free = [slot for slot in range(self._settings.slots) if slot not in self._running]
        packed = any(request.trunk for request in itertools.islice(self._queue, len(free)))
        prefill = Prefill(self._queue[0].context, packed, self._settings.slots, self._shards)
        admitted: dict[int, Request] = {}
        while self._queue and len(admitted) < len(free) and prefill.add(self._queue[0]):
            admitted[free[len(admitted)]] = self._queue.popleft()
        self._slots = prefill.run(self._decoder, self._slots, admitted)
        self._running |= {slot: request.number for slot, request in admitted.items()}


def complete(
    engine: Engine,
    prompts: Sequence[Segment],
    sampling: config.Sampling,
    numbers: Sequence[int] | None = None,
    on_progress: Report | None = None,
    on_delta: Callable[[Delta], None] | None = None,
) -> list[Completion]:
    """Answer every prompt on a new engine, under the `numbers` given or 0, 1, …; replies come in the prompts' order.

    After each burst `on_delta` is called for every running request, and `on_progress` with the replies that are
    finished, all prompts, and a note on the tokens.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    pieces: dict[int, list[Delta]] = {number: [] for number in numbers}
    for number, prompt in zip(numbers, prompts, strict=True):
        engine.submit(prompt, sampling, number)
    replies = generated = 0
    while engine.busy:
        for delta in engine.step():
            pieces[delta.request].append(delta)
            replies += delta.finish is not None
            generated += len(delta.tokens)
            if on_delta:
                on_delta(delta)
        if on_progress:
            on_progress(replies, len(prompts), f"{generated:,} tokens")
    return [_join(deltas) for deltas in pieces.values()]


def _join(deltas: Sequence[Delta]) -> Completion:
    tokens = np.concatenate([delta.tokens for delta in deltas])
    return Completion(tokens, np.concatenate([delta.logprobs for delta in deltas]), deltas[-1].finish or "length")


@functools.cache  # so that it is logged once
def _shares_prefixes(implementation: str | None) -> bool:
    if shares_prefixes(implementation):
        return True
    log.info("this attention kernel knows no prefixes: prompts that begin with the same image are computed each")
    return False


def _shards() -> int:
    """Devices along the batch: data * fsdp."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("an Engine runs under jax.set_mesh(make_mesh(...))")
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _token_arrays(vocab: int, banned: Sequence[int], stops: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """bool[V] and i32[stops]; UserError for tokens that the model does not have, and for banned stop tokens."""
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


def _problem(prompt: Segment, model: config.Model) -> str:
    """Why the prompt cannot be completed, or ""."""
    vocab = model.vocab_size
    if not len(prompt):
        return "is empty: give it at least one token"
    if prompt.visual[-1]:
        return "ends in an image: put text, such as the assistant's first tokens, behind it"
    if prompt.tokens.min() < 0 or prompt.tokens.max() >= vocab:
        return f"holds tokens outside the model's vocabulary of {vocab}: use the model's own tokenizer"
    blank, structure = jax.tree.flatten(model.blank_image())
    for image in prompt.pixels:
        arrays, given = jax.tree.flatten(image)
        if given != structure:
            return f"has an image of the structure {given}, not {structure}"
        for array, like in zip(arrays, blank, strict=True):
            if array.shape != like.shape or array.dtype != like.dtype:
                return f"has an image of shape {array.shape} and type {array.dtype}, not {like.dtype} of {like.shape}"
    try:
        image_spans(prompt, model)
    except ValueError as error:
        return f"has {error}"
    return ""


def _check_finite(logprobs: np.ndarray, counts: np.ndarray) -> None:
    used = np.arange(len(logprobs))[:, None] < counts
    if not np.isfinite(logprobs[used]).all():
        raise UserError("the model's logits are not finite: its weights are broken, take an earlier checkpoint")
