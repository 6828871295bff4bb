"""What waiting prompts share, and the order in which they are admitted.

A trunk is the beginning of a prompt up to the end of an image. Prompts that begin alike (equal tokens, the same pixel
arrays) share it: it is computed once, and of each prompt only what follows, its branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.data.batch import Segment

TrunkKey = tuple[bytes, tuple[int, ...]]
"""Tokens, and the identities of the images among them."""


@dataclass(frozen=True)
class Request:
    number: int
    prompt: Segment
    sampling: config.Sampling
    trunk: int = 0
    """Tokens of the trunk that the prompt shares with another one; 0 where it shares none."""
    context: int = 0
    """The prompt length compiled for, which is one for all that share a trunk."""


def trunk_key(prompt: Segment, tokens: int, images: int) -> TrunkKey:
    """What prompts with the same trunk have in common."""
    return prompt.tokens[:tokens].tobytes(), tuple(map(id, prompt.pixels[:images]))


def trunks(prompt: Segment) -> list[tuple[int, int]]:
    """(tokens, images) of each beginning that ends with an image, the longest first."""
    ends = np.flatnonzero(prompt.visual[:-1] & ~prompt.visual[1:]) + 1
    counts = range(1, len(ends) + 1)
    if len(ends) != len(prompt.pixels):  # some images have no text between them: all before the last end are certain
        ends, counts = ends[-1:], [len(prompt.pixels)]
    return [(int(end), number) for end, number in zip(ends, counts, strict=False)][::-1]


def split(prompt: Segment, tokens: int) -> tuple[Segment, Segment]:
    """Its trunk of so many tokens, and its branch: the rest but the last token, which decoding feeds."""
    images = next(number for end, number in trunks(prompt) if end == tokens)

    def part(places: slice, pixels: tuple[Any, ...]) -> Segment:
        return Segment(prompt.tokens[places], prompt.targets[places], prompt.visual[places], pixels)

    return part(slice(tokens), prompt.pixels[:images]), part(slice(tokens, -1), prompt.pixels[images:])


def _shared_trunks(prompts: Mapping[int, Segment]) -> dict[int, tuple[TrunkKey, int]]:
    """(key, tokens) of the longest trunk that a prompt shares with another, by the prompt's identity."""
    own = {
        name: [(trunk_key(prompt, *trunk), trunk[0]) for trunk in trunks(prompt)] for name, prompt in prompts.items()
    }
    counts = Counter(key for found in own.values() for key, _ in found)
    longest = {name: next((trunk for trunk in found if counts[trunk[0]] > 1), None) for name, found in own.items()}
    return {name: trunk for name, trunk in longest.items() if trunk is not None}


def in_order(requests: Sequence[Request], share: bool) -> list[Request]:
    """The requests, trunk and context settled: long prompts first, those with the same trunk or image side by side."""
    prompts = {id(request.prompt): request.prompt for request in requests}
    shared = _shared_trunks(prompts) if share else {}
    contexts: dict[object, int] = {}
    for name, prompt in prompts.items():
        key = shared[name][0] if name in shared else name
        contexts[key] = max(contexts.get(key, 0), bucket(len(prompt)))

    def settle(request: Request) -> Request:
        key, tokens = shared.get(id(request.prompt), (id(request.prompt), 0))
        return replace(request, trunk=tokens, context=contexts[key])

    first_seen: dict[object, int] = {}

    def place(request: Request) -> tuple[int, int, int]:
        prompt, number, name = request.prompt, request.number, id(request.prompt)
        beginning = shared[name][0] if name in shared else id(prompt.pixels[0]) if prompt.pixels else name
        return -request.context, first_seen.setdefault(beginning, number), first_seen.setdefault(name, number)

    return sorted(map(settle, requests), key=place)


def bucket(length: int) -> int:
    """The prompt length compiled for: 1, 2, 3, 4, 6, 8, 12, … times 16, or times a kernel's tile of 128."""
    tile = 16 if jax.default_backend() == "cpu" else 128
    size = tile * power_of_two(-(-length // tile))
    return size * 3 // 4 if size * 3 // 4 >= length and size >= 4 * tile else size


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 0 stays 0."""
    return 1 << (n - 1).bit_length() if n else 0
