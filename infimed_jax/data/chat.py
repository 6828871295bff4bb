"""The one renderer: samples → tokens, loss mask and image places, for tuning, rollouts and evaluation alike.

Chats follow Qwen3's chat template token for token, documents follow the ancestor's pretraining layout. Special tokens
come only from here: text that spells one (`<|im_end|>`, `<think>`, `<|image_pad|>`) is encoded as the text it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from infimed_jax.data.batch import Segment
from infimed_jax.data.prompts import Wording, as_turns, exchange, question_text
from infimed_jax.data.sample import Document, Question, Sample, Turn
from infimed_jax.errors import UserError

RENDERING = 1
"""Version of the layout below; packing indices made with another one are rebuilt."""

TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer_config.json", "chat_template.jinja"),
)
"""Files of a Hugging Face tokenizer; only the first is read here."""

_SPECIAL = {
    "endoftext": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
    "think": "<think>",
    "end_think": "</think>",
}
_SAMPLED = ("endoftext", "im_end", "think", "end_think")
"""Added tokens that a model may produce; it must never produce the others."""
_FIXED_TEXTS = ("\n", "\n\n", "system\n", "user\n", "assistant\n")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A Qwen3 tokenizer without its chat template; `len()` counts the added tokens."""

    folder: Path
    fingerprint: str
    """SHA-256 of `tokenizer.json`."""
    endoftext: int
    im_start: int
    im_end: int
    vision_end: int
    image_pad: int
    think: int
    end_think: int
    stop_tokens: tuple[int, ...]
    """Any of these ends a completion."""
    banned_tokens: tuple[int, ...]
    """Added tokens that must not be sampled: image places, role marks, tool calls."""
    _full: tokenizers.Tokenizer = field(repr=False)
    _plain: tokenizers.Tokenizer = field(repr=False)
    _fixed: dict[str, list[int]] = field(repr=False)

    def unsampled(self, vocab_size: int) -> tuple[int, ...]:
        """What a model of so many tokens must never produce: `banned_tokens`, and those that the tokenizer lacks."""
        return (*self.banned_tokens, *range(len(self), vocab_size))

    def __len__(self) -> int:
        return self._full.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Plain text → ids, none of them an added token."""
        fixed = self._fixed.get(text)
        return fixed if fixed is not None else self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Ids → text, special tokens spelled out; broken UTF-8 becomes U+FFFD."""
        return self._full.decode([int(token) for token in tokens], skip_special_tokens=False)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read `tokenizer.json` from a Qwen3 tokenizer's folder; UserError where it or a special token is absent."""
    folder = Path(folder)
    file = folder / "tokenizer.json"
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"data.tokenizer: cannot read {file}: give the folder of a Qwen3 tokenizer") from error
    try:
        full = tokenizers.Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"data.tokenizer: {file} is no tokenizer: {error}") from error
    ids = {name: full.token_to_id(token) for name, token in _SPECIAL.items()}
    missing = [_SPECIAL[name] for name, token in ids.items() if token is None]
    if missing:
        raise UserError(f"data.tokenizer: {file} lacks {', '.join(missing)}: give a Qwen3 tokenizer")
    # The same model without added tokens: they would be found in the text, `<think>` even where specials are split.
    plain = tokenizers.Tokenizer(full.model)
    plain.normalizer = full.normalizer
    plain.pre_tokenizer = full.pre_tokenizer
    sampled = {ids[name] for name in _SAMPLED}
    return Tokenizer(
        folder=folder,
        fingerprint=hashlib.sha256(raw).hexdigest(),
        **ids,
        stop_tokens=(ids["im_end"], ids["endoftext"]),
        banned_tokens=tuple(token for token in sorted(full.get_added_tokens_decoder()) if token not in sampled),
        _full=full,
        _plain=plain,
        _fixed={text: plain.encode(text, add_special_tokens=False).ids for text in _FIXED_TEXTS},
    )


