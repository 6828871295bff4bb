"""What a checkpoint says of itself: the stages it went through, their data with licences, and what was measured.

`runs.history` wrote it into the checkpoint; here it becomes the model card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from infimed_jax.config import Config, ConfigError, from_dict
from infimed_jax.errors import UserError
from infimed_jax.hf.card import Card, DataSource
from infimed_jax.hf.export import SUMMARY
from infimed_jax.hf.import_ import Import
from infimed_jax.hf.weights import read_json
from infimed_jax.runs.history import UNKNOWN, Entry

IMPORT = "import"
"""Stage name of a checkpoint that `convert from-hf` wrote."""
_PERMISSIVE = re.compile(r"CC0|CC[ -]BY(-SA)?([ -]\d|$)|Apache|MIT\b|BSD|Public[ -]Domain|PDDL|ODC", re.IGNORECASE)


def import_entry(opened: Import, folders: Mapping[str, Path]) -> dict[str, Any]:
    """The first entry of an imported checkpoint's history; `folders` are the sources by what they gave."""
    return {
        "stage": IMPORT,
        "sources": [{"gave": gave, **_base(folder)} for gave, folder in folders.items()],
        "fresh_projector_seed": opened.seed if opened.fresh_projector else None,
        "max_positions": opened.max_positions,
        "dropped": opened.dropped,
    }


def max_positions(history: Sequence[Entry]) -> int | None:
    """As the imported text model had it."""
    return next((entry["max_positions"] for entry in history if "max_positions" in entry), None)


def checkpoint_card(
    history: Sequence[Entry], evaluations: Sequence[str | Path] = (), commercial: Mapping[str, bool] | None = None
) -> Card:
    """The card of what `history_of` gives. `evaluations` are folders of `evaluate`; `commercial` says, by a source's
    name, whether it allows commercial use, where the licence's text alone would have to say it.
    """
    bases = [base for entry in history for base in entry.get("sources", ())]
    cards = [_card(base["card"]) for base in bases if "card" in base]
    trained = [entry for entry in history if entry["stage"] != IMPORT]
    sources = {source.name: source for card in cards for source in card.sources}
    sources |= {source.name: source for entry in trained for source in _data(entry, commercial or {})}
    lines = [f"{b['name']} ({b['architecture']}, {b['gave']}): {b['licence']}" for b in bases]
    closed = [
        b["name"] for b in bases if "card" not in b and not allows_commercial_use(b["licence"].removeprefix("licence "))
    ]
    last = history[-1]["stage"] if history else IMPORT
    untrained = "imported" if cards else "untrained"
    return Card(
        title="InfiMed model, " + (last if last != IMPORT else untrained),
        base_models=(*(line for card in cards for line in card.base_models), *lines),
        closed_bases=(*(name for card in cards for name in card.closed_bases), *closed),
        stages=(*(line for card in cards for line in card.stages), *map(_line, trained)),
        sources=tuple(sources.values()),
        results=dict(_result(Path(folder)) for folder in evaluations),
    )


def allows_commercial_use(licence: str) -> bool:
    """Whether a licence's name is one that does; what is not known to allow it does not."""
    return bool(_PERMISSIVE.match(licence)) and not re.search(r"\bNC\b|non-?commercial", licence, re.IGNORECASE)


def _base(folder: Path) -> dict[str, Any]:
    """Name, architecture and licence of a source folder, as its own files say.

    With the card's facts where `to-hf` wrote the folder: what a model learnt from is not forgotten on the way through.
    """
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
    base = {"name": name, "architecture": values["architectures"][0], "licence": f"licence {licence}"}
    summary = folder / SUMMARY
    history = read_json(summary).get("card") if summary.is_file() else None
    if history is None:
        return base
    try:
        _card(history)
    except (KeyError, TypeError) as error:
        raise UserError(f"{summary} is not as to-hf wrote it: move it away to go on without the history") from error
    return base | {"card": history}


def _card(values: Mapping[str, Any]) -> Card:
    """What still holds of an earlier export's card, from its JSON; its title and results were of that model."""
    return Card(
        base_models=tuple(values["base_models"]),
        closed_bases=tuple(values["closed_bases"]),
        stages=tuple(values["stages"]),
        sources=tuple(DataSource(**source) for source in values["sources"]),
    )


def _line(entry: Entry) -> str:
    try:
        cfg = from_dict(Config, entry["config"])
    except (KeyError, ConfigError):  # of another version: the stage is still named
        return f"{entry['stage']} (its settings are not known)"
    if entry.get("grpo"):
        g = cfg.grpo
        what = f"GRPO, {g.prompts} prompts of {g.group_size} completions a step, KL {g.kl_coefficient:g}"
    else:
        what = f"{cfg.train.global_batch} rows of at most {cfg.data.context} tokens a step"
    adapters = f", the text model by LoRA adapters of rank {cfg.train.lora.rank}" if cfg.train.lora.rank else ""
    # No stage ends at step 0: an older version wrote it where a checkpoint did not say.
    steps = f"{entry['step']:,} steps" if entry.get("step") else "number of steps not recorded"
    return (
        f"{entry['stage']}: {steps}, {what}; learning rate {cfg.optimizer.learning_rate:g}; "
        f"{cfg.model.visual_tokens} visual tokens an image; learnt: {', '.join(cfg.train.train)}{adapters}"
    )


def _data(entry: Entry, commercial: Mapping[str, bool]) -> list[DataSource]:
    """A stage's sources with their licences."""
    licences = entry.get("licences") or {f"the data of stage {entry['stage']}": UNKNOWN}
    stated = {**entry.get("commercial_use", {}), **commercial}
    return [
        DataSource(name, licence, stated.get(name, allows_commercial_use(licence)))
        for name, licence in licences.items()
    ]


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
