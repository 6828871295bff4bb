"""Our parameters' tensors in Hugging Face's files: Qwen3ForCausalLM, SigLIP, LLaVA.

Names and layouts come from the family's table of weights; import and export both read it, so neither can know a name
that the other does not. Matching is strict: every tensor of a source matches exactly one weight or one named reason to
leave it out, every leaf is set once, and one error names everything that is wrong.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from infimed_jax.config import Model
from infimed_jax.errors import UserError
from infimed_jax.models.infimed.weights import sizes, weights
from infimed_jax.models.weights import Weight, shape_of

FLOATS = ("F32", "BF16", "F16")
"""Safetensors types that a weight may have."""

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

_UNTIED = "text.lm_head.weight"

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
    """One tensor of a model: a leaf, or one layer of a stacked leaf."""

    weight: Weight
    layer: int | None

    @property
    def leaf(self) -> str:
        return self.weight.path

    @property
    def key(self) -> str:
        """With our beginning (`vision.`, `projector.`, `text.`); `spell` gives the key in a file."""
        return self.weight.key.format(layer=self.layer)

    @property
    def key_shape(self) -> tuple[int, ...]:
        return self.weight.key_shape


@dataclass(frozen=True)
class Spare:
    """A tensor that Hugging Face's tower has and ours has not."""

    key: str
    shape: tuple[int, ...]
    reason: str


def tensors(model: Model) -> tuple[Tensor, ...]:
    """Every tensor of `model`, in the table's order: the layers of a leaf follow each other."""
    return tuple(
        Tensor(weight, layer)
        for weight in weights(model)
        for layer in (range(weight.layers) if weight.layers else (None,))
    )


def leaf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Path → shape of every leaf, layer axis included; equal to the shapes of `init_params`."""
    return {weight.path: weight.leaf_shape for weight in weights(model)}


def spares(model: Model) -> tuple[Spare, ...]:
    """What a full SigLIP tower has beyond ours: the blocks after the feature layer, the final norm, the head."""
    letters = sizes(model)
    running = model.vision.num_blocks
    reason = f"blocks from {running} on follow the feature layer {model.vision.feature_layer}"
    whole = replace(model, vision=replace(model.vision, feature_layer=-1))
    blocks = [
        Spare(weight.key.format(layer=layer), weight.key_shape, reason)
        for layer in range(running, model.vision.num_layers)
        for weight in weights(whole)
        if weight.path.startswith("vision.blocks.")
    ]
    return (*blocks, *(Spare(key, shape_of(shape, letters), why) for key, shape, why in SPARE_ROWS))


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
    tied = ((re.compile(re.escape(_UNTIED)), TIED),) if model.text.tie_embeddings else ()
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
    wanted = {t.key: t for t in tensors(model) if t.weight.part in parts}
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
