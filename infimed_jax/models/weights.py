"""A weight is declared once: its shape, its placement, its first values and its tensor in Hugging Face's files.

A family's table of weights is all that initialisation, shardings, adapters, parameter counts, conversion, FLOPs, bytes
and collectives know of a model's inside.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from infimed_jax.errors import UserError
from infimed_jax.sharding import LogicalAxes

Initializer = Callable[[jax.Array, tuple[int, ...], int], jax.Array]
"""(key, shape, number of inputs) to float32 values."""

Per = Literal["", "token", "patch", "visual token"]


def zeros(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    return jnp.zeros(shape)


def ones(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    return jnp.ones(shape)


def normal(deviation: float) -> Initializer:
    return lambda key, shape, inputs: deviation * jax.random.normal(key, shape)


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    """LeCun's normal distribution, of variance 1/inputs."""
    return jax.random.normal(key, shape) / math.sqrt(inputs)


normal_002 = normal(0.02)
"""Hugging Face's initialisation of Qwen3 and of a LLaVA projector, residual branches included."""


@dataclass(frozen=True)
class Weight:
    """One leaf of the parameter tree. Shapes are letters, one a dimension, whose sizes `sized` fills in."""

    path: str
    """`text.layers.self_attn.q_proj.kernel`; its first name is the part that `train.train` names."""
    letters: str
    """Shape of one layer: `D N H`."""
    axes: LogicalAxes
    """Logical axis of each dimension, which decides its placement."""
    init: Initializer
    key: str
    """Its tensor in Hugging Face's files, with the family's own beginning; `{layer}` where the leaf is a stack."""
    key_letters: str
    """That tensor's shape; `N*H` is one dimension of N * H. Of our piece of it, where it holds several weights."""
    order: tuple[int, ...] = ()
    """Which dimension of the tensor each of ours comes from, where they differ: (1, 0) is a transposition."""
    pieces: tuple[str, ...] = ()
    """Letters of axis 0 of each weight in a tensor that holds several, such as a fused projection to q, k and v."""
    piece: int = 0
    """Which of them ours is."""
    inputs: int = 0
    """Leading dimensions that a product contracts; 0 for what is no matrix of a product."""
    per: Per = ""
    """What the product is computed for."""
    role: Literal["", "table", "head"] = ""
    """The embedding, which tokens look up, and the output layer where it is not the transposed embedding."""
    split_input: bool = False
    """Whether it meets activations that `tensor` splits without being split itself, as a norm of each head's width."""
    float32: bool = False
    """Used in float32 whatever the compute dtype, as norms are."""
    layers: int = 0
    """Layers stacked on axis 0 of the leaf; 0 for a leaf of its own."""
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def part(self) -> str:
        return self.path.partition(".")[0]

    @property
    def name(self) -> str:
        """The last name: `kernel`, `bias`, `scale`, …"""
        return self.path.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The name of the layer that holds it: `q_proj`."""
        return self.holder.rpartition(".")[2]

    @property
    def holder(self) -> str:
        """That layer's path: `text.layers.self_attn.q_proj`."""
        return self.path.rpartition(".")[0]

    @property
    def block(self) -> str:
        """The path of what holds that layer: `text.layers.self_attn`."""
        return self.holder.rpartition(".")[0]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one layer."""
        return shape_of(self.letters, dict(self.sizes))

    @functools.cached_property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of our piece of Hugging Face's tensor."""
        return shape_of(self.key_letters, dict(self.sizes))

    @functools.cached_property
    def key_shape(self) -> tuple[int, ...]:
        """Shape of Hugging Face's tensor."""
        rows = sum(self._piece_rows) if self.pieces else self.piece_shape[0]
        return (rows, *self.piece_shape[1:])

    @property
    def _piece_rows(self) -> tuple[int, ...]:
        return shape_of(" ".join(self.pieces), dict(self.sizes))

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The stack's axis included."""
        return (self.layers, *self.shape) if self.layers else self.shape

    @property
    def leaf_axes(self) -> LogicalAxes:
        return (None, *self.axes) if self.layers else self.axes

    @property
    def fan_in(self) -> int:
        return math.prod(self.shape[: self.inputs])

    @property
    def fan_out(self) -> int:
        return math.prod(self.shape[self.inputs :])

    @property
    def size(self) -> int:
        return math.prod(self.leaf_shape)

    @property
    def splits_inputs(self) -> bool:
        """Whether `tensor` divides the contracted dimensions, so that each device has a part of the sum."""
        return bool(set(self.axes[: self.inputs]) & {"heads", "mlp", "vocab"})

    @property
    def splits_outputs(self) -> bool:
        return bool(set(self.axes[self.inputs :]) & {"heads", "mlp", "vocab"})

    def to_key(self, ours: np.ndarray) -> np.ndarray:
        """Hugging Face's tensor, or our piece of it, from one layer of ours; exact inverse of `to_leaf`."""
        _check(self.path, ours.shape, self.shape)
        if not self.order:
            return ours.reshape(self.piece_shape)
        permuted = ours.reshape([self.piece_shape[axis] for axis in self.order])
        theirs = permuted.transpose(np.argsort(self.order))
        _check(self.key, theirs.shape, self.piece_shape)
        return theirs

    def to_leaf(self, theirs: np.ndarray) -> np.ndarray:
        """One layer of ours from Hugging Face's whole tensor."""
        _check(self.key, theirs.shape, self.key_shape)
        if self.pieces:
            start = sum(self._piece_rows[: self.piece])
            theirs = theirs[start : start + self.piece_shape[0]]
        ours = (theirs.transpose(self.order) if self.order else theirs).reshape(self.shape)
        _check(self.path, ours.shape, self.shape)
        return ours


