"""Every matrix product of a step, counted from the configuration: FLOPs, and the bytes they move in HBM.

The counts are of the largest batch: full rows, every image slot used, every chunk of the loss computed. They equal
what the compiler makes of a small model, product by product (tests/plan/test_counts.py). `step_flops` gives them a
token, a query-key pair and an image, which is what a run multiplies by the counts of its batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from infimed_jax import config
from infimed_jax.models import lora
from infimed_jax.models.family import family_of, weights
from infimed_jax.models.weights import Weight
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
    """A part of the model, or head."""
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
        """FLOPs of all runs."""
        return 2 * self.rows * self.inner * self.outer * self.count * self.runs

    @property
    def model_flops(self) -> float:
        """Without recomputation and masked scores: what a share of peak is counted with."""
        needed = self.forward + min(self.backward, 2 * self.forward)  # kernels may compute more than two
        return 2 * self.rows * self.inner * self.outer * self.count * needed * self.needed

    @property
    def forward_flops(self) -> float:
        """FLOPs of one forward pass, without masked scores."""
        return 2 * self.rows * self.inner * self.outer * self.count * self.forward * self.needed

    def bytes(self, batch_shards: int, tensor: int) -> int:
        """Read and written in HBM by one device, operands and result once a run, in bfloat16."""
        share = {name: tensor if name == self.split else 1 for name in ("rows", "inner", "outer")}
        rows, inner, outer = (getattr(self, name) // parts for name, parts in share.items())
        rows //= batch_shards
        result = 0 if self.fused else rows * outer
        return BF16 * (rows * inner + inner * outer + result) * self.count * self.runs


@dataclass(frozen=True)
class Use:
    """A weight with what this run makes of it."""

    weight: Weight
    learns: bool
    below: bool
    """Whether gradients pass on through it, to what learns before it or in its own stack."""
    last: bool
    """Whether it makes the output of its stack's block, which is no operand of the block's own backward pass."""

    def recomputed(self, cfg: config.Config) -> bool:
        """Whether full rematerialisation computes its product again."""
        inside = self.weight.layers > 0 and not self.last
        return inside and (self.learns or self.below) and cfg.train.remat == "full"


def uses(cfg: config.Config) -> list[Use]:
    """Every weight of the model, in the order of the computation, without adapters."""
    table = weights(cfg.model)
    adapted = {kernel.part for kernel in lora.adapted(cfg.model, cfg.train.lora)}
    learns = {weight.part: weight.part in cfg.train.train and weight.part not in adapted for weight in table}
    ends = {weight.part: weight.holder for weight in table if weight.layers and weight.inputs}
    found: list[Use] = []
    before = False
    for weight in table:
        part = weight.part
        below = before or bool(weight.layers and (learns[part] or part in adapted))
        found.append(Use(weight, learns[part], below, weight.holder == ends.get(part)))
        before = before or learns[part]
    return found


def rows_of(cfg: config.Config, rows: int) -> dict[str, int]:
    """Rows of the products of each `Weight.per` in `rows` rows of the largest batch."""
    images = rows * cfg.data.images_per_row
    places = family_of(cfg.model).places(cfg.model)
    return {"token": rows * cfg.data.context} | {per: images * count for per, count in places.items()}


def products(cfg: config.Config, rows: int) -> list[Product]:
    """All matrix products of one step over `rows` rows."""
    tokens = rows * cfg.data.context
    found = [
        *_weighted(cfg, rows),
        *_unweighted(cfg, rows * cfg.data.images_per_row),
        *_self_attention(cfg, rows),
        *_adapters(cfg, tokens),
        _head(cfg, tokens),
    ]
    return [item for item in found if item.rows]


def _weighted(cfg: config.Config, rows: int) -> list[Product]:
    """Products with weights; neighbours of one shape that read the same (keys and values) are one product."""
    counts = rows_of(cfg, rows)
    kernels = [use for use in uses(cfg) if use.weight.inputs]
    found = []
    for _, group in itertools.groupby(kernels, key=lambda use: (use.weight.block, use.weight.letters)):
        together = list(group)
        use = together[0]
        weight = use.weight
        found.append(
            Product(
                weight.part,
                " ".join(other.weight.module for other in together),
                counts[weight.per],
                weight.fan_in,
                weight.fan_out * len(together),
                count=weight.layers or 1,
                recomputed=int(use.recomputed(cfg)),
                backward=use.learns + use.below,
                split="inner" if weight.splits_inputs else "outer" if weight.splits_outputs else "",
            )
        )
    return found


def _unweighted(cfg: config.Config, images: int) -> list[Product]:
    found = []
    for item in family_of(cfg.model).unweighted(cfg.model):
        differentiated = item.differentiated in cfg.train.train
        found.append(
            Product(
                item.part,
                item.name,
                images * item.rows,
                item.inner,
                item.outer,
                count=item.layers or 1,
                recomputed=int(bool(item.layers) and differentiated and cfg.train.remat != "none"),
                backward=item.operands * differentiated,
                split=item.split,
            )
        )
    return found


def _adapters(cfg: config.Config, tokens: int) -> list[Product]:
    """Both factors of each LoRA adapter, which learn where the kernels beside them do not."""
    rank, part = cfg.train.lora.rank, cfg.model.language
    again = {use.weight.path: use.recomputed(cfg) for use in uses(cfg)}
    both = {"count": cfg.model.num_layers, "backward": 2}
    found = []
    for kernel in lora.adapted(cfg.model, cfg.train.lora):
        a, b = ("inner", "") if kernel.splits_inputs else ("", "outer")
        first, second = int(cfg.train.remat == "full"), int(again[kernel.path])
        name, width, outputs = kernel.module, kernel.fan_in, kernel.fan_out
        found += [
            Product(part, f"{name} lora_a", tokens, width, rank, recomputed=first, split=a, **both),
            Product(part, f"{name} lora_b", tokens, rank, outputs, recomputed=second, split=b, **both),
        ]
    return found


def _self_attention(cfg: config.Config, rows: int) -> list[Product]:
    """Scores and their product with the values; a kernel's further backward products are counted with the scores."""
    model, length = cfg.model, cfg.data.context
    kernel = attention_backend(cfg)
    keys = kernel.causal_keys(length)
    queries = rows * model.num_heads * length
    shared = {
        "count": model.num_layers,
        "recomputed": int(cfg.train.remat != "none"),
        "split": "rows",
        "fused": kernel.fused,
        "needed": (length + 1) / 2 / keys,
    }
    return [
        Product(
            model.language, "scores", queries, model.head_dim, keys, backward=kernel.backward_products - 2, **shared
        ),
        Product(model.language, "mix", queries, keys, model.head_dim, backward=2, **shared),
    ]


def language_learns(cfg: config.Config) -> bool:
    """Whether the language model's own weights do, beside which LoRA's adapters are counted for themselves."""
    return cfg.model.language in cfg.train.train and not cfg.train.lora.rank


def attention_backend(cfg: config.Config) -> Backend:
    """The language model's; `auto` counts as a dense one, which is what platforms without a kernel run."""
    return backend("xla" if cfg.train.attention == "auto" else cfg.train.attention)


def _head(cfg: config.Config, tokens: int) -> Product:
    """Logits: computed again in the backward pass, always (ops.cross_entropy)."""
    backward = 1 + language_learns(cfg)
    return Product(
        "head", "logits", tokens, cfg.model.hidden_size, cfg.model.vocab_size, recomputed=1, backward=backward
    )


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

    token = [item for item in work if item.part == model.language and item.name not in _PAIRS]
    pair = [item for item in work if item.part == model.language and item.name in _PAIRS]
    return StepFlops(
        token=sum(map(cost, token)) / data.context,
        loss_token=sum(cost(item) for item in work if item.part == "head") / data.context,
        pair=sum(map(cost, pair)) / (data.context * (data.context + 1) / 2),
        image=sum(cost(item) for item in work if item.part not in (model.language, "head")),
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
