"""From samples to prompts, and from completions to training rows of one static shape."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from infimed_jax import config
from infimed_jax.data.batch import Batch, Segment, build_row, stack_rows
from infimed_jax.data.chat import Tokenizer, render_prompt
from infimed_jax.data.images import ImageError, prepare_image, visual_tokens
from infimed_jax.data.sample import Question, Sample
from infimed_jax.errors import UserError
from infimed_jax.models.compute import Compute
from infimed_jax.ops.attention import shares_prefixes
from infimed_jax.rl.loss import GrpoBatch
from infimed_jax.sampling.engine import Completion


@dataclass(frozen=True)
class Questions:
    """The samples that can be asked and rewarded."""

    numbers: np.ndarray
    """i64[n]; their places in the dataset."""
    longest: int
    """Tokens of the longest prompt, visual ones included."""
    images: int
    """Most images of a prompt."""
    dropped: dict[str, int]
    """Samples left out, by reason."""
    fingerprint: str
    """SHA-256 of prompts, images and what replies are graded by, in order."""


def questions(samples: Iterable[Sample], tokenizer: Tokenizer, cfg: config.Config) -> Questions:
    """Look at every sample once, its images included: nothing unreadable may turn up in the middle of a run.

    Raises UserError where nothing is left to ask.
    """
    numbers, longest, images, dropped = [], 0, 0, Counter()
    readable: dict[bytes, bool] = {}
    content = hashlib.sha256()
    for number, sample in enumerate(samples):
        digests = [_check(data, cfg.model, readable) for data in sample.images]
        reason, prompt = _problem(sample, tokenizer, cfg, all(readable[digest] for digest in digests))
        if reason:
            dropped[reason] += 1
            continue
        numbers.append(number)
        longest, images = max(longest, len(prompt)), max(images, len(sample.images))
        graded = repr((sample.id, sample.kind, sample.options, sample.answer, *sample.alternatives)).encode()
        content.update(b"".join([graded, prompt.tobytes(), *digests]))
    if not numbers:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the dataset is empty"
        raise UserError(
            f"no sample can be asked in GRPO ({why}): raise the limit that is named, or give questions with a gold "
            "answer and readable images"
        )
    return Questions(np.array(numbers), longest, images, dict(dropped), content.hexdigest())


_NO_PROMPT = np.zeros(0, np.int32)


def _problem(sample: Sample, tokenizer: Tokenizer, cfg: config.Config, readable: bool) -> tuple[str, np.ndarray]:
    """(why the sample cannot be asked, or "", i32[n] tokens of its prompt)."""
    if not isinstance(sample, Question) or not sample.answer.strip():
        return "no gold answer", _NO_PROMPT
    if len(sample.images) > cfg.data.images_per_row:
        return "more images than data.images_per_row", _NO_PROMPT
    if not readable:
        return "unreadable image", _NO_PROMPT
    # As `Policy.prompts` asks it: the reward reads a boxed answer, so the prompt must ask for one.
    tokens = render_prompt(sample, tokenizer, visual_tokens(sample.images, cfg.model), reasoning=True).tokens
    return ("longer than grpo.max_prompt" if len(tokens) > cfg.grpo.max_prompt else ""), tokens


def _check(data: bytes, model: config.Model, readable: dict[bytes, bool]) -> bytes:
    """The image's digest; `readable` remembers whether it can be decoded."""
    digest = hashlib.sha256(data).digest()
    if digest not in readable:
        try:
            prepare_image(data, model)
            readable[digest] = True
        except ImageError:
            readable[digest] = False
    return digest


