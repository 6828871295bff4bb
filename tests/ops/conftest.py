import jax
import pytest

from infimed_jax import config, sharding


@pytest.fixture(autouse=True)
def mesh():
    """Ops name their outputs' shardings, so they run under an explicit mesh; here one CPU device."""
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])) as mesh:
        yield mesh
