"""The one attention entry: a mask specification, a backend chosen by platform, no silent fallback.

To add a kernel, write a module with a `BACKEND` and name it in `train.attention`.
"""

from __future__ import annotations

import functools
import logging

import jax
from jaxtyping import Float

from infimed_jax.arrays import Array
from infimed_jax.errors import UserError
from infimed_jax.ops.attention.backend import Backend, backend, backend_names
from infimed_jax.ops.attention.mask import Mask

__all__ = ["Backend", "Mask", "attention", "backend", "backend_names", "platform_backend", "shares_prefixes"]

_OTHERWISE = "xla"
"""The backend of platforms that no backend claims."""

log = logging.getLogger(__name__)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention, scaled by 1/sqrt(H), N/K queries to a key head; a query that sees nothing returns zeros.

    `implementation` names a backend; None is the platform's own, and that choice is logged once. Raises UserError for
    an unknown name, and for devices, shapes and masks that the backend refuses.
    """
    name = implementation or _choice(jax.default_backend())
    chosen = backend(name)
    if why := _refusal(name, chosen, q, k, mask):
        raise UserError(why)
    return chosen.run(q, k, v, mask)


def _refusal(name: str, chosen: Backend, q: Array, k: Array, mask: Mask) -> str:
    if mask.query_prefixes is not None and not chosen.prefixes:
        return f"attention {name} lets a query see one segment: a prefix that segments share needs train.attention=xla"
    if why := chosen.refuses(q.shape, k.shape, mask):
        return why
    device = jax.sharding.get_abstract_mesh().abstract_device  # None where the mesh is abstract too
    if chosen.only and device is not None and device.platform != chosen.only:
        return (
            f"train.attention={name} is a kernel for {chosen.only.upper()}s, and this runs on {device.platform}: "
            "set train.attention=auto"
        )
    return ""


def shares_prefixes(implementation: str | None) -> bool:
    """Whether that backend (None: the platform's own) takes a mask with `query_prefixes`."""
    return backend(implementation or _choice(jax.default_backend())).prefixes


def platform_backend(platform: str) -> str:
    """The name of the backend that `train.attention=auto` means on a JAX platform."""
    return next((name for name in backend_names() if platform in backend(name).platforms), _OTHERWISE)


@functools.cache
def _choice(platform: str) -> str:
    name = platform_backend(platform)
    log.info("attention: %s on %s", name, platform)
    return name
