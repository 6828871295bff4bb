"""FLOPs by formula against the matrix products in the traced step, counted one by one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infimed_jax import config, sharding
from infimed_jax.cost.chips import peak_flops
from infimed_jax.cost.flops import products as step_products
from infimed_jax.cost.flops import step_flops
from infimed_jax.data.batch import Batch
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.models.infimed import config as infimed
from infimed_jax.ops.attention import Mask, attention
from infimed_jax.train.optimizer import make_optimizer
from infimed_jax.train.state import abstract_state, merge_params
from tests.tiny import one_device

ROWS, TOKENS, IMAGES = 2, 40, 2


def inside(equation):
    """The programs that an equation runs: a scan's body, a kernel, a branch."""
    for value in equation.params.values():
        for sub in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                yield getattr(sub, "jaxpr", sub)


def products(jaxpr) -> float:
    """FLOPs of every dot_general; a scan's body as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shared = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * shared * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(products, inside(equation)))
    return total


def dots(jaxpr) -> int:
    """Products of matrices as they are written, in kernels too; a sum of products row by row is none."""
    return sum((e.primitive.name == "dot_general" and _outer(e)) + sum(map(dots, inside(e))) for e in jaxpr.eqns)


def _outer(equation) -> bool:
    (left, _), (batch, _) = equation.params["dimension_numbers"]
    return equation.invars[0].aval.ndim > len(left) + len(batch)


def _batch(side: int) -> Batch:
    i32 = jnp.zeros((ROWS, TOKENS), jnp.int32)
    return Batch(
        i32, i32, i32[:, None], jnp.zeros((ROWS, TOKENS)), i32, jnp.zeros((ROWS, IMAGES, side, side, 3), jnp.uint8)
    )


@pytest.mark.parametrize(
    ("parts", "rank"),
    [(("projector", "text"), 0), (("projector",), 0), (("vision", "projector", "text"), 0), (("projector", "text"), 4)],
)
def test_the_formula_counts_the_products_of_forward_and_backward_pass(model, parts, rank):
    train = config.Train(
        train=parts, lora=config.Lora(rank=rank), compute_dtype="float32", remat="none", attention="xla"
    )
    cfg = config.Config(model=model, train=train)
    with one_device():
        state = abstract_state(cfg, make_optimizer(cfg.optimizer))
        batch = sharding.place_batch(_batch(model.vision.image_size), jax.sharding.get_mesh())

        def objective(trainable, frozen):
            return forward.hidden_states(merge_params(trainable, frozen), batch, model, Compute.of(train)).sum()

        traced = jax.make_jaxpr(jax.value_and_grad(objective))(state.trainable, state.frozen)
    # The XLA backend computes every pair of a row. The loss's head is apart: it recomputes its logits.
    counts = {"tokens": ROWS * TOKENS, "pairs": ROWS * TOKENS**2, "images": ROWS * IMAGES, "loss_tokens": 0}
    assert products(traced.jaxpr) == step_flops(model, train).of(counts)


@pytest.mark.parametrize("name", ["xla", "rows", "splash"])
def test_each_attention_s_backward_pass_has_so_many_products(name):
    def loss(q, k, v):
        return attention(q, k, v, Mask(causal=True), implementation=name).sum()

    q, k = (jax.ShapeDtypeStruct((1, 256, heads, 128), jnp.float32) for heads in (4, 2))
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh()):  # splash refuses a CPU's
        forward = dots(jax.make_jaxpr(loss)(q, k, k).jaxpr)
        both = dots(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, k).jaxpr)
    cfg = config.Config(train=config.Train(attention="auto" if name == "xla" else name))
    scores, mix = (item for item in step_products(cfg, 1) if item.part == "text" and item.name in ("scores", "mix"))
    assert (forward, both - forward) == (scores.forward + mix.forward, scores.backward + mix.backward)


def test_a_loss_token_costs_its_logits(model):
    learnt = step_flops(model, config.Train())
    adapted = step_flops(model, config.Train(lora=config.Lora(rank=2)))
    logits = 2 * model.text.hidden_size * model.text.vocab_size
    assert (learnt.loss_token, adapted.loss_token) == (3 * logits, 2 * logits)


def test_the_4b_model_costs_six_flops_a_parameter_and_token():
    """The rule of thumb, on the text model's matrices: 36 layers of 100.9M parameters and a 389M head."""
    flops = step_flops(infimed.Model(), config.Train())
    layers = 36 * (2560 * 128 * (32 + 16) + 32 * 128 * 2560 + 3 * 2560 * 9728)
    np.testing.assert_allclose(flops.token + flops.loss_token, 6 * (layers + 151_936 * 2560))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),  # two devices a chip
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_device_kind(kind, expected):
    assert peak_flops(kind) == expected
