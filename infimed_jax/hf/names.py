"""The one two-way name table between our parameters and Hugging Face's: Qwen3ForCausalLM, SigLIP, LLaVA.

A row gives a leaf of our tree, its key, both shapes and the axes' order; import and export both read it, so neither
can know a name that the other does not. Matching is strict: every tensor of a source matches exactly one row or one
named reason to leave it out, every leaf is set once, and all that is wrong is said in one error.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from infimed_jax.config import Model
from infimed_jax.errors import UserError

FLOATS = ("F32", "BF16", "F16")
"""Safetensors types that a weight may have."""

AS_IS = ()
LINEAR = (1, 0)  # torch keeps [out, in], we keep [in, out]
CONVOLUTION = (2, 3, 1, 0)  # torch keeps [out, channels, height, width], we keep [height, width, channels, out]


class Row(NamedTuple):
    """`shape` and `key_shape` name dimensions (see `_dimensions`); `{layer}` rows are stacked on axis 0 of the leaf."""

    leaf: str
    shape: str
    key: str
    key_shape: str
    axes: tuple[int, ...] = AS_IS


def _linear(leaf: str, key: str, into: str, out: str, *, bias: bool = False) -> tuple[Row, ...]:
    """A linear layer; `N H` on our side is one axis `N*H` on theirs."""
    flat_in, flat_out = into.replace(" ", "*"), out.replace(" ", "*")
    kernel = Row(f"{leaf}/kernel", f"{into} {out}", f"{key}.weight", f"{flat_out} {flat_in}", LINEAR)
    return (kernel, Row(f"{leaf}/bias", out, f"{key}.bias", flat_out)) if bias else (kernel,)


def _layer_norm(leaf: str, key: str) -> tuple[Row, ...]:
    return Row(f"{leaf}/scale", "E", f"{key}.weight", "E"), Row(f"{leaf}/bias", "E", f"{key}.bias", "E")


_VISION_BLOCK = "vision/blocks", "vision.encoder.layers.{layer}"
_TEXT_LAYER = "text/layers", "text.layers.{layer}"


def _vision_block(leaf: str, key: str) -> tuple[Row, ...]:
    return (
        *_layer_norm(f"{leaf}/layer_norm1", f"{key}.layer_norm1"),
        *_linear(f"{leaf}/self_attn/q_proj", f"{key}.self_attn.q_proj", "E", "A X", bias=True),
        *_linear(f"{leaf}/self_attn/k_proj", f"{key}.self_attn.k_proj", "E", "A X", bias=True),
        *_linear(f"{leaf}/self_attn/v_proj", f"{key}.self_attn.v_proj", "E", "A X", bias=True),
        *_linear(f"{leaf}/self_attn/out_proj", f"{key}.self_attn.out_proj", "A X", "E", bias=True),
        *_layer_norm(f"{leaf}/layer_norm2", f"{key}.layer_norm2"),
        *_linear(f"{leaf}/mlp/fc1", f"{key}.mlp.fc1", "E", "G", bias=True),
        *_linear(f"{leaf}/mlp/fc2", f"{key}.mlp.fc2", "G", "E", bias=True),
    )


def _text_layer(leaf: str, key: str) -> tuple[Row, ...]:
    return (
        Row(f"{leaf}/input_layernorm/scale", "D", f"{key}.input_layernorm.weight", "D"),
        *_linear(f"{leaf}/self_attn/q_proj", f"{key}.self_attn.q_proj", "D", "N H"),
        *_linear(f"{leaf}/self_attn/k_proj", f"{key}.self_attn.k_proj", "D", "K H"),
        *_linear(f"{leaf}/self_attn/v_proj", f"{key}.self_attn.v_proj", "D", "K H"),
        Row(f"{leaf}/self_attn/q_norm/scale", "H", f"{key}.self_attn.q_norm.weight", "H"),
        Row(f"{leaf}/self_attn/k_norm/scale", "H", f"{key}.self_attn.k_norm.weight", "H"),
        *_linear(f"{leaf}/self_attn/o_proj", f"{key}.self_attn.o_proj", "N H", "D"),
        Row(f"{leaf}/post_attention_layernorm/scale", "D", f"{key}.post_attention_layernorm.weight", "D"),
        *_linear(f"{leaf}/mlp/gate_proj", f"{key}.mlp.gate_proj", "D", "F"),
        *_linear(f"{leaf}/mlp/up_proj", f"{key}.mlp.up_proj", "D", "F"),
        *_linear(f"{leaf}/mlp/down_proj", f"{key}.mlp.down_proj", "F", "D"),
    )


ROWS: tuple[Row, ...] = (
    Row("vision/patch_embedding/kernel", "S*S*C E", "vision.embeddings.patch_embedding.weight", "E C S S", CONVOLUTION),
    Row("vision/patch_embedding/bias", "E", "vision.embeddings.patch_embedding.bias", "E"),
    Row("vision/position_embedding", "P E", "vision.embeddings.position_embedding.weight", "P E"),
    *_vision_block(*_VISION_BLOCK),
    *_linear("projector/linear_1", "projector.linear_1", "E", "D", bias=True),
    *_linear("projector/linear_2", "projector.linear_2", "D", "D", bias=True),
    Row("text/embed_tokens", "V D", "text.embed_tokens.weight", "V D"),
    *_text_layer(*_TEXT_LAYER),
    Row("text/norm/scale", "D", "text.norm.weight", "D"),
)
UNTIED_ROW = Row("text/lm_head", "D V", "text.lm_head.weight", "V D", LINEAR)
"""Only where embeddings are not tied."""

_POST_NORM = "the final norm follows the feature layer"
_HEAD = "the pooling head is not part of the feature"
SPARE_ROWS: tuple[tuple[str, str, str], ...] = (
    ("vision.post_layernorm.weight", "E", _POST_NORM),
    ("vision.post_layernorm.bias", "E", _POST_NORM),
    ("vision.head.probe", "1 1 E", _HEAD),
    ("vision.head.attention.in_proj_weight", "3*E E", _HEAD),
    ("vision.head.attention.in_proj_bias", "3*E", _HEAD),
    ("vision.head.attention.out_proj.weight", "E E", _HEAD),
    ("vision.head.attention.out_proj.bias", "E", _HEAD),
    ("vision.head.layernorm.weight", "E", _HEAD),
    ("vision.head.layernorm.bias", "E", _HEAD),
    ("vision.head.mlp.fc1.weight", "G E", _HEAD),
    ("vision.head.mlp.fc1.bias", "G", _HEAD),
    ("vision.head.mlp.fc2.weight", "E G", _HEAD),
    ("vision.head.mlp.fc2.bias", "E", _HEAD),
)
"""(key, shape, reason): tensors of Hugging Face's tower that ours does not hold, besides the blocks that never run."""

