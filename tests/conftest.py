"""Settings of the whole suite."""

import os

# LLVM need not optimise programs that run once; XLA's own passes stay. Child
# processes inherit it. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jaxtyping
from hypothesis import HealthCheck, settings

from tests import annotations

# A busy machine must fail nothing: neither an example's time nor that of drawing it is asserted.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

ANNOTATED = [f"infimed_jax.{room}" for room in ("models", "ops", "sampling", "rl", "train")]
"""Rooms whose annotations, shapes included, hold while the tests run."""
jaxtyping.install_import_hook(ANNOTATED, f"{annotations.__name__}.checked")
