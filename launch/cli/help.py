"""The text of settings' help: each group's settings with value, type, limits and docstring."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infimed_jax.config.fields import Setting, nearest, settings_of
from infimed_jax.errors import UserError


def render(names: Sequence[str], groups: Mapping[str, Any]) -> str:
    """The groups or settings `names` of `groups` (name -> values) as text, or all; UserError for an unknown name."""
    known = [setting for name, values in groups.items() for setting in settings_of(values, name)]
    parents = dict.fromkeys(group for setting in known for group in _parents(setting.name))
    for name in names:
        if name not in parents and all(name != setting.name for setting in known):
            near = nearest(name, [*parents, *(setting.name for setting in known)])
            listed = f"; the groups are {', '.join(groups)}"
            raise UserError(f"no setting or group {name!r}{near or listed}")
    wanted = [s for s in known if not names or any(f"{s.name}.".startswith(f"{name}.") for name in names)]
    return "\n\n".join(_group(name, wanted) for name in dict.fromkeys(_parent(setting) for setting in wanted))


def _group(name: str, settings: Sequence[Setting]) -> str:
    members = [setting for setting in settings if _parent(setting) == name]
    lines = _wrapped(f"{name}: {members[0].group}", "")
    for setting in members:
        facts = [setting.type_name, *setting.limits]
        if setting.value != setting.default:
            facts.append(f"default {_shown(setting.default)}")
        lines += _wrapped(f"{setting.name}={_shown(setting.value)}  ({', '.join(facts)})", "  ")
        lines += _wrapped(setting.text, "      ")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _parent(setting: Setting) -> str:
    return setting.name.rpartition(".")[0]


def _parents(name: str) -> Iterator[str]:
    """`train.lora.rank` -> train, train.lora."""
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(shutil.get_terminal_size((100, 0)).columns, 120)
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent.ljust(6),
        break_long_words=False,
        break_on_hyphens=False,
    )
