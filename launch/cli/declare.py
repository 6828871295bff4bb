"""Options made from a dataclass: name, type, default and help of an option are those of its field.

The fields are read from the module's source text, since `--help` must not wait for what the module imports.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from infimed_jax.config.fields import classes_of, docstrings_in

T = TypeVar("T")
_TYPES = {"int": int, "float": float, "str": str, "Path": Path}


def add_fields(parser: argparse._ActionsContainer, where: str, names: Sequence[str], prefix: str = "") -> None:
    """`--NAME` for each field `names` of the dataclass `where` ("package.module:Class"), `--PREFIX-NAME` with a prefix.

    A boolean is a flag that sets it.
    """
    module, _, name = where.partition(":")
    body = classes_of(module)[name]
    texts = docstrings_in(body)
    fields = {ast.unparse(field.target): field for field in body if isinstance(field, ast.AnnAssign)}
    for name in names:
        kind, default = ast.unparse(fields[name].annotation), ast.literal_eval(fields[name].value)
        option = f"--{prefix}{name}".replace("_", "-")
        text = texts.get(name, "").rstrip(".").replace("%", "%%")
        text = text[:1].lower() + text[1:]
        if kind == "bool":
            parser.add_argument(option, action="store_true", help=text)
        else:
            shown = "" if default in (None, "") else " [%(default)s]"
            parser.add_argument(option, type=_TYPES[kind.removesuffix(" | None")], default=default, help=text + shown)


def build(kind: type[T], args: argparse.Namespace, prefix: str = "", given: dict[str, Any] | None = None) -> T:
    """The dataclass `kind` from the options that `add_fields` made, and from the fields `given`."""
    values = dict(given or {})
    for field in dataclasses.fields(kind):
        for name in (prefix + field.name, field.name):
            if field.name not in values and hasattr(args, name):
                value = getattr(args, name)
                values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
