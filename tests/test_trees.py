"""Flat names of leaves: both ways, and as Flax writes them."""

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from infimed_jax.trees import flatten, nest

TREE = {"text": {"norm": {"scale": np.zeros(2)}, "layers": {"q": {"kernel": np.ones(3)}}}, "step": np.array(4)}


def test_both_ways_agree_with_flax():
    flat = flatten(TREE)
    theirs = flatten_dict(TREE, sep=".")
    assert flat.keys() == theirs.keys() and all(flat[name] is theirs[name] for name in flat)
    assert nest(flat) == unflatten_dict(theirs, sep=".") == TREE
