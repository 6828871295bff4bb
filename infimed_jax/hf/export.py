"""Our parameters as a folder that `LlavaForConditionalGeneration` and `AutoProcessor` load."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infimed_jax.config import Lora, Model
from infimed_jax.data.chat import Tokenizer, load_tokenizer
from infimed_jax.errors import UserError, disk_refusal
from infimed_jax.files import write_json
from infimed_jax.hf import names
from infimed_jax.hf.adapter import take_adapters, write_adapter
from infimed_jax.hf.card import Card, licence, render_card
from infimed_jax.hf.configuration import MAX_POSITIONS, generation_config, read_architecture
from infimed_jax.hf.processor import write_processor
from infimed_jax.hf.weights import ADAPTER, SHARD_BYTES, WeightsFolder, write_weights
from infimed_jax.models.family import family_of
from infimed_jax.models.hugging_face import SpecialTokens, UnusedTensor
from infimed_jax.progress import Report
from infimed_jax.trees import flatten

log = logging.getLogger(__name__)

SUMMARY = "export.json"


def to_hf(
    params: Mapping[str, Any],
    model: Model,
    tokenizer_folder: str | Path,
    output: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    source_vision: str | Path | None = None,
    visual_tokens: int | None = None,
    lora: Lora | None = None,
    card: Card | None = None,
    max_positions: int = MAX_POSITIONS,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Report | None = None,
) -> Path:
    """Write `params` as a Hugging Face LLaVA folder and return its path.

    Leaves are asked for one at a time, so `open_params`' pass through whatever their size; `on_progress(bytes, total)`
    after each tensor. The folder holds export.json, what was done, beside transformers' own files.

    What our tower does not hold (the blocks after the feature layer, the final norm, the pooling head) comes from
    `source_vision`, a SigLIP folder; without it they are initialised, and the log and the card say so: a tower is
    written whole, as SigLIP is published, so that no reader misses a key. With `lora`, `params` has its adapters as
    leaves: they go to the folder's `adapter` in PEFT's layout, and the rest is what they adapt. The folder appears
    under its name only when it is complete.

    A model that pools cannot be plain LLaVA: UserError, unless `visual_tokens` asks for all patches. UserError too
    where the parameters do not fit `model`, where the output exists, and where the disk is full.
    """
    output, card = Path(output), card or Card()
    _check_resolution(model, visual_tokens)
    leaves = flatten(dict(params))
    adapters = take_adapters(leaves, model) if lora else {}
    names.check_leaves(leaves, model)
    tokenizer = _tokenizer(tokenizer_folder, model)
    read_unused = _unused_reader(source_vision, model) if source_vision else _initialised
    if output.exists():
        raise UserError(f"{output} exists already: remove it or choose another folder")

    tensors = names.tensors(model)
    hf = family_of(model).hugging_face
    unused = hf.unused(model)
    to_file_key = functools.partial(names.to_file_key, spellings=hf.spellings[hf.architecture])
    made_up = [] if source_vision else names.by_module(to_file_key(tensor.key) for tensor in unused)
    shapes = {to_file_key(t.key): t.key_shape for t in tensors}
    shapes |= {to_file_key(tensor.key): tensor.shape for tensor in unused}
    special = SpecialTokens(tokenizer.image_pad, tokenizer.im_end, tokenizer.endoftext)
    config = hf.to_hf(model, special, dtype, max_positions)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    text = render_card(card, model, dtype=dtype, parameters=parameters, made_up=made_up, adapter=lora)
    summary = {
        "dtype": dtype,
        "tensors": len(shapes),
        "parameters": parameters,
        "trained_visual_tokens": model.visual_tokens,
        "exported_visual_tokens": hf.exported(model).visual_tokens,
        "source_vision": str(source_vision) if source_vision else None,
        "initialised": made_up,
        "adapter": {"rank": lora.rank, "alpha": lora.alpha, "tensors": len(adapters)} if lora else None,
        "card": dataclasses.asdict(card),
        "licence": licence(card),
    }
    banned = tokenizer.unsampled(model.vocab_size)
    with _whole_or_nothing(output) as folder:
        write_processor(tokenizer_folder, model, folder)  # first: a tokenizer without a template costs no minutes
        stream = _stream(leaves, tensors, unused, read_unused, to_file_key)
        write_weights(folder, stream, shapes, dtype, shard_bytes, on_progress)
        write_json(folder / "config.json", config)
        settings = generation_config(tokenizer.stop_tokens, tokenizer.endoftext, banned)
        write_json(folder / "generation_config.json", settings)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if lora:
            write_adapter(folder / ADAPTER, adapters, lora, model, output)
            (folder / ADAPTER / "README.md").write_text(text, encoding="utf-8")
        write_json(folder / SUMMARY, summary)
    if made_up:
        log.warning("no SigLIP folder was given: initialised, and not used by this model, are %s", ", ".join(made_up))
    log.info("exported %d tensors in %s to %s", len(shapes), dtype, output)
    return output


@contextlib.contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A hidden folder that gets the name `output` when the block ends well and is removed when it does not."""
    partial = output.parent / f".{output.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.rename(output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        refusal = disk_refusal(error) or f"{error.strerror or error}; name another folder"
        raise UserError(f"cannot write {output}: {refusal}; nothing was kept") from error


