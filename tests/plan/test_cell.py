"""A cell of the plan: exact parameters and state, estimates that move as they must, and the order of the table."""

from pathlib import Path

import jax
import numpy as np
import pytest

from infimed_jax import config, sharding
from infimed_jax.config import Mesh
from infimed_jax.cost.chips import parse_topology
from infimed_jax.cost.memory import state_bytes
from infimed_jax.errors import UserError
from infimed_jax.plan import table
from infimed_jax.plan.cell import best_first, counted
from infimed_jax.plan.program import train_program

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIB = 2**30


def stage(model: str, name: str, *settings: str) -> config.Config:
    return config.load([CONFIGS / f"models/{model}.yaml", CONFIGS / f"stages/{name}.yaml"], settings)


def _tiny(*settings: str) -> config.Config:
    """The stage's 144 visual tokens are more than the tiny model's patches: only the whole is validated."""
    files = [CONFIGS / "models/tiny.yaml", CONFIGS / "stages/pretrain.yaml", CONFIGS / "runs/quickstart/pretrain.yaml"]
    return config.load(files, settings)


@pytest.fixture(scope="module")
def pretrain():
    return counted(stage("foundation_4b", "pretrain", "train.remat=full"), parse_topology("v5p:2x4x4"), Mesh(1, -1, 1))


def test_parameters_are_the_published_models(pretrain):
    counts = pretrain["parameters"]
    assert (counts["text"], counts["vision"]) == (4_022_468_096, 397_745_440)
    # Linear(1152, 2560) and Linear(2560, 2560), with biases.
    assert counts["projector"] == 1152 * 2560 + 2560 + 2560 * 2560 + 2560
    assert counts["total"] == sum(counts[part] for part in ("text", "vision", "projector"))


def test_state_of_a_device_is_its_share(pretrain):
    counts, memory = pretrain["parameters"], pretrain["memory"]
    learnt = counts["text"] + counts["projector"]
    # float32 masters of what learns, bfloat16 of the frozen tower, over 32 devices; what 32 does not divide stays
    # whole: below 1 %.
    np.testing.assert_allclose(memory["parameters"], (4 * learnt + 2 * counts["vision"]) / 32, rtol=0.01)
    np.testing.assert_allclose(memory["moments"], 8 * learnt / 32, rtol=0.01)
    np.testing.assert_allclose(memory["gradients"], 4 * learnt / 32, rtol=0.01)
    assert memory["batch"] == 8 * (5 * 4096 * 4 + 24 * 384 * 384 * 3)


def test_flops_follow_the_rule_of_six(pretrain):
    """Six FLOPs a parameter and token for what learns, two for a frozen tower; attention comes on top."""
    counts, tokens = pretrain["parameters"], pretrain["tokens_a_step"]
    text = 6 * counts["text"] * tokens
    vision = 2 * counts["vision"] * pretrain["images_a_step"] * 729
    model = pretrain["flops_a_step"]["model"]
    assert text + vision < model < 1.25 * (text + vision)
    # Recomputing the blocks costs about a forward pass of them more.
    assert 1.15 < pretrain["flops_a_step"]["total"] / model < 1.4


@pytest.mark.parametrize(
    ("model", "name", "topology", "tensor", "remat", "needed"),
    [
        ("foundation_4b", "pretrain", "v5p:2x4x4", 1, "full", 22.59),
        ("foundation_4b", "sft_medical", "v5p:2x4x4", 1, "dots", 45.70),
        ("foundation_4b", "sft_medical", "v5p:2x4x4", 2, "dots", 49.71),
        ("foundation_4b", "grpo", "v5p:2x4x4", 1, "full", 12.39),
        ("foundation_1p7b", "pretrain", "v6e:8x8", 1, "full", 9.96),
        ("foundation_1p7b", "sft_medical", "v6e:8x8", 1, "dots", 15.56),
        ("foundation_1p7b", "grpo", "v6e:8x8", 1, "full", 6.56),
    ],
)
def test_the_estimate_agrees_with_compilations(model, name, topology, tensor, remat, needed):
    """`needed`: GiB a chip that libtpu 0.0.42.1 found for these cells (`make test-aot`, `plan`), in one micro-batch."""
    settings = (f"train.remat={remat}", "train.rows_per_device=0")
    cell = counted(stage(model, name, *settings), parse_topology(topology), Mesh(1, -1, tensor))
    update = cell["memory"]["needed"] - cell["memory"]["reference"]  # which is no argument of the compiled update
    np.testing.assert_allclose(update, needed * GIB, rtol=0.05)


