"""Sizes beyond any machine are refused by their bytes, at once, and a size that fits is not."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from infimed_jax.config import Config, Data, Mesh, Train
from infimed_jax.cost.chips import parse_topology
from infimed_jax.cost.limits import batch_bytes, refuse_sizes
from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.errors import UserError
from infimed_jax.models.params import abstract_params
from infimed_jax.sharding import make_mesh
from tests import tiny

MODEL = tiny.model()
CONFIG = Config(model=MODEL, data=Data(context=64, images_per_row=3), train=Train(global_batch=4))


def test_a_batch_is_counted_as_it_is_laid_out():
    words = Segment(np.arange(5, dtype=np.int32), np.ones(5, np.float32), np.zeros(5, bool))
    branch = replace(words, continues=1)
    rows = [build_row((words, branch), context=64, images=3, model=MODEL) for _ in range(4)]
    assert batch_bytes(CONFIG, 1) == sum(leaf.nbytes for leaf in jax.tree.leaves(stack_rows(rows)))
    assert batch_bytes(CONFIG, 2) == batch_bytes(CONFIG, 1) // 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": Data(context=10**12)}, r"data\.context=1,000,000,000,000 tokens .* takes [\d,]+ GiB on each host"),
        ({"data": Data(images_per_row=10**12)}, r"data\.images_per_row=1,000,000,000,000 images takes"),
        ({"train": Train(global_batch=10**9)}, r"train\.global_batch=1,000,000,000 rows"),
        ({"model": tiny.model(num_layers=10**9)}, r"has [\d,]+ parameters, [\d,]+ GiB in bfloat16, and the 1 devices"),
        ({"model": tiny.model(hidden_size=10**9)}, r"GiB in bfloat16"),
    ],
)
def test_what_no_machine_holds_is_refused_by_its_bytes(change, words):
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    refuse_sizes(CONFIG, mesh)
    with pytest.raises(UserError, match=words):
        refuse_sizes(replace(CONFIG, **change), mesh)


def test_the_message_counts_the_parameters():
    model, mesh = tiny.model(num_layers=10**9), make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))
    with pytest.raises(UserError, match=f"has {count:,} parameters"):
        refuse_sizes(replace(CONFIG, model=model), mesh)


@pytest.mark.parametrize("name", ["h100x99999999999", "v5p:99999x99999x99999"])
def test_a_machine_that_cannot_be_described_is_refused(name):
    with pytest.raises(UserError, match=r"to describe .* devices takes .* GiB"):
        parse_topology(name)
