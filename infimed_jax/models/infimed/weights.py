"""The weights of SigLIP's tower, the projector and Qwen3, each declared once."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from infimed_jax.models.infimed.config import Model
from infimed_jax.models.weights import (
    Tree,
    Unweighted,
    Weight,
    as_tree,
    fan_in_normal,
    layer_norm,
    linear,
    normal,
    normal_002,
    rms_norm,
    sized,
    zeros,
)

_POSITION_INIT = normal(0.75)
"""For towers that learn from scratch: of the size of the patches' own embedding, where Hugging Face has 1/sqrt(D).
One trial each, one seed, same data: with 1/sqrt(D) questions of place stayed at chance after 1,500 steps, with this
they were answered after 900. The two runs differ in the length of their schedule too."""
_CONVOLUTION = (2, 3, 1, 0)
"""torch keeps [out, channels, height, width], we keep [height, width, channels, out]."""

_INTO_HEADS, _FROM_HEADS = ("embed", "heads", None), ("heads", None, "embed")
_INTO_MLP, _FROM_MLP = ("embed", "mlp"), ("mlp", "embed")
STACKS = ("vision.blocks", "text.layers")


@functools.cache
def weights(model: Model) -> tuple[Weight, ...]:
    """Every weight of `model`, in the order of the computation."""
    return sized((*_VISION, *_PROJECTOR, *_text(model.text.tie_embeddings)), sizes(model), stacks(model))


@functools.cache
def tree(model: Model) -> Tree:
    return as_tree(weights(model))


def sizes(model: Model) -> dict[str, int]:
    """The letters. Text: V, D, F, N, K, H, as everywhere; W is the width between the projector's linears.

    Vision: E width, G feed-forward, A heads of X, P patches, S a patch's side, C channels, U numbers of a patch.
    """
    vision, text = model.vision, model.text
    return {
        "V": text.vocab_size,
        "D": text.hidden_size,
        "W": text.hidden_size,
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
        "U": 3 * vision.patch_size**2,
    }


def places(model: Model) -> dict[str, int]:
    return {"patch": model.vision.num_patches, "visual token": model.projector.visual_tokens}


def unweighted(model: Model) -> tuple[Unweighted, ...]:
    """The tower's attention, and the pooling as two products with constants where it is any."""
    vision, grid = model.vision, model.projector.grid
    patches, width = vision.num_patches, vision.hidden_size
    scores, head = vision.num_heads * patches, width // vision.num_heads
    attention = functools.partial(
        Unweighted, "vision", differentiated="vision", operands=2, layers=vision.num_blocks, split="rows"
    )
    pooling = functools.partial(Unweighted, "projector", differentiated="vision")
    return (
        attention("scores", scores, head, patches),
        attention("mix", scores, patches, head),
        *((pooling("pool_rows", grid, vision.grid, vision.grid * width),) if grid != vision.grid else ()),
        *((pooling("pool_columns", grid * grid, vision.grid, width),) if grid != vision.grid else ()),
    )


def stacks(model: Model) -> Mapping[str, int]:
    return dict(zip(STACKS, (model.vision.num_blocks, model.text.num_layers), strict=True))


def _vision() -> tuple[Weight, ...]:
    dense = functools.partial(linear, per="patch", bias=True, init=fan_in_normal)
    ours, theirs = "vision.blocks", "vision.encoder.layers.{layer}"
    kernel = Weight(
        "vision.patch_embedding.kernel",
        "U E",
        (None, "embed"),
        fan_in_normal,
        "vision.embeddings.patch_embedding.weight",
        "E C S S",
        _CONVOLUTION,
        inputs=1,
        per="patch",
    )
    bias = Weight("vision.patch_embedding.bias", "E", ("embed",), zeros, "vision.embeddings.patch_embedding.bias", "E")
    position = Weight(
        "vision.position_embedding",
        "P E",
        (None, "embed"),
        _POSITION_INIT,
        "vision.embeddings.position_embedding.weight",
        "P E",
    )
    return (
        kernel,
        bias,
        position,
        *layer_norm(f"{ours}.layer_norm1", f"{theirs}.layer_norm1", "E"),
        *dense(f"{ours}.self_attn.q_proj", f"{theirs}.self_attn.q_proj", "E -> A X", _INTO_HEADS),
        *dense(f"{ours}.self_attn.k_proj", f"{theirs}.self_attn.k_proj", "E -> A X", _INTO_HEADS),
        *dense(f"{ours}.self_attn.v_proj", f"{theirs}.self_attn.v_proj", "E -> A X", _INTO_HEADS),
        *dense(f"{ours}.self_attn.out_proj", f"{theirs}.self_attn.out_proj", "A X -> E", _FROM_HEADS),
        *layer_norm(f"{ours}.layer_norm2", f"{theirs}.layer_norm2", "E"),
        *dense(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", "E -> G", _INTO_MLP),
        *dense(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", "G -> E", _FROM_MLP),
    )


def _text(tied: bool) -> tuple[Weight, ...]:
    dense = functools.partial(linear, per="token")
    ours, theirs = "text.layers", "text.layers.{layer}"
    table = Weight(
        "text.embed_tokens", "V D", ("vocab", "embed"), normal_002, "text.embed_tokens.weight", "V D", role="table"
    )
    # No product of a layer: `forward.logits` uses it, or the transposed table, once a position.
    head = Weight(
        "text.lm_head", "D V", ("embed", "vocab"), normal_002, "text.lm_head.weight", "V D", (1, 0), role="head"
    )
    return (
        table,
        *rms_norm(f"{ours}.input_layernorm", f"{theirs}.input_layernorm", "D"),
        *dense(f"{ours}.self_attn.q_proj", f"{theirs}.self_attn.q_proj", "D -> N H", _INTO_HEADS),
        *dense(f"{ours}.self_attn.k_proj", f"{theirs}.self_attn.k_proj", "D -> K H", _INTO_HEADS),
        *dense(f"{ours}.self_attn.v_proj", f"{theirs}.self_attn.v_proj", "D -> K H", _INTO_HEADS),
        *rms_norm(f"{ours}.self_attn.q_norm", f"{theirs}.self_attn.q_norm", "H", split_input=True),
        *rms_norm(f"{ours}.self_attn.k_norm", f"{theirs}.self_attn.k_norm", "H", split_input=True),
        *dense(f"{ours}.self_attn.o_proj", f"{theirs}.self_attn.o_proj", "N H -> D", _FROM_HEADS),
        *rms_norm(f"{ours}.post_attention_layernorm", f"{theirs}.post_attention_layernorm", "D"),
        *dense(f"{ours}.mlp.gate_proj", f"{theirs}.mlp.gate_proj", "D -> F", _INTO_MLP),
        *dense(f"{ours}.mlp.up_proj", f"{theirs}.mlp.up_proj", "D -> F", _INTO_MLP),
        *dense(f"{ours}.mlp.down_proj", f"{theirs}.mlp.down_proj", "F -> D", _FROM_MLP),
        *rms_norm("text.norm", "text.norm", "D"),
        *(() if tied else (head,)),
    )


_VISION = _vision()
_PROJECTOR = (
    *linear("projector.linear_1", "projector.linear_1", "E -> W", _INTO_MLP, "visual token", bias=True),
    *linear("projector.linear_2", "projector.linear_2", "W -> D", _FROM_MLP, "visual token", bias=True),
)