class _Pen:
    """A segment under construction."""

    def __init__(self, tokenizer: Tokenizer, visual_tokens: int | Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.visual_tokens = visual_tokens
        self.tokens: list[int] = []
        self.targets: list[float] = []
        self.images: list[int] = []

    def special(self, token: int, weight: float = 0.0) -> None:
        self.tokens.append(token)
        self.targets.append(weight)

    def image(self, number: int) -> None:
        places = self.visual_tokens if isinstance(self.visual_tokens, int) else self.visual_tokens[number]
        self.tokens += [self.tokenizer.image_pad] * places
        self.targets += [0.0] * places
        self.images.append(number)

    def text(self, text: str, weight: float = 0.0, prefix: str = "") -> None:
        """`prefix + text`, encoded together as the template's string would be; the prefix has no weight.

        Where the two share a token (text that starts with a newline), that token counts as text.
        """
        ids = self.tokenizer.encode(prefix + text)
        free = _common(ids, self.tokenizer.encode(prefix)) if prefix and weight else 0
        self.tokens += ids
        self.targets += [0.0] * free + [weight] * (len(ids) - free)

    def content(self, pieces: Sequence[str | int], weight: float = 0.0, prefix: str = "") -> None:
        """`prefix`, which may not be empty, then text and images in order."""
        runs = list(_runs(pieces))
        first = runs.pop(0) if runs and isinstance(runs[0], str) else ""
        self.text(first, weight, prefix)
        for run in runs:
            if isinstance(run, str):
                self.text(run, weight)
            else:
                self.image(run)

    def segment(self, sample: Sample, pixels: Sequence[Any]) -> Segment:
        if pixels and len(pixels) != len(sample.images):
            raise ValueError(f"sample {sample.id}: {len(pixels)} prepared images for {len(sample.images)}")
        tokens = np.array(self.tokens, np.int32)
        return Segment(
            tokens=tokens,
            targets=np.array(self.targets, np.float32),
            visual=tokens == self.tokenizer.image_pad,  # encoded text cannot hold it
            pixels=tuple(pixels[number] for number in self.images) if pixels else (),
        )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


def _runs(pieces: Sequence[str | int]) -> Iterator[str | int]:
    """Pieces with neighbouring texts joined: a tokenizer sees the text between two special tokens as one."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        yield piece
        text = ""
    if text:
        yield text


def _strip_newlines(pieces: Sequence[str | int]) -> list[str | int]:
    """Without leading newlines, as the template has an answer after its reasoning."""
    runs = list(_runs(pieces))
    if runs and isinstance(runs[0], str):
        runs[0] = runs[0].lstrip("\n")
    return runs


def render(
    sample: Sample, tokenizer: Tokenizer, visual_tokens: int | Sequence[int], pixels: Sequence[Any] = ()
) -> Segment:
    """The training rendering, images expanded to `visual_tokens` places, one number for all or one for each.

    Loss is on assistant turns with their `<|im_end|>`, or on all text of a document. `pixels` are the
    sample's images prepared in order; without them the segment has none, and is good for its length only.
    """
    pen = _Pen(tokenizer, visual_tokens)
    if isinstance(sample, Document):
        _document(pen, sample)
    else:
        _turns(pen, as_turns(sample))
    return pen.segment(sample, pixels)


def render_prompt(
    sample: Sample,
    tokenizer: Tokenizer,
    visual_tokens: int | Sequence[int],
    pixels: Sequence[Any] = (),
    *,
    reasoning: bool = False,
    image: bool = True,
    wording: Wording = question_text,
) -> Segment:
    """What stands before the last assistant turn, and the generation prompt: an empty think block unless `reasoning`.

    A question is put in `wording`; `image=False` leaves its images out. Targets are all 0. UserError for a document,
    which has no prompt.
    """
    if isinstance(sample, Document):
        raise UserError(f"sample {sample.id} is a document: only chats and questions have a prompt")
    turns = exchange(sample, reasoning, image, wording) if isinstance(sample, Question) else sample.turns
    pen = _Pen(tokenizer, visual_tokens)
    _turns(pen, before_answer(turns))
    pen.special(tokenizer.im_start)
    pen.text("assistant\n")
    if not reasoning:
        _empty_think(pen)
        pen.text("\n\n")
    pen.targets = [0.0] * len(pen.tokens)
    return pen.segment(sample, pixels)


def before_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns before the last assistant turn; all where there is none."""
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    return turns[: answers[-1]] if answers else turns


def _document(pen: _Pen, sample: Document) -> None:
    """Begin of document, chunks, `<|im_end|>`; where there are several images, each chunk ends with a mark.

    Open-Qwen2VL's layout; it marks chunks with `<|endofchunk|>`, which Qwen3 lacks, so `<|vision_end|>` serves.
    """
    several = sum(not isinstance(piece, str) for chunk in sample.chunks for piece in chunk) > 1
    pen.special(pen.tokenizer.endoftext)
    for chunk in sample.chunks:
        for run in _runs(chunk):
            if isinstance(run, str):
                pen.text(run, weight=1.0)
            else:
                pen.image(run)
        if several:
            pen.special(pen.tokenizer.vision_end, weight=1.0)
    pen.special(pen.tokenizer.im_end, weight=1.0)


def _turns(pen: _Pen, turns: Sequence[Turn]) -> None:
    """Qwen3's chat template without tools; reasoning before the last user turn is dropped, as there."""
    last = len(turns) - 1
    query = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=last)
    for number, turn in enumerate(turns):
        pen.special(pen.tokenizer.im_start)
        if turn.role != "assistant":
            pen.content(turn.content, prefix=f"{turn.role}\n")
            pen.special(pen.tokenizer.im_end)
        else:
            thinks = number > query and (number == last or bool(turn.reasoning))
            _answer(pen, turn, thinks)
            pen.special(pen.tokenizer.im_end, weight=1.0)
        pen.text("\n")


def _answer(pen: _Pen, turn: Turn, thinks: bool) -> None:
    """An assistant's turn up to its end mark. An empty think block is the prompt's, so it carries no loss."""
    if not thinks:
        pen.content(turn.content, weight=1.0, prefix="assistant\n")
        return
    pen.text("assistant\n")
    reasoning = turn.reasoning.strip("\n")
    if not reasoning:
        _empty_think(pen)
        pen.content(_strip_newlines(turn.content), weight=1.0, prefix="\n\n")
        return
    pen.special(pen.tokenizer.think, weight=1.0)
    pen.text(f"\n{reasoning}\n", weight=1.0)
    pen.special(pen.tokenizer.end_think, weight=1.0)
    pen.content(["\n\n", *_strip_newlines(turn.content)], weight=1.0)


def _empty_think(pen: _Pen) -> None:
    pen.special(pen.tokenizer.think)
    pen.text("\n\n")
    pen.special(pen.tokenizer.end_think)
