"""Flat names of leaves: both ways, and as Flax writes them."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from infimed_jax.trees import flatten, nest

TREE = {"text": {"norm": {"scale": np.zeros(2)}, "layers": {"q": {"kernel": np.ones(3)}}}, "step": np.array(4)}


@pytest.mark.parametrize("separator", [".", "/"])
def test_both_ways_agree_with_flax(separator):
    flat = flatten(TREE, separator)
    theirs = flatten_dict(TREE, sep=separator)
    assert flat.keys() == theirs.keys() and all(flat[name] is theirs[name] for name in flat)
    assert nest(flat, separator) == unflatten_dict(theirs, sep=separator) == TREE
