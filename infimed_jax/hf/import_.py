"""Hugging Face folders as our parameters: the published parts to start from, or a whole export.

Everything is checked from headers and config.json before a number is read; then the leaves come one at a time, so that
a model larger than the memory passes through.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.hf import names
from infimed_jax.hf.configuration import read_architecture
from infimed_jax.hf.weights import ADAPTER, WeightsFolder
from infimed_jax.models.family import family_named, weights
from infimed_jax.models.hugging_face import TIED
from infimed_jax.models.weights import Weight
from infimed_jax.trees import nest

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
_NUMPY = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Import:
    """Opened and checked folders; `leaves` reads them."""

    model: config.Model
    max_positions: int
    """The text model's max_position_embeddings, for the export."""
    dtype: Dtype
    seed: int
    """Seed of the projector's first values, where it is fresh."""
    _sources: tuple[_Source, ...]

    @property
    def nbytes(self) -> int:
        """Size of all leaves together."""
        return sum(map(math.prod, names.leaf_shapes(self.model).values())) * _NUMPY[self.dtype].itemsize

    @property
    def dropped(self) -> dict[str, list[str]]:
        """Reason → what was left out of the folders, layers and modules gathered."""
        gathered: dict[str, list[str]] = {}
        for source in self._sources:
            for reason, keys in source.dropped.items():
                gathered.setdefault(reason, []).extend(keys)
        return gathered

    @property
    def fresh_projector(self) -> bool:
        return bool(self._fresh_parts)

    @property
    def _fresh_parts(self) -> list[str]:
        given = {part for source in self._sources for part in source.parts}
        return [part for part in self.model.PARTS if part not in given]

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """(`text.norm.scale`, array of `dtype`), each leaf of the model once; one is in memory at a time."""
        for source in self._sources:
            yield from source.leaves(self.dtype)
        for part in self._fresh_parts:
            yield from _fresh(part, self.model, self.seed, self.dtype)

    def params(self) -> dict[str, Any]:
        """All leaves as our tree."""
        return nest(dict(self.leaves()))


def open_parts(
    folders: Mapping[str, str | Path],
    *,
    visual_tokens: int = 729,
    seed: int = 0,
    dtype: Dtype = "float32",
    family: str = "infimed",
) -> Import:
    """A folder for each part of the model that can be read alone; the other parts are drawn from `seed`.

    Sizes and every other number come from the folders' config.json. UserError names everything in all of them
    that is missing, left over, misshaped or of a wrong type.
    """
    hf = family_named(family).hugging_face
    if hf.from_parts is None or folders.keys() != hf.sources.keys():
        needed = " and ".join(hf.sources) or "no part alone: give a whole export"
        raise UserError(f"model.family={family} is read from folders for {needed}")
    read = {part: read_architecture(folders[part], allowed) for part, allowed in hf.sources.items()}
    parts = {part: (*opened, f"{folders[part]}/config.json") for part, opened in read.items()}
    model = dataclasses.replace(hf.from_parts(parts, visual_tokens), family=family)
    sources, faults = [], []
    for part, (architecture, _) in read.items():
        try:
            sources.append(_Source(folders[part], architecture, model, (part,)))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join(faults))
    _, values, where = parts[model.language]
    return Import(model, hf.max_positions(values, where), dtype, seed, tuple(sources))


def open_export(
    folder: str | Path, *, visual_tokens: int | None = None, dtype: Dtype = "float32", family: str = "infimed"
) -> Import:
    """A folder such as `export.Export` writes; exact inverse of it.

    An image has as many visual tokens as the export's own unless `visual_tokens` says otherwise.
    """
    hf = family_named(family).hugging_face
    architecture, values = read_architecture(folder, (hf.architecture,))
    if (Path(folder) / ADAPTER).is_dir():
        raise UserError(
            f"{folder}/{ADAPTER} holds LoRA adapters, which this does not read: export with the adapters merged, or "
            "move that folder away to read what they adapt"
        )
    model = dataclasses.replace(hf.from_hf(values, f"{folder}/config.json"), family=family)
    if visual_tokens is not None:
        model = model.with_visual_tokens(visual_tokens)
    positions = hf.max_positions(values, f"{folder}/config.json")
    return Import(model, positions, dtype, 0, (_Source(folder, architecture, model, model.PARTS),))


class _Source:
    """A folder matched against the table; reads a leaf at a time."""

    def __init__(self, folder: str | Path, architecture: str, model: config.Model, parts: tuple[str, ...]):
        self.parts = parts
        self._weights = WeightsFolder(folder)
        self._match = names.match(self._weights.found, architecture, model, parts, str(folder))
        for reason, keys in self.dropped.items():
            log.info("left out of %s, %s: %s", folder, reason, ", ".join(keys))
        self._check_tied_copies(folder)

    @property
    def dropped(self) -> dict[str, list[str]]:
        """Reason → keys of the folder, gathered by module."""
        keys: Mapping[str, str] = self._match.dropped
        return {
            reason: names.by_module(key for key, why in keys.items() if why == reason)
            for reason in sorted(set(keys.values()))
        }

    def leaves(self, dtype: Dtype) -> Iterator[tuple[str, np.ndarray]]:
        """(path, array); a stacked leaf is allocated once and filled layer by layer."""
        by_leaf: dict[Weight, list[names.Tensor]] = {}
        for tensor in self._match.sources:
            by_leaf.setdefault(tensor.weight, []).append(tensor)
        for weight, tensors in by_leaf.items():
            leaf = np.empty(weight.leaf_shape, _NUMPY[dtype])
            for tensor in tensors:
                leaf[... if tensor.layer is None else tensor.layer] = weight.to_leaf(self._read(tensor))
            yield weight.path, leaf
            del leaf  # before the next one is allocated

    def _read(self, tensor: names.Tensor) -> np.ndarray:
        return self._weights.read(self._match.sources[tensor])

    def _check_tied_copies(self, folder: str | Path) -> None:
        """A tied model's file may repeat the embedding as lm_head; another matrix there would be lost silently."""
        copies = [key for key, reason in self._match.dropped.items() if reason == TIED]
        if not copies:
            return
        embedding = next(self._read(t) for t in self._match.sources if t.weight.role == "table")
        for key in copies:
            if not np.array_equal(self._weights.read(key), embedding):
                raise UserError(f"{folder}: config.json ties the embeddings, but {key} is another matrix")


def _fresh(part: str, model: config.Model, seed: int, dtype: Dtype) -> Iterator[tuple[str, np.ndarray]]:
    """As `init_params` draws a projector: kernels normal with deviation 0.02, biases and norms as declared."""
    rng = np.random.default_rng(seed)
    for weight in weights(model):
        if weight.part == part:
            shape = weight.leaf_shape
            # A bias or a norm begins at the value that it is declared with, which draws nothing.
            values = rng.normal(0, 0.02, shape) if weight.inputs else weight.init(jax.random.key(0), shape, 0)
            yield weight.path, np.asarray(values).astype(_NUMPY[dtype])
