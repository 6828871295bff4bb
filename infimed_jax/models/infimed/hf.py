"""Qwen3, SigLIP and LLaVA as Hugging Face writes them: names, and config.json in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infimed_jax.errors import UserError
from infimed_jax.models.hugging_face import (
    TIED,
    HuggingFace,
    SpecialTokens,
    UnusedTensor,
    Values,
    expect,
    number,
    section,
)
from infimed_jax.models.infimed import config as infimed
from infimed_jax.models.infimed.weights import sizes, weights
from infimed_jax.models.weights import shape_of

TEXT = "Qwen3ForCausalLM"
LLAVA = "LlavaForConditionalGeneration"
VISION = ("SiglipModel", "SiglipVisionModel")
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_HF_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}

_POST_NORM = "the final norm follows the feature layer"
_HEAD = "the pooling head is not part of the feature"
_UNUSED: tuple[tuple[str, str, str], ...] = (
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

_DROPPED: tuple[tuple[str, str], ...] = (
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
_SPELLINGS = {
    TEXT: {"text.": ("model.",), "text.lm_head.": ("lm_head.",)},
    **dict.fromkeys(VISION, _SIGLIP),
    LLAVA: {
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


def unused(model: infimed.Model) -> tuple[UnusedTensor, ...]:
    """What a full SigLIP tower has beyond ours: the blocks after the feature layer, the final norm, the head."""
    letters = sizes(model)
    running = model.vision.num_blocks
    reason = f"blocks from {running} on follow the feature layer {model.vision.feature_layer}"
    whole = replace(model, vision=replace(model.vision, feature_layer=-1))
    blocks = [
        UnusedTensor(weight.key.format(layer=layer), weight.key_shape, reason)
        for layer in range(running, model.vision.num_layers)
        for weight in weights(whole)
        if weight.path.startswith("vision.blocks.")
    ]
    return (*blocks, *(UnusedTensor(key, shape_of(shape, letters), why) for key, shape, why in _UNUSED))


def dropped(model: infimed.Model) -> tuple[tuple[str, str], ...]:
    """(pattern, reason) of what a source may hold besides."""
    return (*_DROPPED, *(((r"text\.lm_head\.weight", TIED),) if model.text.tie_embeddings else ()))


def text_from_hf(values: Values, where: str, *, tied: bool | None = None) -> infimed.Text:
    """Our Text from a Qwen3 configuration; `tied` overrides its `tie_word_embeddings` (LLaVA's outer one counts)."""
    expect(values, where, "model_type", ("qwen3",), absent_is_fine=False)
    expect(values, where, "hidden_act", ("silu",))
    expect(values, where, "attention_bias", (False,))
    expect(values, where, "use_sliding_window", (False,))
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{where}: layer_types other than full_attention are not supported")
    if tied is None:
        tied = _tied(values, where)
    return infimed.Text(
        vocab_size=number(values, where, "vocab_size", int),
        hidden_size=number(values, where, "hidden_size", int),
        intermediate_size=number(values, where, "intermediate_size", int),
        num_layers=number(values, where, "num_hidden_layers", int),
        num_heads=number(values, where, "num_attention_heads", int),
        num_kv_heads=number(values, where, "num_key_value_heads", int),
        head_dim=number(values, where, "head_dim", int),
        rope_theta=_rope_theta(values, where),
        norm_eps=number(values, where, "rms_norm_eps", float),
        tie_embeddings=tied,
    )


def vision_from_hf(values: Values, where: str, feature_layer: int = -2) -> infimed.Vision:
    """Our Vision from a SigLIP vision configuration.

    The published so400m file leaves out `hidden_act`, `layer_norm_eps` and `num_channels`: SigLIP's own values
    (gelu_pytorch_tanh, 1e-6, 3) stand there; every shape must be written.
    """
    expect(values, where, "model_type", ("siglip_vision_model",), absent_is_fine=False)
    expect(values, where, "num_channels", (3,))
    expect(values, where, "hidden_act", tuple(ACTIVATIONS))
    return infimed.Vision(
        image_size=number(values, where, "image_size", int),
        patch_size=number(values, where, "patch_size", int),
        hidden_size=number(values, where, "hidden_size", int),
        intermediate_size=number(values, where, "intermediate_size", int),
        num_layers=number(values, where, "num_hidden_layers", int),
        num_heads=number(values, where, "num_attention_heads", int),
        feature_layer=feature_layer,
        activation=ACTIVATIONS[values.get("hidden_act", "gelu_pytorch_tanh")],
        norm_eps=number({"layer_norm_eps": 1e-6, **values}, where, "layer_norm_eps", float),
    )


def from_hf(values: Values, where: str) -> infimed.Model:
    """Our Model from a LLaVA configuration with a SigLIP tower and a Qwen3 text model."""
    # transformers goes by the type, whatever `architectures` says: LLaVA-NeXT and OneVision cut images into tiles.
    expect(values, where, "model_type", ("llava",), absent_is_fine=False)
    text, vision = (section(values, where, name) for name in ("text_config", "vision_config"))
    expect(values, where, "projector_hidden_act", ("gelu",))
    expect(values, where, "multimodal_projector_bias", (True,))
    # LLaVA's default drops the first position as a CLS token; SigLIP has none, so `full` must be written.
    expect(values, where, "vision_feature_select_strategy", ("full",), absent_is_fine=False)
    feature_layer = values.get("vision_feature_layer")
    if type(feature_layer) is not int:
        raise UserError(f"{where}: vision_feature_layer must be one number, not {feature_layer!r}")
    tied = _tied(values, where) or _tied(text, f"{where} text_config")
    vision_part = vision_from_hf(vision, f"{where} vision_config", feature_layer)
    length = values.get("image_seq_length", vision_part.num_patches)
    if length != vision_part.num_patches:
        raise UserError(
            f"{where}: image_seq_length {length!r} is not the tower's {vision_part.num_patches} patches; "
            "a pooled model is not plain LLaVA"
        )
    return infimed.Model(
        vision_part,
        infimed.Projector(visual_tokens=vision_part.num_patches),
        text_from_hf(text, f"{where} text_config", tied=tied),
    )


def from_parts(parts: Mapping[str, tuple[str, Values, str]], visual_tokens: int) -> infimed.Model:
    """A Qwen3 and a SigLIP configuration, the latter with or without its text tower."""
    architecture, tower, where = parts["vision"]
    if architecture == "SiglipModel":
        tower = section(tower, where, "vision_config")
    _, text, text_where = parts["text"]
    return infimed.Model(vision_from_hf(tower, where), infimed.Projector(visual_tokens), text_from_hf(text, text_where))


def max_positions(values: Values, where: str) -> int:
    """max_position_embeddings of the text model, or Qwen3's own default."""
    text = values.get("text_config", values)
    return number({"max_position_embeddings": 32_768, **text}, where, "max_position_embeddings", int)


def to_hf(model: infimed.Model, tokens: SpecialTokens, dtype: str, positions: int) -> dict[str, Any]:
    """config.json of `LlavaForConditionalGeneration` at full resolution (`model.vision.num_patches` visual tokens)."""
    vision, text = model.vision, model.text
    return {
        "architectures": [LLAVA],
        "model_type": "llava",
        # transformers 4.56 and newer read the first, older ones and serving engines of that time the second: without
        # it they would run a bfloat16 model in float16.
        "dtype": dtype,
        "torch_dtype": dtype,
        "image_seq_length": vision.num_patches,
        "image_token_index": tokens.image,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text.tie_embeddings,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "full",
        "text_config": {
            "architectures": [TEXT],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": tokens.stop,
            "pad_token_id": tokens.pad,
            "head_dim": text.head_dim,
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": positions,
            "num_attention_heads": text.num_heads,
            "num_hidden_layers": text.num_layers,
            "num_key_value_heads": text.num_kv_heads,
            "rms_norm_eps": text.norm_eps,
            # transformers 5 reads the first, 4 and the serving engines the second; either alone would be taken
            # for the default base by the other.
            "rope_parameters": {"rope_theta": text.rope_theta, "rope_type": "default"},
            "rope_theta": text.rope_theta,
            "tie_word_embeddings": text.tie_embeddings,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": text.vocab_size,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "attention_dropout": 0.0,
            "hidden_act": _HF_ACTIVATIONS[vision.activation],
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.norm_eps,
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
        },
    }


def _tied(values: Values, where: str) -> bool:
    """False where nothing is said, as in Qwen3: a missing lm_head.weight would show."""
    expect(values, where, "tie_word_embeddings", (True, False, None))
    return bool(values.get("tie_word_embeddings"))


def _rope_theta(values: Values, where: str) -> float:
    """The rope base, written by transformers 5 in `rope_parameters` and by 4 on its own; never assumed."""
    rope = section(values, where, "rope_parameters") if values.get("rope_parameters") else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if values.get("rope_scaling") or kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: rope scaling is not supported, only the plain rotary embedding")
    written = [source for source in (values, rope) if source.get("rope_theta") is not None]
    given = {number(source, where, "rope_theta", float) for source in written}
    if len(given) != 1:
        raise UserError(f"{where}: rope_theta must be written once, not {sorted(given) or 'left out'}")
    return given.pop()


def processor(model: infimed.Model) -> dict[str, dict[str, Any]]:
    """Bicubic to the square, aspect ratio ignored, [-1, 1], as in training."""
    side = model.vision.image_size
    return {
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,  # bicubic
            "rescale_factor": 1 / 255,
            "size": {"height": side, "width": side},
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<|image_pad|>",
            "num_additional_image_tokens": 0,
            "patch_size": model.vision.patch_size,
            "vision_feature_select_strategy": "full",
        },
    }


def pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """f32[M,3,S,S] in [-1, 1]."""
    return (np.stack(images).astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)


def exported(model: infimed.Model) -> infimed.Model:
    """LLaVA has no pooling: an export has all patches."""
    return replace(model, projector=infimed.Projector(visual_tokens=model.vision.num_patches))


def describe(model: infimed.Model) -> list[str]:
    """Lines of the model card."""
    vision, text = model.vision, model.text
    return [
        f"SigLIP (patch {vision.patch_size}, {vision.image_size} px, hidden state {vision.feature_layer}), a two-layer "
        f"MLP, Qwen3 ({text.num_layers} layers of {text.hidden_size}).",
        f"{vision.num_patches} visual tokens an image, all patches: SigLIP has no class token, so the feature "
        "strategy is `full`.",
        "Images are resized to the square by bicubic interpolation, whatever their aspect ratio, as Pillow does it: "
        "where torchvision is installed, `AutoProcessor.from_pretrained(…, backend='pil')` gives training's pixels to "
        "the bit.",
    ]


HUGGING_FACE = HuggingFace(
    architecture=LLAVA,
    sources={"vision": VISION, "text": (TEXT,)},
    spellings=_SPELLINGS,
    unused=unused,
    dropped=dropped,
    from_hf=from_hf,
    from_parts=from_parts,
    to_hf=to_hf,
    processor=processor,
    exported=exported,
    max_positions=max_positions,
    describe=describe,
    language="language_model.",
    features={"vision": ("multi_modal_projector", "input"), "projector": ("multi_modal_projector", "output")},
    pixels=pixels,
)
