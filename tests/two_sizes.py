"""A model family of one file, as a user would add it: `model.family=two_sizes.py`.

It is all that InfiMed's is not: images of two sizes, three position axes, an untied head, an embedding that Hugging
Face keeps transposed, and q, k and v fused into one tensor there.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from infimed_jax import config
from infimed_jax.config.fields import Count
from infimed_jax.models.compute import scan_blocks
from infimed_jax.models.family import Family
from infimed_jax.models.hugging_face import HuggingFace, number
from infimed_jax.models.layers import Linear, RMSNorm
from infimed_jax.models.weights import Weight, as_tree, linear, normal_002, rms_norm, sized
from infimed_jax.ops.attention import attention
from infimed_jax.ops.rope import apply_rope

CELL, ROWS = 4, 2
"""Pixels of a cell's side, each a visual token; and rows of cells."""
ARCHITECTURE, EPS, THETA = "TwoSizesForVision", 1e-6, 1e4
SECTIONS = (0, 0, 0, 0, 1, 1, 2, 2)
"""The axis whose position turns each pair of a head of 16."""


@dataclass(frozen=True)
class MODEL(config.Model):
    """Sizes of the toy."""

    PARTS: ClassVar = ("vision", "text")
    position_axes: ClassVar = 3
    sized: ClassVar = True

    vocab_size: Count = 400
    """Rows of the embedding."""
    hidden_size: Count = 32
    """Width of the residual stream."""
    num_layers: Count = 2
    """Number of blocks."""
    num_heads: Count = 4
    """Query heads."""
    num_kv_heads: Count = 2
    """Key-value heads."""
    width: Count = 48
    """Width inside the feed-forward block."""

    @property
    def head_dim(self) -> int:
        return 2 * len(SECTIONS)

    @property
    def split(self) -> dict[str, int]:
        return {"num_kv_heads": self.num_kv_heads, "width": self.width, "vocab_size": self.vocab_size}

    @property
    def visual_tokens(self) -> int:
        return 2 * ROWS * ROWS

    def image(self, height: int, width: int) -> config.ImageSpan:
        columns = 2 * ROWS if width > 1.5 * height else ROWS
        return config.ImageSpan(ROWS * columns, (ROWS, columns))

    def host_arrays(self, image: Image.Image) -> dict[str, np.ndarray]:
        tokens, (rows, columns) = self.image(image.height, image.width)
        pixels = np.asarray(image.resize((columns * CELL, rows * CELL), Image.Resampling.BICUBIC))
        cells = pixels.reshape(rows, CELL, columns, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(tokens, -1)
        arrays = self.blank_image()
        arrays["cells"][:tokens], arrays["grid"][:] = cells, (rows, columns)
        return arrays

    def span(self, pixels: dict[str, np.ndarray]) -> config.ImageSpan:
        rows, columns = map(int, pixels["grid"])
        return config.ImageSpan(rows * columns, (rows, columns))

    def blank_image(self) -> dict[str, np.ndarray]:
        return {"cells": np.zeros((self.visual_tokens, CELL * CELL * 3), np.uint8), "grid": np.zeros(2, np.int32)}

    def positions(self, visual: np.ndarray, spans: Any) -> np.ndarray:
        """Text goes on by one on all axes; an image's cells keep one time, and have their own row and column."""
        axes, start, place = np.zeros((3, len(visual)), np.int32), 0, 0
        spans = iter(spans)
        while place < len(visual):
            tokens, (rows, columns) = next(spans) if visual[place] else (1, (1, 1))
            cell = np.arange(tokens)
            axes[:, place : place + tokens] = start + np.stack([0 * cell, cell // columns, cell % columns])
            start, place = start + max(rows, columns), place + tokens
        return axes


# ------------------------------------------------------------------------------------------------ weights


@functools.cache
def weights(model: MODEL) -> tuple[Weight, ...]:
    block, key = "text.layers", "text.layers.{layer}"
    fused = functools.partial(
        Weight,
        axes=("embed", "heads", None),
        init=normal_002,
        key=f"{key}.qkv.weight",
        order=(1, 0),
        pieces=("N*H", "K*H", "K*H"),
        inputs=1,
        per="token",
    )
    into, out = ("embed", "mlp"), ("mlp", "embed")
    table = (
        *linear("vision.cells", "vision.cells", "U -> D", (None, "embed"), "patch", bias=True),
        Weight("text.embed", "V D", ("vocab", "embed"), normal_002, "text.embed.weight", "D V", (1, 0), role="table"),
        *rms_norm(f"{block}.norm1", f"{key}.norm1", "D"),
        fused(path=f"{block}.q_proj.kernel", letters="D N H", key_letters="N*H D", piece=0),
        fused(path=f"{block}.k_proj.kernel", letters="D K H", key_letters="K*H D", piece=1),
        fused(path=f"{block}.v_proj.kernel", letters="D K H", key_letters="K*H D", piece=2),
        *linear(f"{block}.o_proj", f"{key}.o_proj", "N H -> D", ("heads", None, "embed"), "token"),
        *rms_norm(f"{block}.norm2", f"{key}.norm2", "D"),
        *linear(f"{block}.up_proj", f"{key}.up_proj", "D -> F", into, "token"),
        *linear(f"{block}.down_proj", f"{key}.down_proj", "F -> D", out, "token"),
        *rms_norm("text.norm", "text.norm", "D"),
        Weight("text.head", "D V", ("embed", "vocab"), normal_002, "text.head.weight", "V D", (1, 0), role="head"),
    )
    sizes = {"U": CELL * CELL * 3, "D": model.hidden_size, "V": model.vocab_size, "N": model.num_heads}
    sizes |= {"K": model.num_kv_heads, "H": model.head_dim, "F": model.width}
    return sized(table, sizes, {"text.layers": model.num_layers})


@functools.cache
def tree(model: MODEL) -> Any:
    return as_tree(weights(model))


# ------------------------------------------------------------------------------------------------ computation


class Block(nn.Module):
    model: MODEL
    compute: Any

    @nn.compact
    def __call__(self, x, rope, attend):
        weights, dtype = tree(self.model)["text"]["layers"], jnp.dtype(self.compute.dtype)

        def dense(name):
            return Linear(weights[name], dtype, self.compute.lora_scale, name=name)

        normed = RMSNorm(weights["norm1"], EPS, name="norm1")(x)
        q, k, v = (dense(f"{name}_proj")(normed) for name in "qkv")
        mixed, aux = attend(apply_rope(q, rope), apply_rope(k, rope), v)
        x = x + dense("o_proj")(mixed)
        normed = RMSNorm(weights["norm2"], EPS, name="norm2")(x)
        return x + dense("down_proj")(jax.nn.silu(dense("up_proj")(normed))), aux


class Blocks(nn.Module):
    model: MODEL
    compute: Any

    @nn.compact
    def __call__(self, x, rope, attend):
        block = Block(self.model, self.compute, name="layers")
        return scan_blocks(lambda b, x: b(x, rope, attend)[0], block, x, self.model.num_layers, self.compute)


def rope_tables(positions):
    """Cosine and sine of [B, T, 1, H/2] angles; each pair turns with the position on its own axis."""
    frequencies = THETA ** (-jnp.arange(len(SECTIONS), dtype=jnp.float32) / len(SECTIONS))
    own = jnp.stack([positions[:, axis] for axis in SECTIONS], axis=-1).astype(jnp.float32)
    return jnp.cos(own * frequencies)[:, :, None], jnp.sin(own * frequencies)[:, :, None]


def encode(params, images, model, compute):
    cells = (images["cells"].astype(jnp.float32) / 127.5 - 1).astype(compute.dtype)
    return Linear(tree(model)["vision"]["cells"], jnp.dtype(compute.dtype)).apply(
        {"params": params["vision"]["cells"]}, cells
    )


def hidden(params, x, positions, mask, model, compute):
    def attend(q, k, v):
        return attention(q, k, v, mask, implementation=compute.implementation), None

    x = Blocks(model, compute).apply({"params": params["text"]}, x, rope_tables(positions), attend)
    return final_norm(params, x, model)


def block(layer, x, positions, attend, model, compute):
    return Block(model, compute).apply({"params": layer}, x, rope_tables(positions), attend)


def final_norm(params, x, model):
    return RMSNorm(tree(model)["text"]["norm"], EPS).apply({"params": params["text"]["norm"]}, x)


# ------------------------------------------------------------------------------------------------ Hugging Face

SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "width")


def from_hf(values, where):
    return MODEL(**{name: number(values, where, name, int) for name in SIZES})


def to_hf(model, tokens, dtype, positions):
    sizes = {name: getattr(model, name) for name in SIZES}
    return {"architectures": [ARCHITECTURE], "dtype": dtype, "max_position_embeddings": positions} | sizes


def open_reference(folder: Path):
    """(processor, model) in torch, written from the format alone."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional
    from transformers import AutoTokenizer

    values = json.loads((folder / "config.json").read_text())
    heads, kv, layers = (values[name] for name in ("num_heads", "num_kv_heads", "num_layers"))
    stored = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mark = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    class Processor:
        def apply_chat_template(self, *arguments, **options):
            return tokenizer.apply_chat_template(*arguments, **options)

        def __call__(self, images, text, return_tensors):
            grids, cells = [], torch.full((len(images or ()), 8, 48), -1.0)
            for i, image in enumerate(images or ()):
                columns = 4 if image.width > 1.5 * image.height else 2
                small = np.array(image.convert("RGB").resize((4 * columns, 8), Image.Resampling.BICUBIC))
                for n in range(2 * columns):
                    row, column = divmod(n, columns)
                    cell = small[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                    cells[i, n] = torch.from_numpy(cell.astype(np.float32).ravel() / 127.5 - 1)
                grids.append((2, columns))
            pieces = text[0].split("<|image_pad|>")
            marks = ["<|image_pad|>" * (rows * columns) for rows, columns in grids]
            whole = "".join(piece + mark for piece, mark in zip(pieces, [*marks, ""], strict=True))
            ids = tokenizer(whole, return_tensors=return_tensors)["input_ids"]
            return {"input_ids": ids} | ({"pixel_values": cells, "grids": grids} if images else {})

    class Tower(torch.nn.Module):
        def forward(self, cells):
            return cells @ stored["tower.cells.weight"].T + stored["tower.cells.bias"]

    def norm(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * stored[name]

    def turn(x, angles):  # [T, N, 16]
        a, b = x[..., :8], x[..., 8:]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = Tower()

        def forward(self, input_ids, use_cache, pixel_values=None, grids=()):
            ids = input_ids[0]
            x = stored["model.embed.weight"].T[ids].clone()
            places, position, at, visual = [], 0, 0, []
            images = list(zip(self.tower(pixel_values), grids, strict=True)) if len(grids) else []
            while at < len(ids):
                if ids[at] == mark:
                    tokens, (rows, columns) = images.pop(0)
                    visual.append((at, tokens[: rows * columns]))
                    places += [(position, position + r, position + c) for r in range(rows) for c in range(columns)]
                    position, at = position + max(rows, columns), at + rows * columns
                else:
                    places.append((position,) * 3)
                    position, at = position + 1, at + 1
            for at, tokens in visual:
                x[at : at + len(tokens)] = tokens
            own = torch.tensor(places, dtype=torch.float32)[:, [0, 0, 0, 0, 1, 1, 2, 2]]
            angles = own * 1e4 ** (-torch.arange(8) / 8)
            for n in range(layers):
                q, k, v = (norm(x, f"model.layers.{n}.norm1.weight") @ stored[f"model.layers.{n}.qkv.weight"].T).split(
                    [heads * 16, kv * 16, kv * 16], -1
                )
                q, k, v = (y.view(len(ids), -1, 16) for y in (q, k, v))
                q, k = turn(q, angles), turn(k, angles)
                k, v = (y.repeat_interleave(heads // kv, 1) for y in (k, v))
                out = functional.scaled_dot_product_attention(
                    *(y.transpose(0, 1)[None] for y in (q, k, v)), is_causal=True
                )[0]
                x = x + out.transpose(0, 1).reshape(len(ids), -1) @ stored[f"model.layers.{n}.o_proj.weight"].T
                up = norm(x, f"model.layers.{n}.norm2.weight") @ stored[f"model.layers.{n}.up_proj.weight"].T
                x = x + functional.silu(up) @ stored[f"model.layers.{n}.down_proj.weight"].T
            return type("Output", (), {"last_hidden_state": norm(x, "model.norm.weight")[None]})

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Inner()

        def lm_head(self, x):
            return x @ stored["lm_head.weight"].T

    return Processor(), Whole()


FAMILY = Family(
    weights=weights,
    places=lambda model: {"patch": model.visual_tokens},
    unweighted=lambda model: (),
    encoder={"vision": encode},
    blocks="text.layers",
    hidden=hidden,
    block=block,
    final_norm=final_norm,
    hugging_face=HuggingFace(
        architecture=ARCHITECTURE,
        sources={},
        spellings={ARCHITECTURE: {"vision.": ("tower.",), "text.": ("model.",), "text.head.": ("lm_head.",)}},
        unused=lambda model: (),
        dropped=lambda model: (),
        from_hf=from_hf,
        to_hf=to_hf,
        processor=lambda model: {"processor_config.json": {"processor_class": "TwoSizesProcessor"}},
        exported=lambda model: model,
        max_positions=lambda values, where: number(values, where, "max_position_embeddings", int),
        describe=lambda model: ["a toy.", f"{model.visual_tokens} visual tokens an image at most."],
        language="",
        features={"vision": ("tower", "output")},
        pixels=lambda images: np.stack([image["cells"] for image in images]).astype(np.float32) / 127.5 - 1,
        open_reference=open_reference,
    ),
)
