"""`generate`: one reply to one prompt and its images, printed as it is decoded."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from infimed_jax.errors import UserError
from infimed_jax.files import make_folder
from launch.cli.arguments import add_command, add_settings, check_file


def add(commands: argparse._SubParsersAction) -> None:
    p = add_command(commands, "generate", generate, "Answer a prompt with images; greedy unless set otherwise.")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="a run's folder, or one checkpoint")
    source.add_argument("--hf", type=Path, metavar="DIR", help="a LLaVA folder, as `convert to-hf` writes it")
    p.add_argument("--prompt", required=True, help="the question; the images stand before it")
    p.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable, in order")
    p.add_argument("--reasoning", action="store_true", help="let the model think before it answers")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="[the checkpoint's, or the --hf folder]")
    p.add_argument("--output", type=Path, metavar="FILE", help="the reply and how it was made, as JSON")
    add_settings(p, files=False)


def generate(args: argparse.Namespace) -> None:
    if not args.prompt.strip():  # before the model: a mistake is answered at once
        raise UserError("--prompt is empty: write a question, or what to do with the images")
    if any("\ud800" <= letter <= "\udfff" for letter in args.prompt):  # how Python reads bytes that are no text
        raise UserError("--prompt is no UTF-8: write it in that encoding (a UTF-8 terminal or locale)")
    if args.output:
        make_folder(args.output.parent)
    check_file("--output", args.output)
    images = [_read(file) for file in args.image]
    _keep_notes_off_stdout()
    for file, data in zip(args.image, images, strict=True):
        _check_image(file, data)
    import jax

    from infimed_jax.config import to_dict
    from infimed_jax.files import write_json
    from infimed_jax.sampling.policy import Policy
    from infimed_jax.sampling.stream import TextStream
    from infimed_jax.sharding import row_shards

    policy = Policy.open(
        args.hf or args.checkpoint,
        args.settings,
        defaults=_defaults(),
        tokenizer=args.tokenizer,
        export=args.hf is not None,
    )
    sampling = replace(policy.config.sampling, slots=row_shards(policy.mesh))  # one prompt needs no more
    (segment,) = policy.prompts([_sample(args.prompt, images)], reasoning=args.reasoning)
    if len(segment) + sampling.max_tokens > policy.context:
        raise UserError(
            f"{len(segment)} tokens of prompt and sampling.max_tokens={sampling.max_tokens} exceed the model's "
            f"context of {policy.context}: shorten the prompt, give fewer images or lower sampling.max_tokens"
        )
    stream = TextStream(policy.tokenizer, lambda piece: print(piece, end="", flush=True))
    key, began = jax.random.key(policy.config.train.seed), time.perf_counter()
    (reply,) = policy.answer([segment], sampling, key, on_delta=lambda delta: stream.add(delta.tokens))
    seconds = time.perf_counter() - began
    text = stream.end()
    print()
    end = "" if reply.finish == "stop" else f", cut at sampling.max_tokens={sampling.max_tokens}"
    print(f"[{len(segment)} tokens of prompt, {len(reply.tokens)} of reply, {seconds:.1f} s{end}]", file=sys.stderr)
    if args.output:
        values = {
            "model": str(args.checkpoint or args.hf),
            "prompt": args.prompt,
            "images": [str(file) for file in args.image],
            "reply": text,
            "tokens": reply.tokens.tolist(),
            "logprobs": reply.logprobs.tolist(),
            "finish": reply.finish,
            "sampling": to_dict(sampling),
            "seconds": seconds,
        }
        write_json(args.output, values)
        print(f"Outputs: {args.output}", file=sys.stderr)


def _defaults() -> dict[str, Any]:
    """Settings of this command, over the model's own: this machine's devices and kernel, short bursts for the stream,
    plain greedy decoding (a run's own penalty would make it another reply than its export's), and float32 on a CPU,
    where bfloat16 is no faster."""
    import jax

    from infimed_jax.config import Mesh, to_dict

    sampling = {
        "burst": 4,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    train = {"attention": "auto"} | ({"compute_dtype": "float32"} if jax.default_backend() == "cpu" else {})
    return {"mesh": to_dict(Mesh()), "sampling": sampling, "train": train}


def _keep_notes_off_stdout() -> None:
    """Standard output is the reply's alone: it may go to a file or another program."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"--image {file}: {error.strerror}") from error


def _check_image(file: Path, data: bytes) -> None:
    from infimed_jax.data.images import ImageError, decode_rgb

    try:
        decode_rgb(data)
    except ImageError as error:
        raise UserError(f"--image {file}: {error.reason}") from error


def _sample(prompt: str, images: list[bytes]) -> Any:
    """The prompt as the model was tuned on questions: one image before the text, several with their numbers."""
    from infimed_jax.data.prompts import with_images
    from infimed_jax.data.sample import Chat, Turn

    if images:  # after one the text begins on a new line: a prompt that does so already gets no second
        prompt = prompt.removeprefix("\n")
    turn = Turn("user", with_images(prompt, len(images)))
    return Chat("prompt", "user", "", tuple(images), (turn,))
