"""Adapters: nothing changes at the start; y = x W + (alpha / r) (x A) B by hand; merged kernels compute the same."""

import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.models import lora
from infimed_jax.models.compute import Compute
from infimed_jax.models.forward import text_block
from infimed_jax.models.infimed import config as infimed
from infimed_jax.models.params import init_params
from infimed_jax.train.state import merge_params
from tests.tiny import one_device

MODEL = infimed.Model(
    vision=infimed.Vision(image_size=8, patch_size=4, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2),
    projector=infimed.Projector(visual_tokens=4),
    text=infimed.Text(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6
    ),
)
LORA = config.Lora(rank=3, alpha=6.0)
COMPUTE = Compute("float32", "none", "xla", 8, lora_scale=2.0)


@pytest.fixture(autouse=True)
def _mesh():
    with one_device():
        yield


@pytest.fixture
def params():
    return init_params(jax.random.key(0), MODEL)


def _adapted(params, settings=LORA, noise=0.3):
    adapters = lora.init_lora(jax.random.key(1), MODEL, settings)
    moved = jax.tree.map(lambda x: x + noise * jax.random.normal(jax.random.key(2), x.shape), adapters)
    return merge_params(moved, params)


def _first_layer(params, compute=COMPUTE):
    """Block 0 on fixed inputs, its attention replaced by something that shows q, k, v and feeds the o projection."""
    layer = jax.tree.map(lambda x: x[0], params["text"]["layers"])
    x = jax.random.normal(jax.random.key(3), (2, 5, 12))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 1, 5))

    def attend(q, k, v):
        return q + v.mean(axis=2, keepdims=True), (q, k, v)

    return x, *text_block(layer, x, positions, attend, MODEL, compute)


@pytest.mark.parametrize(
    ("module", "target", "inputs"),
    [("self_attn", "q_proj", 12), ("self_attn", "o_proj", 24), ("mlp", "up_proj", 12), ("mlp", "down_proj", 20)],
)
def test_adapters_start_as_pefts_do(module, target, inputs):
    """A by Kaiming's uniform rule with a = sqrt(5), which is 1 / sqrt(inputs); B zero."""
    adapter = lora.init_lora(jax.random.key(1), MODEL, config.Lora(rank=8))["text"]["layers"][module][target]
    largest = float(jnp.abs(adapter["lora_a"]).max()) * inputs**0.5
    assert 0.95 < largest <= 1 and not adapter["lora_b"].any()


def test_untrained_adapters_change_nothing(params):
    adapted = merge_params(lora.init_lora(jax.random.key(1), MODEL, LORA), params)
    for ours, plain in zip(jax.tree.leaves(_first_layer(adapted)), jax.tree.leaves(_first_layer(params)), strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_an_adapted_value_projection_is_the_formula(params):
    """v is the one product that neither norm nor rotation follows: float64 NumPy, from the normed input on."""
    adapted = _adapted(params)
    x, _, (_, _, v) = _first_layer(adapted)
    wide = np.float64(x)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    leaf = jax.tree.map(lambda a: np.float64(a[0]), adapted["text"]["layers"]["self_attn"]["v_proj"])
    expected = np.einsum("btd,dkh->btkh", normed, leaf["kernel"])
    expected += (6.0 / 3) * np.einsum("btr,rkh->btkh", normed @ leaf["lora_a"], leaf["lora_b"])
    np.testing.assert_allclose(v, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [LORA.targets, ("o_proj", "down_proj")])
def test_merged_kernels_compute_what_the_adapters_do(params, targets):
    adapted = _adapted(params, replace(LORA, targets=targets))
    merged = lora.merge_lora(adapted, lora.scale_of(LORA))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    ours = _first_layer(merged, replace(COMPUTE, lora_scale=0.0))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(_first_layer(adapted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # float32, another order of the products
    on_host = lora.merge_lora(jax.tree.map(np.asarray, adapted), lora.scale_of(LORA))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), on_host, merged)


def test_merging_on_the_host_makes_one_copy():
    """Of the float32 stack, and one layer's product: three stacks of the 4B model's MLP would be 10.7 GB."""
    rng = np.random.default_rng(0)
    leaf = {
        "kernel": rng.standard_normal((16, 96, 128), np.float32).astype(jnp.bfloat16),
        lora.A: rng.standard_normal((16, 96, 2), np.float32),
        lora.B: rng.standard_normal((16, 2, 128), np.float32),
    }
    tracemalloc.start()
    merged = lora.merge_lora(leaf, 0.5)["kernel"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    layer = merged[0].nbytes
    assert merged.nbytes <= peak < merged.nbytes + 4 * layer
    expected = leaf["kernel"].astype(np.float64) + 0.5 * np.einsum("lir,lro->lio", leaf[lora.A], leaf[lora.B])
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_counts_and_shapes(params):
    adapters = lora.init_lora(jax.random.key(1), MODEL, LORA)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == lora.param_count(MODEL, LORA)
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        *parents, which = [entry.key for entry in path]
        kernel = params
        for name in parents:
            kernel = kernel[name]
        rank_axis = leaf.ndim - 1 if which == "lora_a" else 1
        assert leaf.shape[rank_axis] == 3
        rest = leaf.shape[1:rank_axis] if which == "lora_a" else leaf.shape[2:]
        assert rest == (
            kernel["kernel"].shape[1 : 1 + len(rest)] if which == "lora_a" else kernel["kernel"].shape[-len(rest) :]
        )


def test_a_target_that_the_model_lacks_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'qproj' is none of the model's .*'q_proj'"):
        lora.adapted(MODEL, replace(LORA, targets=("qproj",)))