@dataclass(frozen=True)
class Unweighted:
    """A product of activations alone, or with a constant: [rows, inner] x [inner, outer] for one image."""

    part: str
    name: str
    rows: int
    inner: int
    outer: int
    differentiated: str
    """The part of the weights whose learning makes gradients pass through it."""
    operands: int = 1
    """How many of the two are activations."""
    layers: int = 0
    """Layers of the stack that it stands in; 0 outside."""
    split: Literal["rows", ""] = ""
    """The dimension that `tensor` divides."""


def linear(
    path: str,
    key: str,
    shape: str,
    axes: LogicalAxes,
    per: Per,
    *,
    bias: bool = False,
    init: Initializer = normal_002,
) -> tuple[Weight, ...]:
    """The weights of a linear layer of `shape`, such as `D -> N H`; Hugging Face keeps [outputs, inputs] flattened."""
    into, out = (side.split() for side in shape.split("->"))
    flat_in, flat_out = "*".join(into), "*".join(out)
    kernel = Weight(
        path=f"{path}.kernel",
        letters=" ".join(into + out),
        axes=axes,
        init=init,
        key=f"{key}.weight",
        key_letters=f"{flat_out} {flat_in}",
        order=(1, 0),
        inputs=len(into),
        per=per,
    )
    if not bias:
        return (kernel,)
    return kernel, Weight(f"{path}.bias", " ".join(out), axes[len(into) :], zeros, f"{key}.bias", flat_out)


def rms_norm(path: str, key: str, letter: str, *, split_input: bool = False) -> tuple[Weight, ...]:
    name = f"{path}.scale"
    return (Weight(name, letter, (None,), ones, f"{key}.weight", letter, split_input=split_input, float32=True),)


def layer_norm(path: str, key: str, letter: str) -> tuple[Weight, ...]:
    return (
        *rms_norm(path, key, letter),
        Weight(f"{path}.bias", letter, (None,), zeros, f"{key}.bias", letter, float32=True),
    )


def sized(weights: Iterable[Weight], sizes: Mapping[str, int], stacks: Mapping[str, int]) -> tuple[Weight, ...]:
    """The table with the letters' sizes, and the layers of each stack by the beginning of its paths.

    An empty stack has no weights.
    """
    found = []
    for weight in weights:
        layers = [layers for stack, layers in stacks.items() if weight.path.startswith(f"{stack}.")]
        if layers != [0]:
            found.append(replace(weight, sizes=tuple(sizes.items()), layers=layers[0] if layers else 0))
    return tuple(found)


Tree = Mapping[str, Any]
"""Weights as the nested dictionaries of the parameter tree."""


def as_tree(weights: Iterable[Weight]) -> Tree:
    """Modules take their weights from it by name."""
    tree: dict[str, Any] = {}
    for weight in weights:
        node = tree
        *parents, name = weight.path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = weight
    return tree


def shape_of(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`"N*H D"` to (N·H, D); a number stands for itself."""
    size = lambda letter: int(letter) if letter.isdigit() else sizes[letter]  # noqa: E731
    return tuple(math.prod(size(letter) for letter in axis.split("*")) for axis in letters.split())


def _check(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(shape) != wanted:
        raise UserError(f"{name} has shape {list(shape)} instead of {list(wanted)}")