def _check_resolution(model: Model, visual_tokens: int | None) -> None:
    whole, trained = family_of(model).hugging_face.exported(model).visual_tokens, model.visual_tokens
    if visual_tokens not in (None, whole):
        raise UserError(
            f"--visual-tokens {visual_tokens} is no plain LLaVA, which has no pooling: "
            f"the tower has {whole} patches, and an export has them all"
        )
    if visual_tokens is None and trained != whole:
        raise UserError(
            f"a model that pools to {trained} visual tokens is not plain LLaVA, "
            f"which has no pooling: train with visual_tokens={whole} (all patches), or give --visual-tokens "
            f"{whole} to export it so, though its outputs are then not those of the trained model"
        )


def _tokenizer(folder: str | Path, model: Model) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"the tokenizer {folder} has {len(tokenizer)} tokens, the model's vocab_size is {model.vocab_size}"
        )
    return tokenizer


def _unused_reader(folder: str | Path, model: Model) -> Callable[[UnusedTensor], np.ndarray]:
    """Reads a SigLIP folder's tensors by our keys."""
    hf = family_of(model).hugging_face
    unused = hf.unused(model)
    (part,) = {tensor.key.partition(".")[0] for tensor in unused} or {model.PARTS[0]}
    architecture, _ = read_architecture(folder, hf.sources[part])
    weights = WeightsFolder(folder)
    file_keys = {names.to_our_key(key, hf.spellings[architecture]): key for key in weights.found}
    wanted = {tensor.key: tensor.shape for tensor in unused}
    found = {key: weights.found[file_keys[key]] for key in wanted if key in file_keys}
    names.raise_all(names.differences(found, wanted, names.FLOATS), str(folder))
    return lambda tensor: weights.read(file_keys[tensor.key])


def _stream(
    leaves: Mapping[str, Any],
    tensors: tuple[names.Tensor, ...],
    unused: tuple[UnusedTensor, ...],
    read_unused: Callable[[UnusedTensor], np.ndarray],
    to_file_key: Callable[[str], str],
) -> Iterator[tuple[str, np.ndarray]]:
    """(file key, array) in the announced order; one leaf, or those that share tensors, is on the host at a time."""
    held: dict[str, np.ndarray] = {}
    for key, pieces in names.by_key(tensors).items():
        paths = {tensor.leaf for tensor in pieces}
        if held.keys() != paths:
            held.clear()  # before the next ones are read
            held = {path: np.asarray(leaves[path]) for path in paths}
        theirs = [t.weight.to_key(held[t.leaf] if t.layer is None else held[t.leaf][t.layer]) for t in pieces]
        yield to_file_key(key), np.concatenate(theirs) if len(theirs) > 1 else theirs[0]
    for extra in unused:
        yield to_file_key(extra.key), read_unused(extra)


def _initialised(tensor: UnusedTensor) -> np.ndarray:
    """Norms are the identity, biases 0, matrices small and fixed: never used, but sane where someone looks."""
    if tensor.key.endswith(".bias"):
        return np.zeros(tensor.shape, np.float32)
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32)
    return np.random.default_rng(0).normal(0, 0.02, tensor.shape).astype(np.float32)
