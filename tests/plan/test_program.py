"""Each published stage's whole step traces on the pod that it names, and gives back the state it took."""

import jax
import pytest

from infimed_jax import sharding
from infimed_jax.config import Mesh
from infimed_jax.cost.chips import parse_topology
from infimed_jax.errors import UserError
from infimed_jax.plan.program import for_platform, settled, train_program
from tests.plan.stages import MODELS, STAGES, distinct, load, pod


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_splits_over_its_pod(model, stage):
    cfg, topology = for_platform(load(model, stage), "tpu"), parse_topology(pod(model))
    sizes = sharding.mesh_sizes(sharding.settle_mesh(cfg, topology.devices), topology.devices)
    mesh = sharding.abstract_mesh(**sizes)
    sharding.check_fits(cfg.model, mesh)
    assert cfg.train.global_batch % (sharding.micro_batches(cfg.train, mesh) * sharding.row_shards(mesh)) == 0


@pytest.mark.parametrize(("model", "stage"), distinct())
def test_the_whole_step_traces_on_its_pod(model, stage):
    cfg, topology = for_platform(load(model, stage), "tpu"), parse_topology(pod(model))
    sizes = sharding.mesh_sizes(sharding.settle_mesh(cfg, topology.devices), topology.devices)
    mesh = sharding.abstract_mesh(**sizes)
    with jax.sharding.use_abstract_mesh(mesh):
        program = train_program(settled(cfg, mesh, topology.chip.memory), mesh)
        state, metrics = jax.eval_shape(program.step, *program.arguments)
    seen = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec)  # noqa: E731
    # Donated, so each leaf must come back as it went in: shape, type and placement.
    assert jax.tree.map(seen, state) == jax.tree.map(seen, program.state)
    assert metrics["loss"].shape == ()


def test_rows_that_do_not_split_are_refused():
    mesh = sharding.abstract_mesh(fsdp=48)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(UserError, match="do not split"):
        train_program(load("foundation_4b", "pretrain"), mesh)


def test_the_mesh_of_a_run_is_the_mesh_of_its_plan():
    for devices in (1, 8):
        assert list(sharding.mesh_sizes(Mesh(1, -1, 0), devices).values()) == [1, devices, 1]