OTHER_DROPPED: tuple[tuple[str, str], ...] = (
    (r"siglip_text\..+", "SigLIP's text tower and its logit scale are not used"),
    (r"vision\.embeddings\.position_ids", "a constant buffer of older releases"),
    (r"text\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a constant buffer of older releases"),
)
"""(pattern, reason)."""

_SIGLIP = {
    "siglip_text.": ("text_model.",),
    "siglip_text.logit_": ("logit_",),
    "vision.": ("vision_model.", ""),
}
SPELLINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "Qwen3ForCausalLM": {"text.": ("model.",), "text.lm_head.": ("lm_head.",)},
    "SiglipModel": _SIGLIP,
    "SiglipVisionModel": _SIGLIP,
    "LlavaForConditionalGeneration": {
        "text.": ("language_model.model.", "model.language_model."),
        "text.lm_head.": ("language_model.lm_head.", "lm_head."),
        "vision.": (
            "vision_tower.vision_model.",
            "vision_tower.",
            "model.vision_tower.vision_model.",
            "model.vision_tower.",
        ),
        "projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    },
}
"""How each architecture's files begin their keys, by our beginning. All are read; the first is written: for LLaVA the
spelling of the published checkpoints, which transformers 4 and 5 and the serving engines all read."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model: a leaf, or one layer of a stacked leaf, and what it is called and shaped on each side."""

    leaf: str
    layer: int | None
    key: str
    """With our beginning (`vision.`, `projector.`, `text.`); `spell` gives the key in a file."""
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    axes: tuple[int, ...]

    def to_key(self, ours: np.ndarray) -> np.ndarray:
        """Hugging Face's tensor from ours (without the layer axis); exact inverse of `to_leaf`."""
        _check(self.leaf, ours.shape, self.shape)
        if not self.axes:
            return ours.reshape(self.key_shape)
        permuted = ours.reshape([self.key_shape[axis] for axis in self.axes])
        theirs = permuted.transpose(np.argsort(self.axes))
        _check(self.key, theirs.shape, self.key_shape)
        return theirs

    def to_leaf(self, theirs: np.ndarray) -> np.ndarray:
        """Ours (without the layer axis) from Hugging Face's."""
        _check(self.key, theirs.shape, self.key_shape)
        ours = (theirs.transpose(self.axes) if self.axes else theirs).reshape(self.shape)
        _check(self.leaf, ours.shape, self.shape)
        return ours


@dataclass(frozen=True)
class Spare:
    """A tensor that Hugging Face's tower has and ours has not."""

    key: str
    shape: tuple[int, ...]
    reason: str


def tensors(model: Model) -> tuple[Tensor, ...]:
    """Every tensor of `model`, in the table's order: the layers of a leaf follow each other."""
    sizes = _dimensions(model)
    blocks = {"vision": model.vision.num_blocks, "text": model.text.num_layers}
    rows = ROWS if model.text.tie_embeddings else (*ROWS, UNTIED_ROW)
    result = []
    for row in rows:
        stacked = "{layer}" in row.key
        for layer in range(blocks[row.leaf.partition("/")[0]]) if stacked else (None,):
            key = row.key.format(layer=layer)
            result.append(
                Tensor(row.leaf, layer, key, _shape(row.shape, sizes), _shape(row.key_shape, sizes), row.axes)
            )
    return tuple(result)


