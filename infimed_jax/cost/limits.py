"""Sizes that no machine here can hold, refused by their bytes before any work."""

from __future__ import annotations

import os

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.cost.chips import GIB
from infimed_jax.cost.memory import device_bytes
from infimed_jax.errors import UserError
from infimed_jax.models.params import param_count

_ROW_ARRAYS = 5
"""Arrays of a batch with four bytes a token, beside positions: tokens, segments, weights, image places, prefixes."""


def host_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def batch_bytes(cfg: config.Config, processes: int) -> int:
    """A process's part of one global batch, on the host."""
    image = sum(leaf.nbytes for leaf in jax.tree.leaves(cfg.model.blank_image()))
    tokens = 4 * (_ROW_ARRAYS + cfg.model.position_axes) * cfg.data.context
    return cfg.train.global_batch * (tokens + cfg.data.images_per_row * image) // processes


def refuse_sizes(cfg: config.Config, mesh: jax.sharding.Mesh) -> None:
    """UserError: the parameters alone exceed all devices, or one batch the host."""
    count, itemsize = param_count(cfg.model)["total"], np.dtype(cfg.train.compute_dtype).itemsize
    needed, there = count * itemsize, device_bytes(mesh) * mesh.size
    if needed > there:
        raise UserError(
            f"the model of these settings has {count:,} parameters, {needed / GIB:,.0f} GiB in "
            f"{cfg.train.compute_dtype}, and the {mesh.size} devices hold {there / GIB:,.0f}: make it smaller (model.…)"
        )
    needed, there = batch_bytes(cfg, jax.process_count()), host_bytes()
    if needed > there:
        raise UserError(
            f"a batch of train.global_batch={cfg.train.global_batch:,} rows of data.context={cfg.data.context:,} "
            f"tokens and data.images_per_row={cfg.data.images_per_row:,} images takes {needed / GIB:,.0f} GiB on each "
            f"host, and this one has {there / GIB:,.0f}: lower one of them"
        )
