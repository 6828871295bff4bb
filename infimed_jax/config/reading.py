"""Settings from YAML files and dotted overrides, typed; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from infimed_jax.config.fields import ConfigError, Member, nearest, require, types_of
from infimed_jax.config.model import Model, model_class
from infimed_jax.config.settings import Config
from infimed_jax.errors import one_line
from infimed_jax.files import to_json

PACKAGE = Path(__file__).resolve().parents[2]
"""Holds configs/: the checkout, or where pip installed it."""
T = TypeVar("T")


def from_dict(kind: Callable[..., T], values: dict[str, Any], path: str = "") -> T:
    """Build the dataclass `kind` from nested plain values; unknown keys and wrong types raise ConfigError."""
    return kind(**_fields(kind, values, path))


def _fields(kind: Any, values: dict[str, Any], path: str) -> dict[str, Any]:
    known = types_of(kind)
    for key in values:
        if key not in known:
            hint = nearest(key, known, lambda name: path + name) or f"; known here: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown setting {path}{key}{hint}")
    limits = types_of(kind, limits=True)
    typed = {key: _typed(known[key], value, f"{path}{key}") for key, value in values.items()}
    return {key: _from_any_folder(value) if _names_plugin(limits[key]) else value for key, value in typed.items()}


def _names_plugin(hint: Any) -> bool:
    return any(isinstance(note, Member) for note in getattr(hint, "__metadata__", ()))


def _from_any_folder(name: str) -> str:
    """A plugin's file by its absolute path: the run is read again from other folders."""
    return str(Path(name).resolve()) if name.endswith(".py") else name


def _typed(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type, or a ConfigError that names the field; never a lossy conversion."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        value = {} if value is None else value  # a group with nothing but comments under it
        require(isinstance(value, dict), f"{path} must be a group of settings, not {value!r}")
        if hint is Model:
            hint = model_class(_typed(str, value.get("family", Model.family), f"{path}.family"))
        return from_dict(hint, value, path + ".")
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            hint_text = nearest(value, map(str, allowed), repr)
            raise ConfigError(f"{path} must be one of {', '.join(map(str, allowed))}, not {value!r}{hint_text}")
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("[]()").split(",") if part.strip()]
        require(isinstance(value, (list, tuple)), f"{path} must be a list, not {value!r}")
        return tuple(_typed(typing.get_args(hint)[0], item, path) for item in value)
    if origin in (typing.Union, types.UnionType):
        raise ConfigError(f"{path}: optional settings are not used here")
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-5 as a string
    require(
        not (isinstance(value, str) and "://" in value),
        f"{path}={value} is an address, and only folders are read and written: mount it, and name the mount",
    )
    require(type(value) is hint, f"{path} must be {hint.__name__}, not {value!r}")
    require(hint is not float or math.isfinite(value), f"{path} must be a finite number, not {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values that `from_dict` reads back to an equal config."""
    values: dict[str, Any] = json.loads(to_json(dataclasses.asdict(config)))
    return values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over`'s leaves laid on top, nested groups merged; a group with nothing in it changes nothing.

    ConfigError where `over` has a value in the place of a group.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(merged.get(key), dict):
            require(value is None or isinstance(value, dict), f"{key} must be a group of settings, not {value!r}")
            merged[key] = merge(merged[key], value or {})
        else:
            merged[key] = value
    return merged


def load(files: typing.Sequence[str | Path], overrides: typing.Sequence[str] = ()) -> Config:
    """Compose YAML files, later over earlier, then dotted overrides such as `train.steps=20`.

    A name such as `configs/models/tiny.yaml` that is no file here is one that the package brings.
    """
    return from_dict(Config, _compose(files, overrides))


def load_groups(files: typing.Sequence[str | Path], overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """The groups of `load` by name, each checked by itself: for help, before they agree with each other."""
    empty: dict[str, Any] = {name: {} for name in types_of(Config)}
    return _fields(Config, empty | _compose(files, overrides), "")


def _compose(files: typing.Sequence[str | Path], overrides: typing.Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for file in files:
        try:
            brought = PACKAGE / file
            place = brought if brought.is_file() and not Path(file).exists() else Path(file)
            loaded = _parse(place.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read config {file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"config {file} is not UTF-8 ({error.reason}): save it as UTF-8") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"config {file} is not valid YAML: {one_line(error)}") from error
        require(loaded is None or isinstance(loaded, dict), f"config {file} must hold groups of settings")
        values = merge(values, loaded or {})
    return with_overrides(values, overrides)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's own reader keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} stands twice, the last time before line {node.end_mark.line + 1}")
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def with_overrides(values: dict[str, Any], overrides: typing.Sequence[str]) -> dict[str, Any]:
    """Nested plain values with dotted overrides such as `train.steps=20` laid on top."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        require(bool(equals) and bool(dotted), f"override {override!r} must look like train.steps=20")
        try:
            nested: Any = _parse(text) if text else ""
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"override {override!r} is not valid YAML: {one_line(error)}") from error
        for key in reversed(dotted.split(".")):
            nested = {key: nested}
        values = merge(values, nested)
    return values
