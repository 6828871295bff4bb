"""The other side of a proof: what transformers (and PEFT) make of an exported folder, in a process of its own.

Its memory is free again when that process ends, and stays near the folder's size while it runs: weights are widened to
float32 a module at a time, as each runs, and logits go to the disk a few positions at a time.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from infimed_jax.errors import UserError
from infimed_jax.hf.weights import ADAPTER

T = TypeVar("T")
Features = Mapping[str, tuple[str, str]]
"""`HuggingFace.features`."""

POSITIONS = 64
"""Whose logits are in memory at once: 2,000 positions of 152k logits are 1.2 GB in float32."""


class Unusable(Exception):
    """transformers cannot use an exported folder; the message, one line, is its own."""


@dataclass(frozen=True)
class Prompt:
    """What a user of the export would give."""

    messages: list[dict[str, Any]]
    images: tuple[bytes, ...]
    """Encoded, in the order in which the messages name them."""
    tokens: list[int]
    """Ours. Where the processor gives others, nothing is computed: the numbers would say nothing."""


@dataclass(frozen=True)
class Reference:
    """What one prompt has become; only what is asked for is read."""

    file: Path
    """Stem of its files: pixels and the encoder's stages [M, …] (with images), logits [T,V]."""
    tokens: list[int]

    def array(self, name: str) -> np.ndarray:
        return np.load(self.file.with_suffix(f".{name}.npy"))

    def logits(self, vocab: int) -> Iterator[np.ndarray]:
        """f32[at most POSITIONS, V], in order."""
        with open(self.file.with_suffix(".logits"), "rb") as file:
            while len(piece := np.fromfile(file, np.float32, POSITIONS * vocab)):
                yield piece.reshape(-1, vocab)


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a new process, which is gone when this returns."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise UserError(
            "the process that computes transformers' side was ended from outside, most likely for want of memory: "
            "it needs the export's size and a few gigabytes more"
        ) from None


def compute(
    folder: Path, prompts: Sequence[Prompt], work: Path, features: Features, family: str = ""
) -> tuple[list[Reference], list[str]]:
    """(each prompt's outputs, as files in `work`; what transformers had to say of the folder's weights).

    `features` are the family's; `family` names it where it brings a reference of its own. Unusable where the folder
    cannot be loaded, or its processor takes no prompt.
    """
    import torch

    with _their_errors("load the export"):
        processor, model, loading = _own(folder, family) if family else _open(folder)
    widen_as_they_run(model.eval())
    with torch.no_grad():
        references = [_answer(prompt, processor, model, work / str(n), features) for n, prompt in enumerate(prompts)]
    return references, [f"transformers reports {what}: {keys}" for what, keys in loading.items() if keys]


def _own(folder: Path, family: str) -> tuple[Any, Any, dict[str, Any]]:
    from infimed_jax.models.family import family_named  # with JAX, which the process does without otherwise

    opened = family_named(family).hugging_face.open_reference
    if opened is None:
        raise Unusable(f"model.family={family} has no reference of its own")
    return *opened(folder), {}


def _open(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(processor, model, what transformers reports of its weights)."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    # Where torchvision is installed, transformers would resize with it: one or two of 255 levels off Pillow's, in
    # 0.2 to 0.4 % of the values of VQA-RAD's images. Training's pixels are Pillow's; the card says so.
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    load: Any = AutoModelForImageTextToText.from_pretrained  # annotated as if it gave the model alone
    model, loading = load(folder, dtype="auto", output_loading_info=True)
    if (folder / ADAPTER).is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / ADAPTER)).get_base_model()
    return processor, model, loading


@contextlib.contextmanager
def _their_errors(doing: str) -> Iterator[None]:
    """Damaged weights, an absent template, a config.json of another image token: each library has its type of error.

    A full disk and a want of memory say nothing of the export.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or isinstance(error, MemoryError):
            raise
        raise Unusable(f"transformers cannot {doing}: {' '.join(str(error).split())}") from error


def _answer(prompt: Prompt, processor: Any, model: Any, file: Path, features: Features) -> Reference:
    images = [Image.open(io.BytesIO(image)) for image in prompt.images]
    with _their_errors("give a prompt to the export's processor"):
        text = processor.apply_chat_template(
            prompt.messages, add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        inputs = processor(images=images or None, text=[text], return_tensors="pt")
    reference = Reference(file, inputs["input_ids"][0].tolist())
    if images:
        _save(file.with_suffix(".pixels.npy"), inputs["pixel_values"])
    if reference.tokens != prompt.tokens:
        return reference

    def keep(stage: str, side: str, _: Any, arguments: tuple[Any, ...], output: Any) -> None:
        _save(file.with_suffix(f".{stage}.npy"), arguments[0] if side == "input" else output)

    hooks = [
        model.model.get_submodule(module).register_forward_hook(functools.partial(keep, stage, side))
        for stage, (module, side) in features.items()
    ]
    with _their_errors("run the export"):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    with open(file.with_suffix(".logits"), "wb") as out:
        for piece in hidden.split(POSITIONS):
            out.write(model.lm_head(piece).numpy().data)
    return reference


def _save(file: Path, tensor: Any) -> None:
    """As `np.save(file, …)`, which on a full disk says how much it wrote, but not that the disk is full."""
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    file.write_bytes(buffer.getbuffer())


def widen_as_they_run(model: Any) -> None:
    """Let every part of `model` compute in float32, whatever its weights are stored in; the widening is exact.

    A part is a layer, or what stands outside of all stacks of layers.
    """
    import torch

    def parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        if not any(isinstance(inner, torch.nn.ModuleList) for inner in module.modules()):
            yield module
            return
        for child in module.children():
            yield from (child,) if isinstance(module, torch.nn.ModuleList) else parts(child)

    def watch(part: torch.nn.Module) -> None:
        stored: dict[torch.nn.Parameter, torch.Tensor] = {}

        def widen(*_: Any) -> None:
            for parameter in part.parameters():
                stored[parameter] = parameter.data
                parameter.data = parameter.data.float()

        def restore(*_: Any) -> None:
            for parameter, data in stored.items():
                parameter.data = data
            stored.clear()

        part.register_forward_pre_hook(widen)
        part.register_forward_hook(restore)

    for part in parts(model):
        watch(part)
