"""Parameters as the sampler wants them; one `tree.map` moves a trainer's weights here, once a sync."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from infimed_jax import config
from infimed_jax.models.compute import Compute
from infimed_jax.models.family import family_of, table_path
from infimed_jax.models.params import Params
from infimed_jax.sharding import spec_of
from infimed_jax.trees import at, put


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weights",), meta_fields=("model", "compute"))
@dataclass(frozen=True)
class Decoder:
    """A model ready to decode, as the compiled programs take it: the weights are data, the rest is static."""

    weights: dict[str, Any]
    """From `sampler_weights`."""
    model: config.Model
    compute: Compute

    @property
    def layers(self) -> list[Params]:
        """Each text layer's own parameters."""
        return at(self.weights, family_of(self.model).blocks)


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def sampler_weights(params: Params, model: config.Model, dtype: str) -> dict[str, Any]:
    """The tree of `init_params` in `dtype`, off `fsdp`, its text layers a list of per-layer trees.

    Unstacked, because decoding a scanned stack copies the cache; off fsdp, because every token would gather the model.
    Norms stay float32, as the trainer computes them, so the casts are the trainer's own and change no number. The
    embedding is whole on every device: otherwise a lookup would gather it for every token.
    """
    blocks, table = family_of(model).blocks, table_path(model)
    layers = [jax.tree.map(lambda x, i=i: x[i], at(params, blocks)) for i in range(model.num_layers)]
    moved = _move(put(params, blocks, layers), dtype)
    return put(moved, table, jax.sharding.reshard(at(moved, table), PartitionSpec()))


def _move(tree: Any, dtype: str) -> Any:
    if isinstance(tree, list):
        return [_move(branch, dtype) for branch in tree]
    if isinstance(tree, dict):
        norm = "scale" in tree
        return {name: _move(branch, "float32" if norm else dtype) for name, branch in tree.items()}
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec_of(tree)))
    return jax.sharding.reshard(tree.astype(dtype), whole)
