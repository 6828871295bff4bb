"""One cell of the table: a configuration on one topology and mesh, as plain values for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from infimed_jax import config, sharding
from infimed_jax.cost.chips import Topology
from infimed_jax.cost.flops import by_part, device_flops, products
from infimed_jax.cost.memory import activation_estimate, state_bytes
from infimed_jax.errors import UserError
from infimed_jax.models.params import param_count
from infimed_jax.ops.attention import backend
from infimed_jax.plan import collectives as network
from infimed_jax.plan.compile import compile_step
from infimed_jax.plan.program import for_platform, is_grpo, rows_and_pieces, settled, train_program
from infimed_jax.plan.rollout import rollout
from infimed_jax.plan.roofline import roofline

GPU_SHARE = 0.9
"""Share of the vendor's memory that `launch/run.py` gives to JAX; driver and libraries use the rest."""

Cell = dict[str, Any]


def counted(cfg: config.Config, topology: Topology, mesh: config.Mesh) -> Cell:
    """Everything that follows from the configuration alone, in less than a few seconds, and without a device.

    Raises UserError where the mesh divides neither the devices, the model nor the batch, or GPUs lack the kernel.
    """
    platform = "tpu" if topology.chip.tpu else "gpu"
    cfg = dataclasses.replace(for_platform(cfg, platform), mesh=mesh)
    only = backend(cfg.train.attention).only
    if only not in ("", platform):
        raise UserError(
            f"train.attention={cfg.train.attention} is a kernel for {only.upper()}s, and {topology.name} has none: "
            "set train.attention=auto"
        )
    sizes = sharding.mesh_sizes(sharding.settle_mesh(cfg, topology.devices), topology.devices)
    abstract = sharding.abstract_mesh(**sizes)
    with jax.sharding.use_abstract_mesh(abstract):
        cfg = settled(cfg, abstract, topology.chip.memory)
        program = train_program(cfg, abstract)
        rows, pieces = rows_and_pieces(cfg, abstract)
    state = state_bytes(program.state, program.batch)
    work, moved = products(cfg, rows), network.collectives(cfg, rows, sizes, pieces)
    bound = roofline(cfg, topology, sizes, work, moved, state["gradients"], state["moments"])
    activations = activation_estimate(cfg, rows // pieces, sizes)
    # GRPO's reference is as large as the parameters, and stays while it updates as while it samples.
    reference = state["parameters"] if is_grpo(cfg) and cfg.grpo.kl_coefficient > 0 else 0
    available = int(topology.chip.memory * (1.0 if topology.chip.tpu else GPU_SHARE))
    needed = sum(state.values()) + reference + activations
    tokens = rows * cfg.data.context
    return {
        "stage": cfg.train.stage,
        "lora": cfg.train.lora.rank,
        "topology": topology.name,
        "devices": topology.devices,
        "mesh": sizes,
        "remat": cfg.train.remat,
        "attention": cfg.train.attention,
        "estimate": True,
        "fits": needed <= available,
        "memory": {
            **state,
            "reference": reference,
            "activations_and_temporaries": activations,
            "needed": needed,
            "available": available,
        },
        "parameters": param_count(cfg.model),
        "rows_a_step": rows,
        "tokens_a_step": tokens,
        "images_a_step": rows * cfg.data.images_per_row,
        "micro_batches": pieces,
        "flops_a_step": by_part(work) | {"device": device_flops(work, sizes), "model": round(bound.model_flops)},
        "bytes_sent_a_device": network.by_name(moved),
        "roofline": {
            "step_seconds": bound.step,
            "bound_by": bound.bound,
            "arithmetic_seconds": bound.arithmetic,
            "memory_seconds": bound.memory,
            "network_seconds": bound.network,
            "tokens_per_second": tokens / bound.step,
            "peak_share": bound.peak_share,
        },
        "chip": dataclasses.asdict(topology.chip),
        "rollout": rollout(cfg, topology, sizes, state["parameters"] + state["moments"] + reference, available)
        if is_grpo(cfg)
        else None,
    }


def compiled(cell: Cell, cfg: config.Config, library: str) -> Cell:
    """`cell` with the TPU compiler's memory in place of the estimate."""
    train = dataclasses.replace(cfg.train, remat=cell["remat"], attention=cell["attention"])
    found = compile_step(dataclasses.replace(cfg, train=train), cell["topology"], cell["mesh"], library)
    memory = cell["memory"]
    # The gradients are among the temporaries; the reference is no argument of the update.
    rest = max(0, found.temporaries - memory["gradients"]) if found.fits else None
    needed, available = found.needed + memory["reference"], found.available or memory["available"]
    measured = memory | {"activations_and_temporaries": rest, "needed": needed, "available": available}
    return cell | {
        "estimate": False,
        "fits": found.fits and needed <= available,
        "memory": measured,
        "compiled": dataclasses.asdict(found),
    }


def best_first(cells: list[Cell]) -> list[Cell]:
    """What fits before what does not, the fastest bound of a device first; then fewer devices."""
    return sorted(
        cells,
        key=lambda cell: (
            not cell["fits"],
            cell["roofline"]["step_seconds"] * cell["devices"] / cell["tokens_a_step"],
            cell["devices"],
        ),
    )
