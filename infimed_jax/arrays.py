"""The arrays of annotations: on the devices or, where a function takes them before they are placed, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:  # static checkers are told what a function computes with and returns
    Array = jax.Array
else:  # what it may be called with, which tests check as they run
    Array = jax.Array | np.ndarray