@pytest.mark.parametrize("kl", [0.01, 0.0])
def test_the_reference_stays_beside_update_and_rollout_where_there_is_one(kl):
    settings = ("train.remat=full", f"grpo.kl_coefficient={kl}")
    cell = counted(stage("foundation_1p7b", "grpo", *settings), parse_topology("h100x32"), Mesh(1, -1, 1))
    memory, found = cell["memory"], cell["rollout"]
    assert memory["reference"] == (memory["parameters"] if kl else 0)
    parts = ("parameters", "moments", "batch", "gradients", "reference", "activations_and_temporaries")
    assert memory["needed"] == sum(memory[part] for part in parts)
    held = memory["parameters"] + memory["reference"] + memory["moments"]
    assert found["needed"] == held + found["sampler_weights"] + found["cache"]
    assert memory["available"] == 0.9 * 80e9  # what `launch/run.py` gives to JAX on a GPU
    assert (
        counted(stage("foundation_1p7b", "pretrain", *settings), parse_topology("h100x32"), Mesh(1, -1, 1))["memory"][
            "reference"
        ]
        == 0
    )


def test_the_state_agrees_with_a_compilation(pretrain):
    """libtpu 0.0.42.1 found so many bytes of state and batch; the device's layout pads."""
    memory = pretrain["memory"]
    state = memory["parameters"] + memory["moments"] + memory["batch"]
    np.testing.assert_allclose(state, 1_634_747_904, rtol=0.02)


def test_more_devices_hold_and_compute_less():
    cfg = stage("foundation_1p7b", "sft_medical", "train.remat=full")
    few, many = (counted(cfg, parse_topology(name), Mesh(1, -1, 1)) for name in ("h100x16", "h100x32"))
    assert few["estimate"] and many["estimate"]
    np.testing.assert_allclose(few["memory"]["moments"], 2 * many["memory"]["moments"], rtol=0.01)
    assert few["flops_a_step"]["total"] == many["flops_a_step"]["total"]
    assert few["flops_a_step"]["device"] == 2 * many["flops_a_step"]["device"]
    assert few["roofline"]["peak_share"] <= 1


def test_a_tower_that_does_not_fit_is_said_so_and_comes_last():
    cfg = stage("foundation_4b", "pretrain", "train.remat=none")
    cells = [counted(cfg, parse_topology(name), Mesh(1, -1, 1)) for name in ("v5e:4x4", "h200x128")]
    assert not cells[0]["fits"]
    cells[1] |= {"fits": True}
    assert [cell["topology"] for cell in best_first(cells)] == ["h200x128", "v5e:4x4"]
    text = table.render(best_first(cells))
    assert "~NO" in text and text.index("h200x128") < text.index("v5e:4x4")


def test_the_table_goes_by_the_time_of_a_device():
    """16 devices in 0.6 s cost more than 8 in 1 s; twice the tokens in 1.5 s cost less."""
    plain = {"fits": True, "devices": 8, "tokens_a_step": 100, "roofline": {"step_seconds": 1.0}}
    cells = [
        plain | {"name": "more", "devices": 16, "roofline": {"step_seconds": 0.6}},
        plain | {"name": "plain"},
        plain | {"name": "long", "tokens_a_step": 200, "roofline": {"step_seconds": 1.5}},
        plain | {"name": "too small", "fits": False, "roofline": {"step_seconds": 0.1}},
    ]
    assert [cell["name"] for cell in best_first(cells)] == ["long", "plain", "more", "too small"]


@pytest.mark.parametrize(
    ("mesh", "word"),
    [
        (Mesh(3, -1, 1), "= 3 does not divide the 16 devices"),
        (Mesh(1, 1, 16), "does not divide"),
        (Mesh(1, -1, 0), None),
    ],
)
def test_a_mesh_that_cannot_be(mesh, word):
    cfg = stage("foundation_4b", "pretrain", "train.remat=full")
    if word is None:
        assert counted(cfg, parse_topology("v5p:2x2x4"), mesh)["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
        return
    with pytest.raises(UserError, match=word):
        counted(cfg, parse_topology("v5p:2x2x4"), mesh)


def test_gpus_have_no_splash_attention():
    asked = stage("foundation_1p7b", "pretrain", "train.remat=full", "train.attention=splash")
    assert counted(asked, parse_topology("v5p:2x4x4"), Mesh(1, -1, 1))["attention"] == "splash"
    with pytest.raises(UserError, match=r"kernel for TPUs, and h100x32 has none: set train.attention=auto"):
        counted(asked, parse_topology("h100x32"), Mesh(1, -1, 1))


def test_state_bytes_are_those_of_real_arrays():
    """One device: what the abstract state says is what `init_state` makes."""
    from infimed_jax.models.params import init_params
    from infimed_jax.train.optimizer import make_optimizer
    from infimed_jax.train.state import init_state

    cfg = _tiny("train.remat=full", "train.global_batch=2")
    mesh = sharding.make_mesh(Mesh(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = train_program(cfg, mesh)
        state = init_state(init_params(jax.random.key(0), cfg.model), cfg, make_optimizer(cfg.optimizer))
    held = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    found = state_bytes(program.state, program.batch)
    assert found["parameters"] == held(state.trainable) + held(state.frozen)
    assert found["moments"] == held(state.opt)
