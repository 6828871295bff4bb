"""Every matrix product of a step, counted from the configuration: FLOPs, and the bytes they move in HBM.

The counts are of the largest batch: full rows, every image slot used, every chunk of the loss computed. They equal
what the compiler makes of a small model, product by product (tests/plan/test_counts.py). `step_flops` gives them a
token, a query-key pair and an image, which is what a run multiplies by the counts of its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from infimed_jax import config
from infimed_jax.models import lora
from infimed_jax.ops.attention import Backend, backend

CONVENTION = "model FLOPs without recomputation, padding or masked pairs; a frozen tower counts its forward pass only"

BF16 = 2
"""Bytes."""
_PAIRS = ("scores", "mix")
"""Products that grow with the pairs of positions."""


@dataclass(frozen=True)
class Product:
    """`[rows, inner] x [inner, outer]`, `count` times a forward pass, over the whole pod."""

    part: str
    """vision, projector, text or head."""
    name: str
    rows: int
    inner: int
    outer: int
    count: int = 1
    forward: int = 1
    recomputed: int = 0
    """Times in the backward pass that it runs again for activations that were not kept."""
    backward: int = 0
    """Products of the backward pass: 1 for the gradient of either operand."""
    split: Literal["rows", "inner", "outer", ""] = "outer"
    """The dimension that `tensor` divides; "": its devices repeat the work."""
    fused: bool = False
    """Its result (attention scores) never reaches HBM."""
    needed: float = 1.0
    """Share of the products that a reader of the formula would count: a half of causal scores."""

    @property
    def runs(self) -> int:
        return self.forward + self.recomputed + self.backward

    @property
    def flops(self) -> int:
        """Of all runs."""
        return 2 * self.rows * self.inner * self.outer * self.count * self.runs

    @property
    def model_flops(self) -> float:
        """Without recomputation and masked scores: what a share of peak is counted with."""
        needed = self.forward + min(self.backward, 2 * self.forward)  # kernels may compute more than two
        return 2 * self.rows * self.inner * self.outer * self.count * needed * self.needed

    @property
    def forward_flops(self) -> float:
        """Of one forward pass, without masked scores."""
        return 2 * self.rows * self.inner * self.outer * self.count * self.forward * self.needed

    def bytes(self, batch_shards: int, tensor: int) -> int:
        """Read and written in HBM by one device, operands and result once a run, in bfloat16."""
        share = {name: tensor if name == self.split else 1 for name in ("rows", "inner", "outer")}
        rows, inner, outer = (getattr(self, name) // parts for name, parts in share.items())
        rows //= batch_shards
        result = 0 if self.fused else rows * outer
        return BF16 * (rows * inner + inner * outer + result) * self.count * self.runs


def products(cfg: config.Config, rows: int) -> list[Product]:
    """All matrix products of one step over `rows` rows."""
    return [*_vision(cfg, rows), *_projector(cfg, rows), *_text(cfg, rows), _head(cfg, rows)]


def _vision(cfg: config.Config, rows: int) -> list[Product]:
    vision, trains = cfg.model.vision, "vision" in cfg.train.train
    images = rows * cfg.data.images_per_row
    if images == 0:
        return []
    patches, d, f = images * vision.num_patches, vision.hidden_size, vision.intermediate_size
    again = int(trains and cfg.train.remat == "full")
    back = 2 if trains else 0
    block = {"count": vision.num_blocks, "recomputed": again, "backward": back}
    scores = images * vision.num_heads * vision.num_patches
    head = d // vision.num_heads
    inner = {"count": vision.num_blocks, "recomputed": int(trains and cfg.train.remat != "none"), "backward": back}
    return [
        Product("vision", "patch_embedding", patches, 3 * vision.patch_size**2, d, backward=int(trains), split=""),
        Product("vision", "q_proj k_proj v_proj", patches, d, 3 * d, **block),
        Product("vision", "scores", scores, head, vision.num_patches, split="rows", **inner),
        Product("vision", "mix", scores, vision.num_patches, head, split="rows", **inner),
        Product("vision", "out_proj", patches, d, d, split="inner", **block),
        Product("vision", "fc1", patches, d, f, **block),
        # The block's output is no operand of its own backward pass: it is not computed again.
        Product("vision", "fc2", patches, f, d, split="inner", **block | {"recomputed": 0}),
    ]


def _projector(cfg: config.Config, rows: int) -> list[Product]:
    images = rows * cfg.data.images_per_row
    if images == 0:
        return []
    vision, width, grid = cfg.model.vision, cfg.model.text.hidden_size, cfg.model.projector.grid
    tokens, side, d = images * grid * grid, vision.grid, vision.hidden_size
    seen, learns = int("vision" in cfg.train.train), int("projector" in cfg.train.train)
    first = {"backward": learns + seen}
    pooling = [
        Product("projector", "pool_rows", images * grid, side, side * d, backward=seen, split=""),
        Product("projector", "pool_columns", images * grid * grid, side, d, backward=seen, split=""),
    ]
    return (pooling if grid != side else []) + [
        Product("projector", "linear_1", tokens, d, width, **first),
        Product("projector", "linear_2", tokens, width, width, backward=learns + (learns | seen), split="inner"),
    ]


def _text(cfg: config.Config, rows: int) -> list[Product]:
    text, tokens = cfg.model.text, rows * cfg.data.context
    d, f, heads, kv = text.hidden_size, text.intermediate_size, text.num_heads, text.num_kv_heads
    width = text.head_dim
    # Something learns in or below the text model, so gradients pass through it; its own weights may be frozen.
    back = 1 + text_learns(cfg)
    block = {"count": text.num_layers, "recomputed": int(cfg.train.remat == "full"), "backward": back}
    return [
        Product("text", "q_proj", tokens, d, heads * width, **block),
        Product("text", "k_proj v_proj", tokens, d, 2 * kv * width, **block),
        *_self_attention(cfg, rows),
        Product("text", "o_proj", tokens, heads * width, d, split="inner", **block),
        Product("text", "gate_proj up_proj", tokens, d, 2 * f, **block),
        Product("text", "down_proj", tokens, f, d, split="inner", **block | {"recomputed": 0}),
        *_adapters(cfg, tokens),
    ]


def _adapters(cfg: config.Config, tokens: int) -> list[Product]:
    """Both factors of each LoRA adapter, which learn where the kernels beside them do not."""
    rank, again = cfg.train.lora.rank, int(cfg.train.remat == "full")
    both = {"count": cfg.model.text.num_layers, "backward": 2}
    found = []
    for target, (inputs, outputs) in lora.dimensions(cfg.model.text, cfg.train.lora).items():
        a, b = ("inner", "") if lora.splits_inputs(target) else ("", "outer")
        last = target == "down_proj"  # whose result, as that of the kernel beside it, is the block's
        found += [
            Product("text", f"{target} lora_a", tokens, inputs, rank, recomputed=again, split=a, **both),
            Product("text", f"{target} lora_b", tokens, rank, outputs, recomputed=again * (not last), split=b, **both),
        ]
    return found


def _self_attention(cfg: config.Config, rows: int) -> list[Product]:
    """Scores and their product with the values; a kernel's further backward products are counted with the scores."""
    text, length = cfg.model.text, cfg.data.context
    kernel = attention_backend(cfg)
    keys = kernel.causal_keys(length)
    queries = rows * text.num_heads * length
    shared = {
        "count": text.num_layers,
        "recomputed": int(cfg.train.remat != "none"),
        "split": "rows",
        "fused": kernel.fused,
        "needed": (length + 1) / 2 / keys,
    }
    return [
        Product("text", "scores", queries, text.head_dim, keys, backward=kernel.backward_products - 2, **shared),
        Product("text", "mix", queries, keys, text.head_dim, backward=2, **shared),
    ]


