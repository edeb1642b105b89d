# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses from plain mappings (JSON, TOML) and back: every key known, every value of its type.

A user's mistake becomes one `ConfigError` line that names the place (`file: section.key`), the value and what was
expected; no `getattr(config, ..., default)` anywhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

D = TypeVar("D")


class ConfigError(ValueError):
    """A configuration value, key or file is not as expected; the message is one line for the user."""


def check(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def build(cls: type[D], values: Mapping[str, Any], where: str, separator: str = ": ") -> D:
    """An instance of dataclass `cls` from `values`; nested dataclasses from nested mappings.

    `separator` stands between `where` and a key in messages: a colon after a file, a dot after a section. Raises
    ConfigError for an unknown key, a value of the wrong type or one that `cls` itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            inner = [f"{name}.{key}" for name in fields if key in getattr(hints[name], "__dataclass_fields__", ())]
            close = inner or difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; known: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
    arguments = {key: convert(value, hints[key], f"{where}{separator}{key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}{separator}{error}") from None
    except TypeError as error:  # a field without a default is missing
        raise ConfigError(f"{where}: {error}") from None


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type `hint`; raises ConfigError naming `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options[:-1]:
            try:
                return convert(value, option, where)
            except ConfigError:
                continue
        return convert(value, options[-1], where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {_shown(value)}: expected one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {_shown(value)}: expected a table of keys")
        return build(typing.cast(type, hint), value, where, ".")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} = {_shown(value)}: expected a list")
        if arguments[-1] is Ellipsis:
            return tuple(convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise ConfigError(f"{where} = {_shown(value)}: expected {len(arguments)} values")
        return tuple(convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True)))
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {_shown(value)}: expected a table of keys")
        return {str(key): convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} = {_shown(value)}: expected {_named(hint)}")
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, tables merged key by key, everything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists, ready for JSON or TOML; None entries left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def to_toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """`values` (the output of `plain`) as TOML text: plain keys first, then a section a table."""
    lines = [f"{_key(k)} = {_toml_value(v)}" for k, v in values.items() if not _is_section(v)]
    for key, value in values.items():
        name = f"{prefix}{_key(key)}"
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]", to_toml(value, f"{name}.").rstrip("\n")]
        elif _is_section(value):
            for item in value:
                lines += ["", f"[[{name}]]", to_toml(item, f"{name}.").rstrip("\n")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _key(key: str) -> str:
    bare = bool(key) and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"no TOML form for {type(value).__name__}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _named(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))
