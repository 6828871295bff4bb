import jax
import pytest

from infimed_jax import config, sharding


@pytest.fixture(autouse=True)
def mesh():
    """Every model function runs under an explicit mesh; here one CPU device."""
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])) as mesh:
        yield mesh
