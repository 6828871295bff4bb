"""Hugging Face folders as our parameters: Qwen3 + SigLIP to start from, or a whole LLaVA export."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.hf import names
from infimed_jax.hf.configuration import (
    LLAVA,
    TEXT,
    VISION,
    llava_from_hf,
    read_architecture,
    text_from_hf,
    vision_from_hf,
)
from infimed_jax.hf.weights import WeightsFolder

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
_NUMPY = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def from_hf(
    *,
    text: str | Path,
    vision: str | Path,
    visual_tokens: int = 729,
    feature_layer: int = -2,
    seed: int = 0,
    dtype: Dtype = "float32",
) -> tuple[dict[str, Any], config.Model]:
    """(parameters, Model) from a Qwen3 and a SigLIP folder, with a fresh projector drawn from `seed`.

    Parameters are NumPy arrays of `dtype` in our tree; sizes, the rope base and the norms' eps come from the folders'
    config.json. UserError names everything that is missing, left over, misshaped or of a wrong type.
    """
    text_architecture, text_values = read_architecture(text, (TEXT,))
    vision_architecture, vision_values = read_architecture(vision, VISION)
    tower = vision_values.get("vision_config", {}) if vision_architecture == "SiglipModel" else vision_values
    model = config.Model(
        vision_from_hf(tower, f"{vision}/config.json", feature_layer),
        config.Projector(visual_tokens=visual_tokens),
        text_from_hf(text_values, f"{text}/config.json"),
    )
    sources = (
        _Source(vision, vision_architecture, model, ("vision",)),
        _Source(text, text_architecture, model, ("text",)),
    )
    leaves = dict(_fresh_projector(model, seed, dtype))
    for source in sources:
        leaves |= dict(source.leaves(dtype))
    return _nested(leaves), model


def from_llava(folder: str | Path, *, dtype: Dtype = "float32") -> tuple[dict[str, Any], config.Model]:
    """(parameters, Model) from a LLaVA folder of SigLIP and Qwen3, such as `to_hf` writes; exact inverse of it."""
    architecture, values = read_architecture(folder, (LLAVA,))
    model = llava_from_hf(values, f"{folder}/config.json")
    source = _Source(folder, architecture, model, ("vision", "projector", "text"))
    return _nested(dict(source.leaves(dtype))), model


class _Source:
    """A folder matched against the table; reads a leaf at a time."""

    def __init__(self, folder: str | Path, architecture: str, model: config.Model, parts: tuple[str, ...]):
        self._weights = WeightsFolder(folder)
        self._match = names.match(self._weights.found, architecture, model, parts, str(folder))
        for reason in sorted(set(self._match.dropped.values())):
            keys = [key for key, why in self._match.dropped.items() if why == reason]
            log.info("left out of %s, %s: %s", folder, reason, ", ".join(names.by_module(keys)))
        self._check_tied_copies(folder)

    def leaves(self, dtype: Dtype) -> Iterator[tuple[str, np.ndarray]]:
        """(path, array); a stacked leaf is allocated once and filled layer by layer."""
        by_leaf: dict[str, list[names.Tensor]] = {}
        for tensor in self._match.sources:
            by_leaf.setdefault(tensor.leaf, []).append(tensor)
        for path, tensors in by_leaf.items():
            stacked = tensors[0].layer is not None
            leaf = np.empty((len(tensors), *tensors[0].shape) if stacked else tensors[0].shape, _NUMPY[dtype])
            for tensor in tensors:
                leaf[tensor.layer if stacked else ...] = tensor.to_leaf(self._read(tensor))
            yield path, leaf

    def _read(self, tensor: names.Tensor) -> np.ndarray:
        return self._weights.read(self._match.sources[tensor])

    def _check_tied_copies(self, folder: str | Path) -> None:
        """A tied model's file may repeat the embedding as lm_head; another matrix there would be lost silently."""
        copies = [key for key, reason in self._match.dropped.items() if reason == names.TIED]
        if not copies:
            return
        embedding = next(self._read(t) for t in self._match.sources if t.leaf == "text/embed_tokens")
        for key in copies:
            if not np.array_equal(self._weights.read(key), embedding):
                raise UserError(f"{folder}: config.json ties the embeddings, but {key} is another matrix")


def _fresh_projector(model: config.Model, seed: int, dtype: Dtype) -> Iterator[tuple[str, np.ndarray]]:
    """As `init_params` draws it: kernels normal with deviation 0.02, biases 0."""
    rng = np.random.default_rng(seed)
    for path, shape in names.leaf_shapes(model).items():
        if path.startswith("projector/"):
            values = np.zeros(shape) if path.endswith("/bias") else rng.normal(0, 0.02, shape)
            yield path, values.astype(_NUMPY[dtype])


def _nested(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return tree
