"""The arrays of annotations: on the devices or, where a function takes them before they are placed, on the host."""

from __future__ import annotations

import jax
import numpy as np

Array = jax.Array | np.ndarray
