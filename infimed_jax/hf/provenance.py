"""What a checkpoint says of itself: the stages it went through, their data with licences, and what was measured.

A checkpoint carries its own stage's configuration and the history of those before; where the runs it started from are
still there, their configurations are read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infimed_jax.config import Config, ConfigError, from_dict
from infimed_jax.errors import UserError
from infimed_jax.hf.card import Card, DataSource
from infimed_jax.hf.import_ import Import
from infimed_jax.hf.weights import read_json
from infimed_jax.train.checkpoint import find_checkpoint, read_metadata

IMPORT = "import"
"""Stage name of a checkpoint that `convert from-hf` wrote."""
UNKNOWN = "not stated"
_MANIFEST = "manifest.json"
_PERMISSIVE = re.compile(r"CC0|CC[ -]BY(-SA)?([ -]\d|$)|Apache|MIT\b|BSD|Public[ -]Domain|PDDL|ODC", re.IGNORECASE)


@dataclass(frozen=True)
class Stage:
    """One entry of a checkpoint's history; what is not known of it is empty."""

    name: str
    config: Config | None = None
    step: int = 0
    entry: Mapping[str, Any] | None = None
    """The history's own entry."""
    grpo: bool = False


def import_entry(opened: Import, folders: Mapping[str, Path]) -> dict[str, Any]:
    """The first entry of an imported checkpoint's history; `folders` are the sources by what they gave."""
    return {
        "stage": IMPORT,
        "sources": [{"gave": gave, **_base(folder)} for gave, folder in folders.items()],
        "fresh_projector_seed": opened.seed if opened.fresh_projector else None,
        "max_positions": opened.max_positions,
        "dropped": opened.dropped,
    }


def stages(checkpoint: str | Path) -> list[Stage]:
    """Every stage behind a checkpoint, the first one first."""
    found: list[Stage] = []
    folder, seen = str(checkpoint), set()
    while True:
        path = find_checkpoint(folder)
        metadata = read_metadata(path)
        seen.add(path)
        *before, last = metadata["history"]
        step = int(path.name) if path.name.isdigit() else 0
        found.insert(0, Stage(last["stage"], _config(metadata), step, last, "grpo" in metadata))
        folder = metadata["config"]["train"].get("init_from", "")
        try:
            gone = not folder or find_checkpoint(folder) in seen
        except UserError:
            gone = True
        if gone:
            return [*(Stage(entry["stage"], entry=entry) for entry in before), *found]


def max_positions(history: Sequence[Stage]) -> int | None:
    """As the imported text model had it."""
    given = [stage.entry["max_positions"] for stage in history if stage.entry and "max_positions" in stage.entry]
    return given[0] if given else None


def checkpoint_card(
    history: Sequence[Stage], evaluations: Sequence[str | Path] = (), commercial: Mapping[str, bool] | None = None
) -> Card:
    """The card of what `stages` gives. `evaluations` are folders of `evaluate`; `commercial` says, by a source's name,
    whether it allows commercial use, where the licence's text alone would have to say it.
    """
    bases = [entry for stage in history if stage.entry for entry in stage.entry.get("sources", ())]
    sources: dict[str, DataSource] = {}
    for stage in history:
        if stage.name != IMPORT:
            sources |= {source.name: source for source in _data(stage, commercial or {})}
    return Card(
        title="InfiMed model, " + (history[-1].name if history[-1].name != IMPORT else "untrained"),
        base_models=tuple(f"{b['name']} ({b['architecture']}, {b['gave']}): {b['licence']}" for b in bases),
        stages=tuple(_line(stage) for stage in history if stage.name != IMPORT),
        sources=tuple(sources.values()),
        results=dict(_result(Path(folder)) for folder in evaluations),
    )


def allows_commercial_use(licence: str) -> bool:
    """Whether a licence's name is one that does; what is not known to allow it does not."""
    return bool(_PERMISSIVE.match(licence)) and not re.search(r"\bNC\b|non-?commercial", licence, re.IGNORECASE)


def _config(metadata: Mapping[str, Any]) -> Config | None:
    try:
        return from_dict(Config, metadata["config"])
    except ConfigError:  # of another version: its stage is still named
        return None


def _base(folder: Path) -> dict[str, str]:
    """Name, architecture and licence of a source folder, as its own files say."""
    values = read_json(folder / "config.json")
    licence = UNKNOWN
    card = folder / "README.md"
    if card.is_file():
        front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        try:
            licence = str((yaml.safe_load(front[1]) or {}).get("license", UNKNOWN)) if front else UNKNOWN
        except (yaml.YAMLError, AttributeError):
            licence = UNKNOWN
    name = str(values.get("_name_or_path") or folder.resolve().name)
    return {"name": name, "architecture": values["architectures"][0], "licence": f"licence {licence}"}


def _line(stage: Stage) -> str:
    cfg = stage.config
    if cfg is None:
        return f"{stage.name} (its checkpoint is no longer there: settings not known)"
    steps = f"{stage.step:,} steps, " if stage.step else ""
    if stage.grpo:
        g = cfg.grpo
        what = f"GRPO, {g.prompts} prompts of {g.group_size} completions a step, KL {g.kl_coefficient:g}"
    else:
        what = f"{cfg.train.global_batch} rows of at most {cfg.data.context} tokens a step"
    adapters = f", the text model by LoRA adapters of rank {cfg.train.lora.rank}" if cfg.train.lora.rank else ""
    return (
        f"{stage.name}: {steps}{what}; learning rate {cfg.optimizer.learning_rate:g}; "
        f"{cfg.model.projector.visual_tokens} visual tokens an image; learnt: {', '.join(cfg.train.train)}{adapters}"
    )


def _data(stage: Stage, commercial: Mapping[str, bool]) -> list[DataSource]:
    """The sources of a stage's dataset with their licences, from its manifest."""
    folder = Path(stage.config.data.dataset) if stage.config and stage.config.data.dataset else None
    try:
        manifest = read_json(folder / _MANIFEST) if folder else {}
    except UserError:
        manifest = {}
    if not manifest:
        return [DataSource(f"the data of stage {stage.name} (its manifest is not there)", UNKNOWN, False)]
    info = manifest.get("info", {})
    licences = info.get("licences") or {info.get("source"): info.get("licence", UNKNOWN)}
    names = {origin.partition("/")[0] for origin in manifest.get("origins", {})}
    result = []
    for name in sorted(names):
        licence = str(licences.get(name, UNKNOWN))
        result.append(DataSource(name, licence, commercial.get(name, allows_commercial_use(licence))))
    return result


def _result(folder: Path) -> tuple[str, str]:
    """(what was measured, score) of one evaluation's summary.json."""
    values = read_json(folder / "summary.json")
    try:
        low, high = values["interval"]
        score = f"{values['accuracy']:.1%} [{low:.1%}, {high:.1%}], n = {values['n']:,}"
        notes = [values["protocol"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'summary.json'} is no evaluation's: give a folder that `evaluate` wrote") from error
    notes += ["with reasoning"] if values.get("reasoning") else []
    notes += [] if values.get("image", True) else ["without the images"]
    return f"{folder.resolve().name} ({', '.join(notes)})", score
