"""Our parameters' tensors in Hugging Face's files.

Names and layouts come from the family's table of weights; import and export both read it, so neither can know a name
that the other does not. Matching is strict: every tensor of a source matches exactly one weight or one named reason to
leave it out, every leaf is set once, and one error names everything that is wrong.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from infimed_jax.config import Model
from infimed_jax.errors import UserError
from infimed_jax.models.family import family_of, weights
from infimed_jax.models.weights import Weight

FLOATS = ("F32", "BF16", "F16")
"""Safetensors types that a weight may have."""


@dataclass(frozen=True)
class Tensor:
    """A leaf, or one layer of a stacked leaf, as a tensor of Hugging Face's or as a piece of one."""

    weight: Weight
    layer: int | None

    @property
    def leaf(self) -> str:
        return self.weight.path

    @property
    def key(self) -> str:
        """With our beginning, such as `text.`; `to_file_key` gives the key in a file."""
        return self.weight.key.format(layer=self.layer)

    @property
    def key_shape(self) -> tuple[int, ...]:
        return self.weight.key_shape


def tensors(model: Model) -> tuple[Tensor, ...]:
    """Every tensor of `model`, in the table's order: the layers of a leaf follow each other."""
    return tuple(
        Tensor(weight, layer)
        for weight in weights(model)
        for layer in (range(weight.layers) if weight.layers else (None,))
    )


def by_key(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Key → what stands in that tensor, in its order there: one, or several pieces."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.key, []).append(tensor)
    return {key: sorted(group, key=lambda tensor: tensor.weight.piece) for key, group in groups.items()}


def leaf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Path → shape of every leaf, layer axis included; equal to the shapes of `init_params`."""
    return {weight.path: weight.leaf_shape for weight in weights(model)}


def to_file_key(key: str, spellings: Mapping[str, tuple[str, ...]]) -> str:
    """The key as a file of the architecture with these `spellings` is written."""
    ours = max((beginning for beginning in spellings if key.startswith(beginning)), key=len)
    return spellings[ours][0] + key[len(ours) :]


def to_our_key(file_key: str, spellings: Mapping[str, tuple[str, ...]]) -> str | None:
    """Our key for a file's key; None where the architecture has no such beginning."""
    pairs = [(theirs, ours) for ours, beginnings in spellings.items() for theirs in beginnings]
    matching = [(theirs, ours) for theirs, ours in pairs if file_key.startswith(theirs)]
    if not matching:
        return None
    theirs, ours = max(matching, key=lambda pair: len(pair[0]))
    return ours + file_key[len(theirs) :]


def dropped(model: Model) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Keys that a source may hold and the model does not use, with the reason."""
    hf = family_of(model).hugging_face
    exact = tuple((re.compile(re.escape(tensor.key)), tensor.reason) for tensor in hf.unused(model))
    return (*exact, *((re.compile(pattern), reason) for pattern, reason in hf.dropped(model)))


class Found(NamedTuple):
    """A tensor as a source declares it."""

    shape: tuple[int, ...]
    dtype: str
    """Its source's name for it: `F32`, `BF16`, … in safetensors."""


@dataclass(frozen=True)
class Match:
    sources: dict[Tensor, str]
    """The file's key of each tensor of the model."""
    dropped: dict[str, str]
    """The file's keys that are left out, with the reason."""


def match(found: Mapping[str, Found], architecture: str, model: Model, parts: Iterable[str], where: str) -> Match:
    """Pair every tensor of `model`'s `parts` with one of `found`; UserError names everything that does not fit."""
    parts = tuple(parts)
    layers = max(weight.layers for weight in weights(model) if weight.part in parts)
    if layers > len(found):  # before a name is made for each
        raise UserError(f"{where}: its settings say {layers:,} layers, and its weights are {len(found):,} tensors")
    wanted = by_key(t for t in tensors(model) if t.weight.part in parts)
    out, spellings = dropped(model), family_of(model).hugging_face.spellings[architecture]
    sources: dict[Tensor, str] = {}
    left_out: dict[str, str] = {}
    twice: dict[str, str] = {}
    for file_key in sorted(found):
        key = to_our_key(file_key, spellings) or ""
        if pieces := wanted.get(key):
            if pieces[0] in sources:
                twice[file_key] = f"{sources[pieces[0]]} and {file_key}"
            else:
                sources |= dict.fromkeys(pieces, file_key)
        elif reasons := [reason for pattern, reason in out if pattern.fullmatch(key)]:
            left_out[file_key] = reasons[0]
    used = {key: tensor for key, tensor in found.items() if key not in left_out and key not in twice}
    shapes = {sources.get(t[0]) or to_file_key(key, spellings): t[0].key_shape for key, t in wanted.items()}
    raise_all({"given twice": list(twice.values())} | differences(used, shapes, FLOATS), where)
    return Match(sources, left_out)


def check_leaves(leaves: Mapping[str, Any], model: Model) -> None:
    """UserError unless `leaves` (by path, as `text.norm.scale`) are exactly `model`'s, in float32 or bfloat16."""
    found = {path: Found(tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves.items()}
    raise_all(differences(found, leaf_shapes(model), ("float32", "bfloat16")), "the tree of parameters")


def differences(
    found: Mapping[str, Found], wanted: Mapping[str, tuple[int, ...]], types: tuple[str, ...]
) -> dict[str, list[str]]:
    """What is wrong → the names of all that it is true of."""
    both = [(name, *tensor) for name, tensor in sorted(found.items()) if name in wanted]
    return {
        "not known": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {list(shape)} instead of {list(wanted[name])}"
            for name, shape, _ in both
            if tuple(shape) != wanted[name]
        ],
        "of another type": [
            f"{name} {dtype} instead of {'/'.join(types)}" for name, _, dtype in both if dtype not in types
        ],
        "missing": [name for name in wanted if name not in found],
    }


def raise_all(wrong: Mapping[str, list[str]], where: str) -> None:
    if not any(wrong.values()):
        return
    parts = [f"{len(names)} {what}: {', '.join(by_layer(names))}" for what, names in wrong.items() if names]
    raise UserError(f"{where} does not fit the model: {'; '.join(parts)}")


def by_layer(names: Iterable[str]) -> list[str]:
    """`layers.0.b, layers.1.b, layers.5.b` as `layers.{0-1,5}.b`, so that every name fits one line."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name in names:
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer:
            groups[name[: layer.start(1)], name[layer.end(1) :]].append(int(layer[1]))
        else:
            groups[name, ""] = []
    return [" ".join(f"{head}{_ranges(layers)}{tail}".split()) for (head, tail), layers in groups.items()]


def by_module(names: Iterable[str]) -> list[str]:
    """Unused tensors by the module they belong to: `….layers.26.*`, `….post_layernorm.*`, `….head.*`."""
    modules = (re.sub(r"(layers\.\d+|post_layernorm|head)\..*", r"\1.*", name) for name in names)
    return list(dict.fromkeys(modules))


def _ranges(numbers: list[int]) -> str:
    """`0, 1, 5` as `{0-1,5}`; one number stays bare, none is empty."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    spans = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return "".join(spans) if len(numbers) < 2 else f"{{{','.join(spans)}}}"
