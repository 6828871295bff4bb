"""What the rest of the package may ask of an attention kernel; a backend is one module with a `BACKEND`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from jaxtyping import Float

from infimed_jax import plugins
from infimed_jax.arrays import Array
from infimed_jax.errors import UserError
from infimed_jax.ops.attention.mask import Mask

ROOM = "infimed_jax.ops.attention.backends"


@dataclass(frozen=True)
class Backend:
    """A kernel, and the facts by which it is chosen, refused and planned for.

    Its arrays lie on an explicit mesh, split over B and N: call a kernel that knows no shardings under
    `jax.shard_map`, as `backends/rows.py` does.
    """

    run: Callable[[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"], Mask], Array]
    """(q, k, v, mask) to [B, T, N, H]: scores scaled by 1/sqrt(H); a query that sees nothing returns zeros."""
    platforms: tuple[str, ...] = ()
    """JAX platforms on which `train.attention=auto` takes it."""
    only: str = ""
    """The one JAX platform on which it runs; empty: all."""
    prefixes: bool = False
    """Whether it honours `Mask.query_prefixes`."""
    refuses: Callable[[tuple[int, ...], tuple[int, ...], Mask], str] = lambda q, k, mask: ""
    """(shape of q, shape of k, mask) to why it cannot compute them and what to do instead; empty if it can."""
    fused: bool = False
    """Whether scores never reach the device's memory."""
    dense: bool = False
    """Whether all scores of a row exist at once, so that a layer needs memory quadratic in T."""
    causal_keys: Callable[[int], int] = lambda length: length
    """Keys computed for each query, on average, in a causal row of this many tokens."""
    backward_products: int = 4
    """Matrix products of the backward pass, scores that are computed again included."""


def backend(name: str) -> Backend:
    """The backend that `train.attention` names: a module of this project, a dotted module, or a .py file.

    Raises UserError where there is none.
    """
    found = getattr(_module(name), "BACKEND", None)
    if not isinstance(found, Backend):
        raise UserError(f"train.attention={name}: the module has no BACKEND, an infimed_jax.ops.attention.Backend")
    return found


@functools.cache
def _module(name: str) -> ModuleType:
    return plugins.load(ROOM, name, "train.attention")


def backend_names() -> list[str]:
    """The backends that this project ships."""
    return plugins.names(ROOM)
