"""The move of a trainer's parameters to the sampler changes layout and precision, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

from infimed_jax.sampling.weights import sampler_weights


def test_matrices_are_cast_norms_are_not_and_layers_are_unstacked(tiny):
    weights = sampler_weights(tiny.params, tiny.model, "bfloat16")
    assert len(weights["text"]["layers"]) == tiny.model.text.num_layers
    restacked = jax.tree.map(lambda *x: np.stack([np.asarray(leaf) for leaf in x]), *weights["text"]["layers"])
    moved = weights | {"text": weights["text"] | {"layers": restacked}}
    pairs = zip(jax.tree.leaves_with_path(tiny.params), jax.tree.leaves_with_path(moved), strict=True)
    for (path, before), (same, after) in pairs:
        assert path == same
        norm = "norm" in jax.tree_util.keystr(path)
        assert after.dtype == (jnp.float32 if norm else jnp.bfloat16), path
        np.testing.assert_array_equal(np.asarray(before).astype(after.dtype), after)
