"""Our parameters as a folder that `LlavaForConditionalGeneration` and `AutoProcessor` load."""

from __future__ import annotations

import contextlib
import dataclasses
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


class Export:
    """Parameters with what an export adds to them, checked; `write` makes a Hugging Face folder of them.

    What our tower does not hold (InfiMed's: the blocks after the feature layer, the final norm, the pooling head) comes
    from `source_vision`, a folder as published; without it these are initialised, and the log and the card say so: a
    tower is written whole, so that no reader misses a key. With `lora`, `params` has its adapters as leaves: they go to
    the folder's `adapter` in PEFT's layout, and the rest is what they adapt.

    A model that pools cannot be plain LLaVA: UserError, unless `visual_tokens` asks for all patches. UserError too
    where the parameters or the tokenizer do not fit `model`.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        model: Model,
        tokenizer_folder: str | Path,
        *,
        source_vision: str | Path | None = None,
        visual_tokens: int | None = None,
        lora: Lora | None = None,
    ) -> None:
        _check_resolution(model, visual_tokens)
        self.model, self.source, self.lora = model, source_vision, lora
        self._leaves = flatten(dict(params))
        self._adapters = take_adapters(self._leaves, model) if lora else {}
        names.check_leaves(self._leaves, model)
        self._tokenizer_folder, self._tokenizer = tokenizer_folder, _tokenizer(tokenizer_folder, model)
        self._hf = family_of(model).hugging_face
        self._unused = self._hf.unused(model)
        self._read_unused = _unused_reader(source_vision, model) if source_vision else _initialised

    def write(
        self,
        output: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        card: Card | None = None,
        max_positions: int = MAX_POSITIONS,
        shard_bytes: int = SHARD_BYTES,
        on_progress: Report | None = None,
    ) -> Path:
        """Write the folder, which appears under its name only when it is complete, and return its path.

        Leaves are asked for one at a time, so `open_params`' pass through whatever their size; `on_progress(bytes,
        total)` after each tensor. The folder holds export.json, what was done, beside transformers' own files.
        UserError where it exists, and where the disk is full.
        """
        output, card, model, hf = Path(output), card or Card(), self.model, self._hf
        if output.exists():
            raise UserError(f"{output} exists already: remove it or choose another folder")
        made_up = [] if self.source else names.by_module(self._file_key(tensor.key) for tensor in self._unused)
        shapes = {self._file_key(t.key): t.key_shape for t in names.tensors(model)}
        shapes |= {self._file_key(tensor.key): tensor.shape for tensor in self._unused}
        parameters = sum(math.prod(shape) for shape in shapes.values())
        text = render_card(card, model, dtype=dtype, parameters=parameters, made_up=made_up, adapter=self.lora)
        adapter = {"rank": self.lora.rank, "alpha": self.lora.alpha} if self.lora else None
        summary = {
            "dtype": dtype,
            "tensors": len(shapes),
            "parameters": parameters,
            "trained_visual_tokens": model.visual_tokens,
            "exported_visual_tokens": hf.exported(model).visual_tokens,
            "source_vision": str(self.source) if self.source else None,
            "initialised": made_up,
            "adapter": adapter | {"tensors": len(self._adapters)} if adapter else None,
            "card": dataclasses.asdict(card),
            "licence": licence(card),
        }
        tokenizer = self._tokenizer
        special = SpecialTokens(tokenizer.image_pad, tokenizer.im_end, tokenizer.endoftext)
        banned = tokenizer.unsampled(model.vocab_size)
        with _whole_or_nothing(output) as folder:
            # First: a tokenizer without a template costs no minutes.
            write_processor(self._tokenizer_folder, model, folder)
            write_weights(folder, self._stream(), shapes, dtype, shard_bytes, on_progress)
            write_json(folder / "config.json", hf.to_hf(model, special, dtype, max_positions))
            settings = generation_config(tokenizer.stop_tokens, tokenizer.endoftext, banned)
            write_json(folder / "generation_config.json", settings)
            (folder / "README.md").write_text(text, encoding="utf-8")
            if self.lora:
                write_adapter(folder / ADAPTER, self._adapters, self.lora, model, output)
                (folder / ADAPTER / "README.md").write_text(text, encoding="utf-8")
            write_json(folder / SUMMARY, summary)
        if made_up:
            unused = ", ".join(made_up)
            log.warning("no SigLIP folder was given: initialised, and not used by this model, are %s", unused)
        log.info("exported %d tensors in %s to %s", len(shapes), dtype, output)
        return output

    def _file_key(self, key: str) -> str:
        return names.to_file_key(key, self._hf.spellings[self._hf.architecture])

    def _stream(self) -> Iterator[tuple[str, np.ndarray]]:
        """(file key, array) in the announced order; one leaf, or those that share tensors, is on the host at a time."""
        held: dict[str, np.ndarray] = {}
        for key, pieces in names.by_key(names.tensors(self.model)).items():
            paths = {tensor.leaf for tensor in pieces}
            if held.keys() != paths:
                held, theirs = {}, []  # before the next ones are read
                held = {path: np.asarray(self._leaves[path]) for path in paths}
            theirs = [t.weight.to_key(held[t.leaf] if t.layer is None else held[t.leaf][t.layer]) for t in pieces]
            yield self._file_key(key), np.concatenate(theirs) if len(theirs) > 1 else theirs[0]
        for extra in self._unused:
            yield self._file_key(extra.key), self._read_unused(extra)


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


def _initialised(tensor: UnusedTensor) -> np.ndarray:
    """Norms are the identity, biases 0, matrices small and fixed: never used, but sane where someone looks."""
    if tensor.key.endswith(".bias"):
        return np.zeros(tensor.shape, np.float32)
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32)
    return np.random.default_rng(0).normal(0, 0.02, tensor.shape).astype(np.float32)
