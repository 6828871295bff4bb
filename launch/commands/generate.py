"""`generate`: one reply to one prompt and its images, printed as it is decoded."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

from infimed_jax.errors import UserError
from infimed_jax.files import make_folder
from launch.commands.arguments import add_command, add_settings, check_file


def add(commands: argparse._SubParsersAction) -> None:
    p = add_command(commands, "generate", generate, "Answer a prompt with images; greedy unless told otherwise.")
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
    import jax

    from infimed_jax import config as configuration
    from infimed_jax.data.chat import load_tokenizer, render_prompt
    from infimed_jax.files import write_json
    from infimed_jax.hf.names import check_leaves
    from infimed_jax.models.compute import Compute
    from infimed_jax.sampling.generate import generate
    from infimed_jax.sampling.stream import TextStream
    from infimed_jax.sampling.weights import sampler_weights
    from infimed_jax.sharding import make_mesh
    from infimed_jax.trees import flatten

    config, params, positions = _open(args)
    # A setting such as model.text.num_layers must fit the weights: a layer too many would be a copy of the last one.
    check_leaves(flatten(dict(params), "/"), config.model)
    size = config.model.vision.image_size
    pixels = [_decode(file, data, size) for file, data in zip(args.image, images, strict=True)]
    tokenizer = load_tokenizer(args.tokenizer or config.data.tokenizer)
    if len(tokenizer) > config.model.text.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.folder} has {len(tokenizer)} tokens, the model's vocab_size is "
            f"{config.model.text.vocab_size}: name the model's own by --tokenizer"
        )
    sample, visual_tokens = _sample(args.prompt, images), config.model.projector.visual_tokens
    segment = render_prompt(sample, tokenizer, visual_tokens, pixels, thinking=args.reasoning)
    if len(segment) + config.sampling.max_tokens > positions:
        raise UserError(
            f"{len(segment)} tokens of prompt and sampling.max_tokens={config.sampling.max_tokens} exceed the model's "
            f"context of {positions}: shorten the prompt, give fewer images or lower sampling.max_tokens"
        )
    compute = Compute.of(config.train)
    stream = TextStream(tokenizer, lambda piece: print(piece, end="", flush=True))
    with jax.set_mesh(make_mesh(config.mesh)):
        weights = sampler_weights(_place(params, config.model), config.model, compute.dtype)
        del params
        began = time.perf_counter()
        (reply,) = generate(
            weights,
            config.model,
            [segment],
            config.sampling,
            stop_tokens=tokenizer.stop_tokens,
            banned_tokens=(*tokenizer.banned_tokens, *range(len(tokenizer), config.model.text.vocab_size)),
            key=jax.random.key(config.train.seed),
            compute=compute,
            on_tokens=lambda _, tokens: stream.add(tokens),
        )
    seconds = time.perf_counter() - began
    text = stream.end()
    print()
    end = "" if reply.finish == "stop" else f", cut at sampling.max_tokens={config.sampling.max_tokens}"
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
            "sampling": configuration.to_dict(config.sampling),
            "seconds": seconds,
        }
        write_json(args.output, values)
        print(f"Outputs: {args.output}", file=sys.stderr)


def _open(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """(Config, parameters on the host or the disk, the context's tokens).

    Over the checkpoint's settings lie this command's: this machine's devices and kernel, short bursts for the stream,
    plain greedy decoding (a run's own penalty would make it another reply than its export's), and float32 on a CPU,
    where bfloat16 is no faster. The user's lie over these.
    """
    import jax

    from infimed_jax.config import Config, Data, Mesh, from_dict, merge, to_dict, with_overrides
    from infimed_jax.hf.configuration import MAX_POSITIONS
    from infimed_jax.hf.import_ import open_llava
    from infimed_jax.hf.provenance import max_positions
    from infimed_jax.hf.weights import read_json
    from infimed_jax.runs.history import history_of
    from infimed_jax.runs.parameters import open_params
    from infimed_jax.sharding import make_mesh

    if args.hf:
        written = read_json(args.hf / "config.json")
        narrow = "bfloat16" in (written.get("dtype"), written.get("torch_dtype"))
        opened = open_llava(args.hf, dtype="bfloat16" if narrow else "float32")
        params, values = opened.params(), to_dict(Config(model=opened.model, data=Data(tokenizer=str(args.hf))))
        positions = opened.max_positions
    else:
        params, metadata = open_params(args.checkpoint)
        values = metadata["config"]
        positions = max_positions(history_of(metadata)) or MAX_POSITIONS
    sampling = {"burst": 4, "temperature": 0.0, "repetition_penalty": 1.0}
    ours: dict[str, Any] = {"mesh": to_dict(Mesh()), "sampling": sampling, "train": {"attention": "auto"}}
    if jax.default_backend() == "cpu":
        ours["train"] |= {"compute_dtype": "float32"}
    values = merge(values, ours)
    shards = make_mesh(from_dict(Config, with_overrides(values, args.settings)).mesh).shape
    values = merge(values, {"sampling": {"slots": shards["data"] * shards["fsdp"]}})
    return from_dict(Config, with_overrides(values, args.settings)), params, positions


def _keep_notes_off_stdout() -> None:
    """Standard output is the reply's alone: it may go to a file or another program."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)


def _place(params: Any, model: Any) -> Any:
    """Every leaf on the current mesh, as stored: the sampler casts."""
    import jax
    import numpy as np

    from infimed_jax.models.params import abstract_params

    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda leaf, like: jax.device_put(np.asarray(leaf), jax.sharding.NamedSharding(mesh, like.sharding.spec)),
        params,
        abstract_params(model),
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"--image {file}: {error.strerror}") from error


def _decode(file: Path, data: bytes, size: int) -> Any:
    from infimed_jax.data.images import ImageError, decode_image

    try:
        return decode_image(data, size)
    except ImageError as error:
        raise UserError(f"--image {file}: {error.reason}") from error


def _sample(prompt: str, images: list[bytes]) -> Any:
    """The prompt as the model was tuned on questions: one image before the text, several with their numbers."""
    from infimed_jax.data.prompts import with_images
    from infimed_jax.data.sample import Sample, Turn

    if images:  # after one the text begins on a new line: a prompt that does so already gets no second
        prompt = prompt.removeprefix("\n")
    turn = Turn("user", with_images(prompt, len(images)))
    return Sample("prompt", "user", "", "chat", tuple(images), (turn,))