def leaf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Path → shape of every leaf, layer axis included; equal to the shapes of `init_params`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors(model):
        shapes[tensor.leaf] = tensor.shape if tensor.layer is None else (tensor.layer + 1, *tensor.shape)
    return shapes


def spares(model: Model) -> tuple[Spare, ...]:
    """What a full SigLIP tower has beyond ours: the blocks after the feature layer, the final norm, the head."""
    sizes = _dimensions(model)
    reason = f"blocks from {model.vision.num_blocks} on follow the feature layer {model.vision.feature_layer}"
    blocks = [
        Spare(row.key.format(layer=layer), _shape(row.key_shape, sizes), reason)
        for layer in range(model.vision.num_blocks, model.vision.num_layers)
        for row in _vision_block(*_VISION_BLOCK)
    ]
    return (*blocks, *(Spare(key, _shape(shape, sizes), why) for key, shape, why in SPARE_ROWS))


def spell(key: str, architecture: str) -> str:
    """The key as a file of `architecture` is written."""
    beginnings = SPELLINGS[architecture]
    ours = max((beginning for beginning in beginnings if key.startswith(beginning)), key=len)
    return beginnings[ours][0] + key[len(ours) :]


def read_spelling(file_key: str, architecture: str) -> str | None:
    """Our key for a file's key; None where the architecture has no such beginning."""
    pairs = [(theirs, ours) for ours, spellings in SPELLINGS[architecture].items() for theirs in spellings]
    matching = [(theirs, ours) for theirs, ours in pairs if file_key.startswith(theirs)]
    if not matching:
        return None
    theirs, ours = max(matching, key=lambda pair: len(pair[0]))
    return ours + file_key[len(theirs) :]


def dropped(model: Model) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Keys that a source may hold and the model does not use, with the reason."""
    exact = tuple((re.compile(re.escape(spare.key)), spare.reason) for spare in spares(model))
    patterns = tuple((re.compile(pattern), reason) for pattern, reason in OTHER_DROPPED)
    tied = ((re.compile(re.escape(UNTIED_ROW.key)), TIED),) if model.text.tie_embeddings else ()
    return (*exact, *patterns, *tied)


TIED = "embeddings are tied: the output matrix is a copy of the embedding"


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
    wanted = {t.key: t for t in tensors(model) if t.leaf.partition("/")[0] in parts}
    out = dropped(model)
    sources: dict[Tensor, str] = {}
    left_out: dict[str, str] = {}
    twice: dict[str, str] = {}
    for file_key in sorted(found):
        key = read_spelling(file_key, architecture) or ""
        if tensor := wanted.get(key):
            if tensor in sources:
                twice[file_key] = f"{sources[tensor]} and {file_key}"
            else:
                sources[tensor] = file_key
        elif reasons := [reason for pattern, reason in out if pattern.fullmatch(key)]:
            left_out[file_key] = reasons[0]
    used = {key: tensor for key, tensor in found.items() if key not in left_out and key not in twice}
    shapes = {sources.get(tensor) or spell(key, architecture): tensor.key_shape for key, tensor in wanted.items()}
    raise_all({"given twice": list(twice.values())} | differences(used, shapes, FLOATS), where)
    return Match(sources, left_out)


def check_leaves(leaves: Mapping[str, Any], model: Model) -> None:
    """UserError unless `leaves` (by path, as `text/norm/scale`) are exactly `model`'s, in float32 or bfloat16."""
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
    """Spare tensors by the module they belong to: `….layers.26.*`, `….post_layernorm.*`, `….head.*`."""
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


def _dimensions(model: Model) -> dict[str, int]:
    """The table's letters; for vision E is the width, G the feed-forward, A heads of X, P patches, S a patch's side."""
    vision, text = model.vision, model.text
    return {
        "V": text.vocab_size,
        "D": text.hidden_size,
        "F": text.intermediate_size,
        "N": text.num_heads,
        "K": text.num_kv_heads,
        "H": text.head_dim,
        "E": vision.hidden_size,
        "G": vision.intermediate_size,
        "A": vision.num_heads,
        "X": vision.hidden_size // vision.num_heads,
        "P": vision.num_patches,
        "S": vision.patch_size,
        "C": 3,
        "3": 3,
        "1": 1,
    }


def _shape(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`"N*H D"` → (N·H, D)."""
    return tuple(math.prod(sizes[letter] for letter in axis.split("*")) for axis in letters.split())


def _check(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(shape) != wanted:
        raise UserError(f"{name} has shape {list(shape)} instead of {list(wanted)}")
