"""What the rest of the package may ask about InfiMed-Foundation."""

from __future__ import annotations

from infimed_jax.models.family import Family
from infimed_jax.models.infimed.weights import places, unweighted, weights

FAMILY = Family(weights=weights, places=places, unweighted=unweighted)
