"""config.json in both directions: our Model from Qwen3's, SigLIP's and LLaVA's, and LLaVA's from our Model.

Reading assumes nothing that changes the numbers: a shape or a rope base that is not written is an error, and so is a
feature that our model does not have.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.hf.weights import read_json
from infimed_jax.models.infimed import config as infimed

N = TypeVar("N", int, float)

TEXT = "Qwen3ForCausalLM"
LLAVA = "LlavaForConditionalGeneration"
VISION = ("SiglipModel", "SiglipVisionModel")
MAX_POSITIONS = 40_960
"""Of Qwen3 as published: the context of a model whose checkpoint names none, as one that was never imported."""
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_HF_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}


def read_architecture(folder: str | Path, allowed: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """(architecture, config.json) of a folder; UserError where it is none of `allowed`."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    given = values.get("architectures")
    names = given if isinstance(given, list) else [given] if given else []
    for architecture in allowed:
        if names == [architecture]:
            return architecture, values
    said = ", ".join(map(str, names)) or f"no architecture (model_type {values.get('model_type')!r})"
    raise UserError(f"{path} is of {said}; this reads {' or '.join(allowed)}")


def text_from_hf(values: dict[str, Any], where: str, *, tied: bool | None = None) -> infimed.Text:
    """Our Text from a Qwen3 configuration; `tied` overrides its `tie_word_embeddings` (LLaVA's outer one counts)."""
    _expect(values, where, "model_type", ("qwen3",), absent_is_fine=False)
    _expect(values, where, "hidden_act", ("silu",))
    _expect(values, where, "attention_bias", (False,))
    _expect(values, where, "use_sliding_window", (False,))
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{where}: layer_types other than full_attention are not supported")
    if tied is None:
        tied = _tied(values, where)
    return infimed.Text(
        vocab_size=_number(values, where, "vocab_size", int),
        hidden_size=_number(values, where, "hidden_size", int),
        intermediate_size=_number(values, where, "intermediate_size", int),
        num_layers=_number(values, where, "num_hidden_layers", int),
        num_heads=_number(values, where, "num_attention_heads", int),
        num_kv_heads=_number(values, where, "num_key_value_heads", int),
        head_dim=_number(values, where, "head_dim", int),
        rope_theta=_rope_theta(values, where),
        norm_eps=_number(values, where, "rms_norm_eps", float),
        tie_embeddings=tied,
    )


def vision_from_hf(values: dict[str, Any], where: str, feature_layer: int) -> infimed.Vision:
    """Our Vision from a SigLIP vision configuration.

    The published so400m file leaves out `hidden_act`, `layer_norm_eps` and `num_channels`: SigLIP's own values
    (gelu_pytorch_tanh, 1e-6, 3) stand there; every shape must be written.
    """
    _expect(values, where, "model_type", ("siglip_vision_model",), absent_is_fine=False)
    _expect(values, where, "num_channels", (3,))
    _expect(values, where, "hidden_act", tuple(ACTIVATIONS))
    return infimed.Vision(
        image_size=_number(values, where, "image_size", int),
        patch_size=_number(values, where, "patch_size", int),
        hidden_size=_number(values, where, "hidden_size", int),
        intermediate_size=_number(values, where, "intermediate_size", int),
        num_layers=_number(values, where, "num_hidden_layers", int),
        num_heads=_number(values, where, "num_attention_heads", int),
        feature_layer=feature_layer,
        activation=ACTIVATIONS[values.get("hidden_act", "gelu_pytorch_tanh")],
        norm_eps=_number({"layer_norm_eps": 1e-6, **values}, where, "layer_norm_eps", float),
    )


def llava_from_hf(values: dict[str, Any], where: str) -> config.Model:
    """Our Model from a LLaVA configuration with a SigLIP tower and a Qwen3 text model."""
    # transformers goes by the type, whatever `architectures` says: LLaVA-NeXT and OneVision cut images into tiles.
    _expect(values, where, "model_type", ("llava",), absent_is_fine=False)
    text, vision = (section(values, where, name) for name in ("text_config", "vision_config"))
    _expect(values, where, "projector_hidden_act", ("gelu",))
    _expect(values, where, "multimodal_projector_bias", (True,))
    # LLaVA's default drops the first position as a CLS token; SigLIP has none, so `full` must be written.
    _expect(values, where, "vision_feature_select_strategy", ("full",), absent_is_fine=False)
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


def positions_from_hf(values: dict[str, Any], where: str) -> int:
    """max_position_embeddings, or Qwen3's own default: it bounds what is served and changes no number of ours."""
    return _number({"max_position_embeddings": 32_768, **values}, where, "max_position_embeddings", int)


def llava_config(
    model: config.Model,
    *,
    image_token: int,
    stop_token: int,
    pad_token: int,
    dtype: str,
    max_positions: int,
) -> dict[str, Any]:
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
        "image_token_index": image_token,
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
            "eos_token_id": stop_token,
            "pad_token_id": pad_token,
            "head_dim": text.head_dim,
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": max_positions,
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


def generation_config(stop_tokens: tuple[int, ...], pad_token: int, suppressed: tuple[int, ...] = ()) -> dict[str, Any]:
    """generation_config.json: greedy, as the model is evaluated, and never a token that our sampler bans."""
    values = {"do_sample": False, "eos_token_id": list(stop_tokens), "pad_token_id": pad_token}
    return values | ({"suppress_tokens": list(suppressed)} if suppressed else {})


def _tied(values: dict[str, Any], where: str) -> bool:
    """False where nothing is said, as in Qwen3: a missing lm_head.weight would show."""
    _expect(values, where, "tie_word_embeddings", (True, False, None))
    return bool(values.get("tie_word_embeddings"))


def _rope_theta(values: dict[str, Any], where: str) -> float:
    """The rope base, written by transformers 5 in `rope_parameters` and by 4 on its own; never assumed."""
    rope = section(values, where, "rope_parameters") if values.get("rope_parameters") else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if values.get("rope_scaling") or kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: rope scaling is not supported, only the plain rotary embedding")
    written = [source for source in (values, rope) if source.get("rope_theta") is not None]
    given = {_number(source, where, "rope_theta", float) for source in written}
    if len(given) != 1:
        raise UserError(f"{where}: rope_theta must be written once, not {sorted(given) or 'left out'}")
    return given.pop()


def section(values: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    """The object under `name`; UserError where there is none."""
    found = values.get(name)
    if not isinstance(found, dict):
        raise UserError(f"{where}: {name} is {'missing' if found is None else f'no group of settings but {found!r}'}")
    return found


def _number(values: dict[str, Any], where: str, name: str, kind: type[N]) -> N:
    """Sizes, the rope base and the norms' eps: all are above 0."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: {name} must be written as a number, not {value!r}")
    if not math.isfinite(value) or value <= 0 or kind(value) != value:
        raise UserError(f"{where}: {name} must be a {'whole ' if kind is int else ''}number above 0, not {value!r}")
    return kind(value)


def _expect(
    values: dict[str, Any], where: str, name: str, allowed: tuple[Any, ...], *, absent_is_fine: bool = True
) -> None:
    if name not in values and absent_is_fine:
        return
    if values.get(name) not in allowed:
        raise UserError(f"{where}: {name} {values.get(name)!r} is not supported, only {', '.join(map(repr, allowed))}")
