"""A family's files in Hugging Face's format: how its tensors are named there, and its config.json in both directions.

These are functions of names and values; `infimed_jax.hf` opens the files. Reading a config.json assumes nothing that
changes the numbers: a shape that is not written is an error, and so is a feature that our model does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from infimed_jax.errors import UserError

N = TypeVar("N", int, float)
Values = Mapping[str, Any]
"""What a JSON file of settings holds."""

TIED = "embeddings are tied: the output matrix is a copy of the embedding"


class SpecialTokens(NamedTuple):
    """Ids that a configuration names."""

    image: int
    stop: int
    pad: int


@dataclass(frozen=True)
class UnusedTensor:
    """A tensor that Hugging Face's model has and ours has not; `key` with our beginning."""

    key: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class HuggingFace:
    """Functions take the family's settings, `model`, or a config.json's values and its name for messages, `where`."""

    architecture: str
    """Architecture of an export, as config.json names it."""
    sources: Mapping[str, tuple[str, ...]]
    """Part → architectures of the folders that may give it to `from_parts`; the other parts are drawn afresh."""
    spellings: Mapping[str, Mapping[str, tuple[str, ...]]]
    """How each architecture's files begin their keys, by our beginning. All are read; the first is written."""
    unused: Callable[[Any], tuple[UnusedTensor, ...]]
    """What a whole export has beyond our weights."""
    dropped: Callable[[Any], tuple[tuple[str, str], ...]]
    """(pattern, reason) of other keys that a source may hold and the model does not use."""
    from_hf: Callable[[Values, str], Any]
    """(values, where) to the model of a whole export."""
    to_hf: Callable[[Any, SpecialTokens, str, int], dict[str, Any]]
    """(model, tokens, dtype, max_positions) to an export's config.json."""
    processor: Callable[[Any], Mapping[str, dict[str, Any]]]
    """File name → values of the image processor's settings."""
    exported: Callable[[Any], Any]
    """The model as an export holds it."""
    max_positions: Callable[[Values, str], int]
    """Positions that the language model was made for; it bounds what is served and changes no number of ours."""
    describe: Callable[[Any], list[str]]
    """Lines of the model card: what the model is, what an image becomes."""
    language: str
    """How transformers names the language model below `model.`: PEFT's adapters stand there."""
    features: Mapping[str, tuple[str, Literal["input", "output"]]]
    """Stage of the encoder → the module below transformers' `model.` that takes or gives what the stage makes."""
    pixels: Callable[[Sequence[Any]], np.ndarray]
    """`host_arrays` of a prompt's images as transformers' processor gives them, `pixel_values`."""
    from_parts: Callable[[Mapping[str, tuple[str, Values, str]], int], Any] | None = None
    """({part: (architecture, values, where)}, visual tokens of an image) to a model, where there are `sources`."""
    open_reference: Callable[[Path], tuple[Any, Any]] | None = None
    """(processor, torch model) of an export whose architecture transformers does not know."""


def section(values: Values, where: str, name: str) -> dict[str, Any]:
    """The object under `name`; UserError where there is none."""
    group = values.get(name)
    if not isinstance(group, dict):
        raise UserError(f"{where}: {name} is {'missing' if group is None else f'no group of settings but {group!r}'}")
    return group


def number(values: Values, where: str, name: str, kind: type[N]) -> N:
    """A size, a base or an epsilon: a number above 0."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: {name} must be written as a number, not {value!r}")
    if not math.isfinite(value) or value <= 0 or kind(value) != value:
        raise UserError(f"{where}: {name} must be a {'whole ' if kind is int else ''}number above 0, not {value!r}")
    return kind(value)


def expect(values: Values, where: str, name: str, allowed: tuple[Any, ...], *, absent_is_fine: bool = True) -> None:
    """UserError unless `name` has one of the values `allowed`."""
    if name not in values and absent_is_fine:
        return
    if values.get(name) not in allowed:
        raise UserError(f"{where}: {name} {values.get(name)!r} is not supported, only {', '.join(map(repr, allowed))}")
