"""What this machine can run, check by check: each reports what it found, and how to fix what is wrong."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from infimed_jax.cost.chips import GIB
from infimed_jax.errors import UserError
from launch.machine import accelerator

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
_LEAST_DISK = 5
"""GiB: a checkpoint of the 1.7B model in float32 with its moments is 21."""
_LEAST_MEMORY = 2
"""GiB available: the tiny model's compilation takes about one."""


@dataclass(frozen=True)
class Check:
    name: str
    found: str
    fix: str = ""
    """What to do; empty where nothing is wrong."""

    @property
    def ok(self) -> bool:
        return not self.fix


def checks(platform: str | None = None, output: Path = Path()) -> Iterator[Check]:
    """The checks in order, quick ones first; a check that depends on a failed one is left out."""
    yield versions()
    yield _torch()
    yield _disk("disk", output)
    yield compile_cache()
    yield _memory()
    device = devices(platform)
    yield device
    if not device.ok:
        return
    yield attention_backends()
    yield tiny_step()


def versions() -> Check:
    """Versions of Python and of the packages that a compiled program depends on."""
    here, absent = [f"Python {sys.version.split()[0]}"], []
    for name in PACKAGES:
        try:
            here.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            absent.append(name)
    fix = f"not installed: {', '.join(absent)}; pip install -c constraints.txt -e ." if absent else ""
    return Check("versions", ", ".join(here), fix)


def _torch() -> Check:
    """torch with CUDA brings its own CUDA libraries; with them JAX has fallen back to the CPU with a warning."""
    version = accelerator.torch_cuda()
    if not version:
        return Check("torch", "none with CUDA")
    return Check("torch", f"{version} with CUDA", "pip uninstall torch, or pip install 'torch==2.13.0+cpu'")


def _disk(name: str, folder: Path) -> Check:
    existing = next(place for place in [folder.absolute(), *folder.absolute().parents] if place.exists())
    free = shutil.disk_usage(existing).free / GIB
    if not existing.is_dir():
        return Check(name, f"{existing} is no folder", "name another folder")
    fix = f"free at least {_LEAST_DISK} GiB, or name another folder" if free < _LEAST_DISK else ""
    return Check(name, f"{free:.0f} GiB free at {existing}", fix)


def compile_cache() -> Check:
    """The persistent cache: on, and writable."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not folder:
        return Check("compile cache", "off", "unset JAX_COMPILATION_CACHE_DIR, and launch/run.py names a folder")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".doctor-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        return Check("compile cache", f"{path}: {reason}", "make it writable, or set JAX_COMPILATION_CACHE_DIR")
    entries = [entry for entry in path.iterdir() if entry.is_file()]
    size = sum(entry.stat().st_size for entry in entries)
    return Check("compile cache", f"{path}: {len(entries)} entries, {size / 2**20:.0f} MiB")


def _memory() -> Check:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    if "MemAvailable" not in kilobytes:
        return Check("memory", "not reported by this system")
    available, total = (kilobytes[key] / 2**20 for key in ("MemAvailable", "MemTotal"))
    fix = f"end other programs: at least {_LEAST_MEMORY} GiB are wanted" if available < _LEAST_MEMORY else ""
    return Check("memory", f"{available:.0f} of {total:.0f} GiB available, {os.cpu_count()} cores", fix)


def devices(platform: str | None) -> Check:
    """The platform that JAX runs on, and whether it is the requested one."""
    try:
        accelerator.select(platform)
        found = accelerator.check(platform)
    except UserError as error:
        return Check("devices", "not the requested ones", str(error))
    import jax

    local = jax.local_devices()
    wanted = accelerator.requested(platform)
    why = f", requested by {wanted[1]}" if wanted else ""
    stats = local[0].memory_stats() or {}
    memory = f", {stats['bytes_limit'] / GIB:.1f} GiB each for JAX" if "bytes_limit" in stats else ""
    return Check("devices", f"{len(local)} x {local[0].device_kind} ({found}){memory}{why}")


def attention_backends() -> Check:
    """Each backend on a packed row of 128, forward and gradient; the platform's own must work."""
    import jax
    import jax.numpy as jnp

    from infimed_jax import config, sharding
    from infimed_jax.ops import attention as ops

    segments = jnp.repeat(jnp.array([[1, 2, 0]], jnp.int32), jnp.array([60, 60, 8]), axis=1)
    mask = ops.Mask(causal=True, query_segments=segments, key_segments=segments)
    query = jax.random.normal(jax.random.key(0), (1, 128, 2, 128))

    def loss(query: jax.Array, name: str) -> jax.Array:
        key = query[:, :, :1]
        return ops.attention(query, key, key, mask, implementation=name).sum()

    usable, refused = [], []
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.local_devices()[:1])):
        for name in ops.backend_names():
            try:
                gradient = jax.jit(jax.grad(loss), static_argnums=1)(query, name)
                (usable if bool(jnp.isfinite(gradient).all()) else refused).append(name)
            except Exception:  # a kernel that is not of this platform fails in its compiler, each in its own way
                refused.append(name)
        own = ops.platform_backend(jax.default_backend())
    fix = "" if own in usable else f"{own} is this platform's: set train.attention=xla, and report the versions above"
    absent = f"; not here: {', '.join(refused)}" if refused else ""
    return Check("attention", f"{', '.join(usable)} (chosen: {own}){absent}", fix)


def tiny_step() -> Check:
    """Two real train steps of the tiny model on one device: the second must lower the loss of the first."""
    import jax
    import numpy as np

    from infimed_jax import config, sharding
    from infimed_jax.data.batch import Segment, build_row, stack_rows
    from infimed_jax.models.compute import Compute
    from infimed_jax.models.params import init_params
    from infimed_jax.train.optimizer import make_optimizer
    from infimed_jax.train.state import init_state
    from infimed_jax.train.step import make_train_step, next_token_loss

    tiny = Path(__file__).resolve().parents[2] / "configs/models/tiny.yaml"
    cfg = config.load([tiny], ["train.attention=xla", "train.logit_chunk=64", "train.remat=full"])
    random = np.random.default_rng(0)
    visual = np.arange(64) < cfg.model.visual_tokens
    segment = Segment(
        random.integers(0, 1000, 64).astype(np.int32),
        (~visual).astype(np.float32),
        visual,
        (random.integers(0, 256, cfg.model.blank_image().shape, dtype=np.uint8),),
    )
    row = build_row([segment], context=64, images=1, model=cfg.model)
    mesh = sharding.make_mesh(config.Mesh(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(cfg.optimizer)
        state = init_state(init_params(jax.random.key(0), cfg.model), cfg, optimizer)
        step = make_train_step(next_token_loss(cfg.model, Compute.of(cfg.train)), optimizer)
        batch = sharding.place_batch(stack_rows([row, row]), mesh)
        losses = []
        for _ in range(2):
            state, metrics = step(state, batch, 1e-3)
            losses.append(float(metrics["loss"]))
    fix = "" if losses[1] < losses[0] else "the update does not learn: compare the versions with constraints.txt"
    return Check("a tiny step", f"loss {losses[0]:.4f} -> {losses[1]:.4f}", fix)
