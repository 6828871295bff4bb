"""Data sources: the only place that knows a dataset's own files. A module with a `SOURCE` or `SOURCES` adds them."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import pkgutil
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from data_prep.sources.source import Source
from infimed_jax import plugins
from infimed_jax.errors import UserError


def _declared(module: ModuleType) -> dict[str, Source]:
    declared = [getattr(module, "SOURCE", None), *getattr(module, "SOURCES", ())]
    return {source.name: source for source in declared if isinstance(source, Source)}


_MODULES = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
SOURCES: dict[str, Source] = dict(sorted(item for module in _MODULES for item in _declared(module).items()))
COMMERCIAL_USE: dict[str, bool] = {name: source.commercial_use for name, source in SOURCES.items()}
"""Whether each source allows commercial use, for model cards."""


def named(source: Source, label: str) -> Source:
    """The source whose samples bear the label, so that several inputs of one source can be mixed.

    Licence and terms stay the source's, but nothing under a label is sent to outside services, since these are cleared
    by name. UserError: no label can be so, or it is the name of another source of this project.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", label):
        raise UserError(f"--name {label!r}: use lower-case letters, digits and underscores, a letter first")
    if label in SOURCES and label != source.name:
        raise UserError(f"--name {label}: that is another data source, with terms of its own; choose another name")
    return replace(source, label=label, allow_external_api=False) if label != source.name else source


def find_source(name: str) -> Source:
    """The source of that name here, or of a user's module or .py file: `MODULE:NAME`, or `MODULE:` if it has but one.

    UserError: there is none, or a user's has the name of one of ours, which would give it that one's clearances.
    """
    module, colon, own = name.rpartition(":")
    if not colon:
        if name not in SOURCES:
            near = difflib.get_close_matches(name, SOURCES, 1)
            hint = f", perhaps {near[0]}" if near else ""
            raise UserError(f"no data source {name!r}{hint}: `data sources` lists them")
        return SOURCES[name]
    module = str(Path(module).resolve()) if module.endswith(".py") else module  # workers may run in another folder
    if "." not in module:
        raise UserError(f"--adapter {module}: name a .py file, or a module with a dot in its name")
    loaded = plugins.load(__name__, module, "--adapter")
    declared = _declared(loaded)
    if not declared:
        raise UserError(f"--adapter {module}: the module has no SOURCE or SOURCES (data_prep.sources.source.Source)")
    if own not in declared and (own or len(declared) > 1):
        raise UserError(f"--adapter {module} has {', '.join(declared)}: name one by --source")
    source = declared[own] if own else next(iter(declared.values()))
    if source.name in SOURCES:
        raise UserError(f"--adapter {module}: there is a data source {source.name!r} already: give yours another name")
    code = hashlib.sha256(Path(str(loaded.__file__)).read_bytes()).hexdigest()
    return replace(source, module=module, code=code, allow_external_api=False)
