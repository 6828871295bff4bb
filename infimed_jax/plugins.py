"""Things that users add in one file: a model family, an attention backend, a reward, a benchmark, a data source.

Each kind has a room, a package whose modules are its members, or only its folders where it has any. A member is named
by its module there (`splash`), by a module anywhere on the path (`my_package.my_kernel`), or by a file
(`./my_kernel.py`).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from infimed_jax.errors import UserError


def names(room: str) -> list[str]:
    """The members of the package `room` that this project ships, sorted; nothing is imported."""
    top, *rest = room.split(".")
    package = importlib.util.find_spec(top)  # of the room itself, it would import the packages around it
    found = package.submodule_search_locations if package else None
    folders = [str(Path(folder, *rest)) for folder in found or ()]
    modules = [module for module in pkgutil.iter_modules(folders) if not module.name.startswith("_")]
    return sorted(module.name for module in [m for m in modules if m.ispkg] or modules)


def load(room: str, name: str, setting: str) -> ModuleType:
    """The module that `name` names; `setting` is what the user wrote it under, for the message.

    Raises UserError where there is no such module, with the nearest known name, or where importing it fails.
    """
    if name.endswith(".py"):
        return _from_file(Path(name), setting)
    if "." in name:
        return _imported(name, name, setting)
    check(room, name, setting)
    return importlib.import_module(f"{room}.{name}")


def fingerprint(name: str) -> str:
    """SHA-256 of a user's module or .py file, which may change between two runs of a command; "" for a shipped one."""
    if "." not in name:
        return ""
    spec = None if name.endswith(".py") else importlib.util.find_spec(name)
    return hashlib.sha256(Path(spec.origin if spec and spec.origin else name).read_bytes()).hexdigest()


def check(room: str, name: str, setting: str, others: Sequence[str] = ()) -> None:
    """UserError unless `name` is a member of `room`, one of `others`, or looks like a user's module or file."""
    known = sorted([*names(room), *others])
    if name in known or "." in name:
        return
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else "to add your own, name its module or its .py file"
    raise UserError(f"{setting} must be one of {', '.join(known)}, not {name!r}; {hint}")


def _imported(module: str, name: str, setting: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:  # a script's path begins with the script's own folder
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a user's module does while it is imported
        raise UserError(f"{setting}={name} cannot be imported: {type(error).__name__}: {error}") from error


def _from_file(file: Path, setting: str) -> ModuleType:
    """A file is imported once; its folder joins the path, so that worker processes find it by its name."""
    if not file.is_file():
        raise UserError(f"{setting}={file}: there is no such file")
    loaded = sys.modules.get(file.stem)
    if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() != file.resolve():
        raise UserError(f"{setting}={file}: a module {file.stem!r} exists already: give the file another name")
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return _imported(file.stem, str(file), setting)
