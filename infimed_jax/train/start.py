"""Where a run begins: given parameters, another run's, or random ones; or the run's own latest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.models.params import Params, abstract_params, init_params
from infimed_jax.plugins import fingerprint
from infimed_jax.runs.checkpoint import Metadata
from infimed_jax.runs.history import history_of, stage_entry
from infimed_jax.runs.identity import check_same_run
from infimed_jax.runs.loop import Run
from infimed_jax.runs.parameters import load_params
from infimed_jax.sharding import on_mesh, place_params
from infimed_jax.train.optimizer import make_optimizer
from infimed_jax.train.state import TrainState, abstract_state, init_state


def check_start(cfg: config.Config, params: Params | None) -> None:
    """UserError where a run has two starts."""
    if params is not None and cfg.train.init_from:
        raise UserError("parameters were given and train.init_from is set: choose one")


def bound_content(run: Run) -> dict[str, str]:
    """Fingerprints that every run is bound to; its kind adds those of its data."""
    return {"tokenizer_sha256": run.tokenizer.fingerprint, "family_sha256": fingerprint(run.cfg.model.family)}


def first_params(run: Run, params: Params | None) -> tuple[Params, Metadata]:
    """What a new run starts from, on the mesh: `params`, or `train.init_from`, or random values.

    With the metadata of the checkpoint that they were read from. UserError where it learnt other tokens.
    """
    cfg = run.cfg
    abstract = on_mesh(abstract_params(cfg.model))
    if params is not None:
        return place_params(params, abstract), {}
    if not cfg.train.init_from:
        return init_params(jax.random.key(cfg.train.seed), cfg.model), {}
    params, before = load_params(cfg.train.init_from, abstract)
    ours = run.tokenizer.fingerprint
    if before.get("content", {}).get("tokenizer_sha256", ours) != ours:
        raise UserError(
            f"train.init_from={cfg.train.init_from} was trained with another tokenizer than data.tokenizer="
            f"{cfg.data.tokenizer}: give the tokenizer of that run"
        )
    return params, before


def open_state(
    run: Run, content: Mapping[str, str], start: Callable[[], tuple[Params, Metadata]]
) -> tuple[TrainState, Metadata]:
    """The state at step `run.start`, and the metadata that its checkpoints carry.

    `content` are the fingerprints that bind the run (see `check_same_run`); `start`, called in a new run alone, gives
    what `first_params` does. UserError where the checkpoints are of another run.
    """
    cfg, optimizer = run.cfg, make_optimizer(run.cfg.optimizer)
    metadata: Metadata = {"config": config.to_dict(cfg), "content": dict(content)}
    if run.start:
        saved = run.checkpoints.metadata(run.start)
        check_same_run(run.folder, saved, metadata)
        return run.checkpoints.restore(abstract_state(cfg, optimizer), run.start), saved | {
            "config": metadata["config"]
        }
    params, before = start()
    metadata["content"]["init_from_sha256"] = before.get("leaves_sha256", "")
    metadata["history"] = [*history_of(before), stage_entry(cfg, content)]
    return init_state(params, cfg, optimizer), metadata
