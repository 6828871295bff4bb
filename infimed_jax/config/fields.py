"""One declaration a setting: a dataclass field's type, default, limits and docstring are its check and its help.

    @dataclass(frozen=True)
    class Train(Group, path="train"):
        steps: Annotated[int, AtLeast(0)] = 0
        \"\"\"Steps in all; 0 follows from `epochs`.\"\"\"

Docstrings are read from the source text, so help needs no import but that of the dataclass.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import itertools
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from infimed_jax import plugins
from infimed_jax.errors import UserError


class ConfigError(UserError):
    """A setting that does not exist or has an impossible value; the message names it and the fix."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class Limit(NamedTuple):
    """What a field's value must satisfy, in `Annotated[int, Limit(…)]`."""

    allows: Callable[[Any], bool]
    words: str
    """The requirement, as the message and the help state it."""
    show_value: bool = False
    """Whether the message repeats the value."""

    def check(self, name: str, value: Any) -> None:
        require(self.allows(value), f"{name}{f'={value}' if self.show_value else ''} {self.words}")


class Member(NamedTuple):
    """A text that names a member of the package `room` (`plugins`), a user's own, or one of `others`."""

    room: str
    others: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        return f"{', '.join((*self.others, *plugins.names(self.room)))}, or your own module or .py file"

    def check(self, name: str, value: str) -> None:
        plugins.check(self.room, value, name, self.others)


def AtLeast(least: float) -> Limit:
    return Limit(lambda value: value >= least, f"must be at least {least}", show_value=True)


Count = Annotated[int, AtLeast(1)]
CountOrZero = Annotated[int, AtLeast(0)]
NotNegative = Annotated[float, AtLeast(0)]
Positive = Annotated[float, Limit(lambda value: value > 0, "must be positive")]
Share = Annotated[float, Limit(lambda share: 0 <= share <= 1, "is a share between 0 and 1")]
Decay = Annotated[float, Limit(lambda beta: 0 <= beta < 1, "must lie in [0, 1)")]
Probability = Annotated[float, Limit(lambda mass: 0 < mass <= 1, "must lie in (0, 1]")]


class Group:
    """A dataclass of settings whose limits are checked when it is made; `path` is its dotted name in messages."""

    _path: ClassVar[str] = ""

    def __init_subclass__(cls, path: str = "") -> None:
        cls._path = path or cls._path

    def __post_init__(self) -> None:
        group: Any = type(self)
        for name, limits in _limits(group).items():
            for limit in limits:
                limit.check(f"{self._path}.{name}", getattr(self, name))


@functools.cache
def _limits(group: type) -> dict[str, tuple[Limit | Member, ...]]:
    return {name: found for name, hint in types_of(group, limits=True).items() if (found := _limits_in(hint))}


def _limits_in(hint: Any) -> tuple[Limit | Member, ...]:
    return tuple(note for note in getattr(hint, "__metadata__", ()) if isinstance(note, (Limit, Member)))


@functools.cache
def types_of(group: type, *, limits: bool = False) -> dict[str, Any]:
    """Name of each field -> its type, with its limits (`Annotated`) if asked for."""
    hints = typing.get_type_hints(group, include_extras=limits)
    return {field.name: hints[field.name] for field in dataclasses.fields(group)}


@dataclass(frozen=True)
class Setting:
    """What the help shows of one field."""

    name: str
    """Dotted from the top: `train.lora.rank`."""
    type: Any
    default: Any
    value: Any
    """The default, or what a configuration sets."""
    limits: tuple[str, ...]
    text: str
    """The field's docstring: meaning, unit, published value, source."""
    group: str
    """The docstring of its dataclass."""

    @property
    def type_name(self) -> str:
        return _type_name(self.type)


def settings_of(values: Any, path: str = "") -> Iterator[Setting]:
    """Every setting of the configuration or group `values`, in order of declaration."""
    group: Any = type(values)
    texts, limits = docstrings(group), _limits(group)
    for field in dataclasses.fields(group):
        name, value = f"{path}.{field.name}" if path else field.name, getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, name)
        else:
            kind, words = types_of(group)[field.name], tuple(limit.words for limit in limits.get(field.name, ()))
            yield Setting(
                name, kind, field.default, value, words, texts.get(field.name, ""), inspect.getdoc(group) or ""
            )


def docstrings(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, base classes included; empty where there is no source text."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= docstrings_in(classes_of(base.__module__).get(base.__qualname__, ()))
    return found


def docstrings_in(body: Sequence[ast.stmt]) -> dict[str, str]:
    """The same of a class's statements."""
    return {
        ast.unparse(field.target): inspect.cleandoc(str(note.value.value)).replace("\n", " ")
        for field, note in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
    }


@functools.cache
def classes_of(module: str) -> dict[str, list[ast.stmt]]:
    """Statements of each top-level class of a module, from its source text: the module is not imported."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top) if top != "__main__" else None
    files = [Path(spec.origin or "")] if spec else []
    if spec and spec.submodule_search_locations:  # of a nested module find_spec would import the parents
        place = Path(spec.submodule_search_locations[0], *inner)
        files = [place.with_suffix(".py"), place / "__init__.py"]
    source = next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")
    return {node.name: node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _type_name(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(kind) is tuple:
        return f"list of {_type_name(arguments[0])}"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(_type_name(argument) for argument in arguments if argument is not type(None))
    return str(kind.__name__)


def nearest(name: object, known: Iterable[str], form: Callable[[str], str] = str) -> str:
    """`; did you mean NAME?` for the nearest of `known`, which `form` writes; empty where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {form(near[0])}?" if near else ""