def text_learns(cfg: config.Config) -> bool:
    """Whether the text model's own weights do, beside which LoRA's adapters are counted for themselves."""
    return "text" in cfg.train.train and not cfg.train.lora.rank


def attention_backend(cfg: config.Config) -> Backend:
    """The text model's; `auto` counts as a dense one, which is what platforms without a kernel run."""
    return backend("xla" if cfg.train.attention == "auto" else cfg.train.attention)


def _head(cfg: config.Config, rows: int) -> Product:
    """Logits: computed again in the backward pass, always (ops.cross_entropy)."""
    text, tokens = cfg.model.text, rows * cfg.data.context
    back = 1 + text_learns(cfg)
    return Product("head", "logits", tokens, text.hidden_size, text.vocab_size, recomputed=1, backward=back)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs, a unit of each count of `runs.meter.batch_counts`."""

    token: float
    loss_token: float
    pair: float
    """A query and a key that the mask lets it see."""
    image: float

    def of(self, counts: Mapping[str, float]) -> float:
        """FLOPs of a batch with these `tokens`, `loss_tokens`, `pairs` and `images`."""
        return (
            self.token * counts["tokens"]
            + self.loss_token * counts["loss_tokens"]
            + self.pair * counts["pairs"]
            + self.image * counts["images"]
        )


def step_flops(model: config.Model, train: config.Train) -> StepFlops:
    """Per unit, for the parts that `train` lets learn, adapters included."""
    return _units(model, train, lambda item: item.model_flops)


def forward_flops(model: config.Model) -> StepFlops:
    """Per unit, of a forward pass alone, as in decoding."""
    return _units(model, config.Train(), lambda item: item.forward_flops)


def _units(model: config.Model, train: config.Train, cost: Callable[[Product], float]) -> StepFlops:
    data = replace(config.Data(), context=8, images_per_row=1)
    plain = replace(train, remat="none", attention="xla")
    work = products(config.Config(model=model, data=data, train=plain), rows=1)

    def of(*parts: str, pairs: bool = False) -> float:
        return sum(cost(item) for item in work if item.part in parts and (item.name in _PAIRS) == pairs)

    return StepFlops(
        token=of("text") / data.context,
        loss_token=of("head") / data.context,
        pair=of("text", pairs=True) / (data.context * (data.context + 1) / 2),
        image=of("projector") + of("vision") + of("vision", pairs=True),
    )


def by_part(items: Sequence[Product]) -> dict[str, int]:
    """FLOPs of a step over the pod, of each part and in `total`."""
    parts: dict[str, int] = {}
    for item in items:
        parts[item.part] = parts.get(item.part, 0) + item.flops
    return parts | {"total": sum(parts.values())}


def device_flops(items: Sequence[Product], mesh: dict[str, int]) -> int:
    """FLOPs of one device: work that `tensor` does not split is repeated on it."""
    shards = mesh["data"] * mesh["fsdp"]
    return sum(item.flops // (shards * (mesh["tensor"] if item.split else 1)) for item in items)
