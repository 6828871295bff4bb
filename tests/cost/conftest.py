"""The model of a few thousand parameters that tests/train uses."""

import pytest

from infimed_jax.config import Model
from tests.train.conftest import MODEL


@pytest.fixture
def model() -> Model:
    return MODEL
