"""What the rest of the package may ask about InfiMed-Foundation."""

from __future__ import annotations

from infimed_jax.models.family import Family
from infimed_jax.models.infimed.hf import HUGGING_FACE
from infimed_jax.models.infimed.text import block, final_norm, hidden
from infimed_jax.models.infimed.vision import project, vision_features
from infimed_jax.models.infimed.weights import places, unweighted, weights

FAMILY = Family(
    weights=weights,
    places=places,
    unweighted=unweighted,
    encoder={"vision": vision_features, "projector": project},
    blocks="text.layers",
    hidden=hidden,
    block=block,
    final_norm=final_norm,
    hugging_face=HUGGING_FACE,
)
