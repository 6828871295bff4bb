"""What a run tells about itself: counts of each batch, compile time, metrics files, and one decoded sample.

Throughput counts non-padding tokens, visual places included; `loss_tokens` are those with a weight; an image counts
once per row slot, which is how often it is encoded; `samples` are those of the batch's plan, bad records included.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infimed_jax import config
from infimed_jax.data.batch import NO_IMAGE, Batch
from infimed_jax.data.chat import Tokenizer
from infimed_jax.errors import UserError
from infimed_jax.files import to_json, write_text
from infimed_jax.train.board import Board

Row = dict[str, Any]
"""One step's line of metrics.jsonl."""

METRICS = "metrics.jsonl"

_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
_compiled = [0.0]


def _count_compilation(event: str, seconds: float, **_: Any) -> None:
    if event in _COMPILE_EVENTS:
        _compiled[0] += seconds


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def compile_seconds() -> float:
    """Seconds that this process has spent lowering and compiling (or reading compiled programs from the cache)."""
    return _compiled[0]


@functools.partial(jax.jit, static_argnames="visual_tokens")
def batch_counts(batch: Batch, visual_tokens: int) -> dict[str, jax.Array]:
    """Of the global batch: `tokens`, `loss_tokens`, `images` (i32), and `pairs` (f32), the query-key pairs attended."""
    used = batch.segment_ids != 0
    return {
        "tokens": jnp.sum(used),
        # Positions restart in each segment, and a token at position p attends to p + 1 keys.
        "pairs": jnp.sum(jnp.where(used, batch.positions + 1, 0).astype(jnp.float32)),
        "loss_tokens": jnp.sum(batch.loss_weights > 0),
        # build_row fills a row's image slots in order, so the highest index tells how many are used.
        "images": jnp.sum(jnp.max(batch.visual_index, axis=1) + 1) // visual_tokens,
    }


def describe_row(batch: Batch, tokenizer: Tokenizer) -> str:
    """The first segment of this process's first row that holds one, as text: «what is learnt», [36 image places]."""
    tokens, segments, weights, visual = (
        np.asarray(x.addressable_shards[0].data) if isinstance(x, jax.Array) else x
        for x in (batch.tokens, batch.segment_ids, batch.loss_weights, batch.visual_index)
    )
    filled = np.flatnonzero((segments == 1).any(axis=1))
    if not len(filled):
        return "(this process's first rows are padding)"
    row = filled[0]
    places = segments[row] == 1
    learnt = np.concatenate([[False], weights[row, :-1] > 0])[places]  # the weight at t is of predicting t + 1
    image = (visual[row] != NO_IMAGE)[places]
    pieces = []
    for (is_image, is_learnt), run in itertools.groupby(
        zip(image, learnt, tokens[row][places], strict=True), key=lambda place: (place[0], place[1])
    ):
        ids = [token for _, _, token in run]
        text = f"[{len(ids)} image places]" if is_image else tokenizer.decode(ids)
        pieces.append(f"«{text}»" if is_learnt else text)
    return "".join(pieces)


class MetricsLog:
    """metrics.jsonl (every step), TensorBoard and Weights & Biases (every `train.log_every` steps) of one run.

    Silent if not `active`. On resume, lines past `start_step` are dropped: those steps run again. UserError, on every
    process, where `train.wandb` is set and its package is not installed.
    """

    def __init__(self, folder: Path, start_step: int, cfg: config.Config, *, active: bool = True) -> None:
        self.rows = [row for row in read_metrics(folder) if row["step"] <= start_step]
        self._every = cfg.train.log_every
        self._active = active
        wandb = _wandb_package(cfg) if cfg.train.wandb else None
        if not active:
            return
        self._wandb = _wandb_run(wandb, folder, cfg) if wandb else None
        write_text(folder / METRICS, "".join(map(_line, self.rows)))
        self._file = (folder / METRICS).open("a", encoding="utf-8", buffering=1)
        self._board = Board(folder / "tensorboard", start_step + 1)

    def write(self, row: Row) -> None:
        self.rows.append(row)
        if not self._active:
            return
        self._file.write(_line(row))
        if row["step"] % self._every == 0:
            numbers = {name: value for name, value in row.items() if name != "step" and not isinstance(value, list)}
            self._board.write(numbers, row["step"])
            if self._wandb:
                self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        """Closes each, also where another's last bytes find no place on the disk."""
        if not self._active:
            return
        with contextlib.ExitStack() as stack:
            stack.callback(self._file.close)
            stack.callback(self._board.close)
            if self._wandb:
                stack.callback(self._wandb.finish)


def _wandb_package(cfg: config.Config) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"train.wandb={cfg.train.wandb} needs the wandb package: pip install wandb") from error
    return wandb


def _wandb_run(wandb: Any, folder: Path, cfg: config.Config) -> Any:
    """The run's page; its id is kept in the folder, so that a resumed run goes on there."""
    file = folder / "wandb_id.txt"
    if not file.exists():
        file.write_text(secrets.token_hex(8), encoding="utf-8")
    return wandb.init(
        project=cfg.train.wandb,
        name=f"{cfg.train.stage} {folder.name}",
        id=file.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(folder),
        config=config.to_dict(cfg),
    )


def read_metrics(folder: str | Path) -> list[Row]:
    """Lines of a run's metrics.jsonl, null read as the NaN it was; none where there is no file.

    A line cut by a kill is left out.
    """
    file = Path(folder) / METRICS
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = map(json.loads, lines[:-1])  # what stands after the last newline was never finished
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def _line(row: Row) -> str:
    return to_json(row) + "\n"


def mean_loss(rows: Sequence[Row], share: float = 0.05, *, last: bool = False) -> float:
    """Mean over the first (or last) `share` of the steps, one at least; skipped updates do not count."""
    losses = [row["loss"] for row in rows if not row["skipped"]]
    if not losses:
        return float("nan")
    count = max(1, round(share * len(losses)))
    return float(np.mean(losses[-count:] if last else losses[:count]))


def parameter_counts(trainable: Any, frozen: Any) -> tuple[int, int]:
    """Elements that learn, and elements that do not."""
    trained, fixed = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trainable, frozen))
    return trained, fixed
