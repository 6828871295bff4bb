"""The checker of annotations is at work: a wrong shape, a wrong type and a wrong result are refused."""

import jax.numpy as jnp
import jaxtyping
import pytest

from infimed_jax.ops.pooling import adaptive_average_pool
from infimed_jax.ops.rope import apply_rope, rope_tables
from tests.annotations import checked


def test_a_wrong_shape_is_refused():
    tables = rope_tables(jnp.arange(6)[None], 8, 1e4)
    assert apply_rope(jnp.ones((1, 6, 2, 8)), tables).shape == (1, 6, 2, 8)
    with pytest.raises(jaxtyping.TypeCheckError, match="tables"):  # of other positions than x has
        apply_rope(jnp.ones((1, 5, 2, 8)), tables)


def test_a_wrong_type_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="'x'"):
        adaptive_average_pool(jnp.ones((1, 9, 2), jnp.int32), 3)


def test_a_wrong_result_is_refused():
    @jaxtyping.jaxtyped(typechecker=checked)
    def doubled(x: jaxtyping.Float[jaxtyping.Array, " n"]) -> jaxtyping.Float[jaxtyping.Array, " n"]:
        return jnp.concatenate([x, x])

    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        doubled(jnp.ones(3))