def prompt_order(count: int, prompts: int, seed: int, step: int) -> np.ndarray:
    """i64[prompts]: which of `count` questions rollout `step` asks; a pure function, every question once an epoch."""
    places = np.arange(step * prompts, (step + 1) * prompts)
    epochs = {e: np.random.default_rng((seed, e)).permutation(count) for e in np.unique(places // count)}
    return np.array([epochs[place // count][place % count] for place in places])


@dataclass(frozen=True)
class Layout:
    """The one shape of every update of a run, from bounds, so that one program serves them all.

    Rows beyond the real ones are padding; `grpo_loss` computes no piece that is all padding.
    """

    context: int
    """Tokens of a row."""
    images: int
    """Image slots of a row."""
    piece: int
    """Rows computed at once over all devices: `train.global_batch / train.micro_batches`."""
    pieces: int
    """Pieces of an update, run one after the other; the first ones hold the real rows."""
    shared: bool
    """Whether completions of one prompt in a row share its tokens."""

    @property
    def rows(self) -> int:
        return self.piece * self.pieces


def plan_layout(found: Questions, cfg: config.Config) -> Layout:
    """Rows that hold any `update_prompts * group_size` completions. Raises ConfigError where one does not fit a row."""
    context, grpo = cfg.data.context, cfg.grpo
    shared = grpo.share_prompts and shares_prefixes(Compute.of(cfg.train).implementation)
    longest = found.longest + grpo.max_response
    if longest > context:
        raise config.ConfigError(
            f"data.context {context} must hold the longest prompt ({found.longest} tokens) and grpo.max_response "
            f"{grpo.max_response}: raise it to {longest}, or lower grpo.max_prompt or grpo.max_response"
        )
    # Next-fit closes a row only when the next completion finds no room, so a row holds at least `fit` of them:
    # as many of the longest as its tokens allow, and no more than its image slots allow.
    fit = 1
    while _most_tokens(fit + 1, found.longest, grpo, shared) <= context:
        fit += 1
    images = 0
    if found.images:
        prompts = min(_most_prompts(fit, grpo), cfg.data.images_per_row // found.images)
        fit = min(fit, (prompts - 1) * grpo.group_size + 1)
        images = prompts * found.images
    rows = -(-grpo.update_prompts * grpo.group_size // fit)
    piece = cfg.train.global_batch // cfg.train.micro_batches
    return Layout(context, images, piece, -(-rows // piece), shared)


def _most_prompts(completions: int, grpo: config.Grpo) -> int:
    """Most prompts of so many completions side by side: the first may be the last of its group."""
    return 1 + -(-(completions - 1) // grpo.group_size)


def _most_tokens(completions: int, longest_prompt: int, grpo: config.Grpo, shared: bool) -> int:
    """Places that so many of the longest completions take in one row."""
    if not shared:
        return completions * (longest_prompt + grpo.max_response)
    return _most_prompts(completions, grpo) * (longest_prompt - 1) + completions * (1 + grpo.max_response)


def next_fit(prompts: Sequence[Segment], replies: Sequence[np.ndarray], layout: Layout) -> list[list[int]]:
    """Numbers of the completions of each row, in order: those of a prompt (one object) stay side by side."""
    bins: list[list[int]] = []
    used, slots, held = 0, set(), None
    for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        wanted = {id(image) for image in prompt.pixels}
        new = 1 + len(reply) if layout.shared and prompt is held else len(prompt) + len(reply)
        if not bins or used + new > layout.context or len(slots | wanted) > layout.images:
            bins.append([])
            used, slots, new = 0, set(), len(prompt) + len(reply)
        bins[-1].append(number)
        used, slots, held = used + new, slots | wanted, prompt
    return bins


def join(prompt: Segment, reply: np.ndarray) -> Segment:
    """The training segment: prompt and completion tokens, with the loss on the latter."""
    n = len(reply)
    return Segment(
        tokens=np.concatenate([prompt.tokens, reply]).astype(np.int32),
        targets=np.concatenate([np.zeros(len(prompt)), np.ones(n)]).astype(np.float32),
        visual=np.concatenate([prompt.visual, np.zeros(n, bool)]),
        pixels=prompt.pixels,
    )


def branch(prompts: Sequence[Segment], replies: Sequence[np.ndarray]) -> list[tuple[Segment, bool]]:
    """A row's segments, each prompt once, and whether a segment is a completion: the numbers are those of the replies.

    The prompt's last token, which predicts each reply's first, stands at the head of every reply instead.
    """
    found: list[tuple[Segment, bool]] = []
    held, trunk = None, 0
    for prompt, reply in zip(prompts, replies, strict=True):
        if prompt is not held:
            body = Segment(prompt.tokens[:-1], prompt.targets[:-1] * 0, prompt.visual[:-1], prompt.pixels)
            found.append((body, False))
            held, trunk = prompt, len(found)
        n = len(reply)
        tokens = np.concatenate([prompt.tokens[-1:], reply]).astype(np.int32)
        targets = np.ones(n + 1, np.float32)
        found.append((Segment(tokens, targets, np.zeros(n + 1, bool), continues=trunk), True))
    return found


def training_rows(
    prompts: Sequence[Segment],
    completions: Sequence[Completion],
    advantages: np.ndarray,
    layout: Layout,
    model: config.Model,
) -> GrpoBatch:
    """Completion i answers `prompts[i]` (one object a group) with `advantages[i]`; NumPy, `layout.rows` rows.

    `old_logprobs` are the sampler's, `reference_logprobs` zeros. Row r stands at place `r % piece * pieces +
    r // piece`: micro-batch j of the train step takes every `pieces`-th row from j on, so the first ones are full.
    """
    replies = [completion.tokens for completion in completions]
    bins = next_fit(prompts, replies, layout)
    if len(bins) > layout.rows:
        raise ValueError(f"{len(bins)} rows of completions exceed the plan's {layout.rows}")
    shape = dict(context=layout.context, images=layout.images, model=model)
    sampled = np.zeros((layout.rows, layout.context), np.float32)
    credit = np.zeros_like(sampled)
    rows: list[Batch] = [build_row([], **shape)] * layout.rows
    for r, numbers in enumerate(bins):
        place = r % layout.piece * layout.pieces + r // layout.piece
        row_prompts, row_replies = [prompts[i] for i in numbers], [replies[i] for i in numbers]
        if layout.shared:
            segments = branch(row_prompts, row_replies)
        else:
            segments = [(join(p, r), True) for p, r in zip(row_prompts, row_replies, strict=True)]
        rows[place] = build_row([segment for segment, _ in segments], **shape)
        start, remaining = 0, iter(numbers)
        for segment, is_completion in segments:
            end = start + len(segment) - 1  # position t speaks of token t + 1
            if is_completion:
                i = next(remaining)
                first = end - len(replies[i])
                sampled[place, first:end] = completions[i].logprobs
                credit[place, first:end] = advantages[i]
            start = end + 1
    return GrpoBatch(stack_rows(rows), sampled, np.zeros_like(sampled), credit)
