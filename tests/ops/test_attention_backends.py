"""A backend of the user's own, in one file: it computes, it refuses, it trains and it is planned for."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.config import ConfigError, from_dict
from infimed_jax.cost.flops import products
from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.errors import UserError
from infimed_jax.models.compute import Compute
from infimed_jax.models.params import init_params
from infimed_jax.ops.attention import Mask, attention, backend
from infimed_jax.train.step import next_token_loss
from tests import tiny
from tests.ops.test_attention import random_qkv

KERNEL = """
import dataclasses
from infimed_jax.ops.attention.backends.xla import BACKEND as XLA

calls = []

def run(q, k, v, mask):
    calls.append(q.shape)
    return XLA.run(q, k, v, mask)

def refuses(q, k, mask):
    return "heads of 7 are too odd: use another model" if q[3] == 7 else ""

BACKEND = dataclasses.replace(
    XLA, run=run, refuses=refuses, only="", platforms=("no such platform",), prefixes=False, fused=True, dense=False,
    causal_keys=lambda length: length // 2, backward_products=9,
)
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "kernel_of_my_own.py"
    file.write_text(KERNEL)
    yield str(file)
    sys.modules.pop("kernel_of_my_own", None)


def test_it_is_used_by_the_entry_and_by_a_train_step(kernel):
    model = tiny.model()
    rng = np.random.default_rng(0)
    segment = Segment(rng.integers(1, 32, 24).astype(np.int32), np.ones(24, np.float32), np.zeros(24, bool))
    batch = stack_rows([build_row([segment], context=32, images=0, model=model)])
    with tiny.one_device():
        params = init_params(jax.random.key(0), model)
        losses = {name: next_token_loss(model, Compute("float32", "none", name, 16)) for name in ("xla", kernel)}
        gradients = {name: jax.grad(lambda p, loss=loss: loss(p, batch)[0])(params) for name, loss in losses.items()}
    jax.tree.map(np.testing.assert_array_equal, gradients["xla"], gradients[kernel])
    assert sys.modules["kernel_of_my_own"].calls[0] == (1, 32, 4, 8)


def test_what_it_refuses_is_refused(kernel):
    q, k, v = random_qkv(np.random.default_rng(0), width=7)
    with pytest.raises(UserError, match="heads of 7 are too odd"):
        attention(q, k, v, Mask(), implementation=kernel)
    q, k, v = random_qkv(np.random.default_rng(0), queries=6, keys=6)
    ids = jnp.ones((q.shape[0], 6), jnp.int32)
    with pytest.raises(UserError, match=r"a prefix that segments share needs train.attention=xla"):
        attention(q, k, v, Mask(True, ids, ids, query_prefixes=ids), implementation=kernel)


def test_its_work_is_counted(kernel):
    cfg = config.Config(train=config.Train(attention=kernel, remat="none"))
    scores = next(item for item in products(cfg, 1) if (item.part, item.name) == ("text", "scores"))
    assert (scores.outer, scores.fused, scores.backward) == (cfg.data.context // 2, True, 7)
    dense = next(
        item
        for item in products(dataclasses.replace(cfg, train=config.Train(attention="xla", remat="none")), 1)
        if (item.part, item.name) == ("text", "scores")
    )
    assert (dense.outer, dense.fused, dense.backward) == (cfg.data.context, False, 2)


def test_an_unknown_name_is_refused_where_settings_are_read():
    with pytest.raises(UserError, match=r"train.attention must be one of auto, rows, splash, xla, not 'splsh'; did"):
        from_dict(config.Config, {"train": {"attention": "splsh"}})
    with pytest.raises(ConfigError, match=r"train.attention must be str"):
        from_dict(config.Config, {"train": {"attention": 3}})


def test_a_module_without_a_backend_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "no_kernel_at_all.py").write_text("")
    with pytest.raises(UserError, match=r"no_kernel_at_all.py: the module has no BACKEND"):
        backend(str(tmp_path / "no_kernel_at_all.py"))
    sys.modules.pop("no_kernel_at_all", None)
