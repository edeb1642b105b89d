# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses from plain mappings (JSON, TOML) and back; keys and types are checked.

A user's mistake becomes a one-line `ConfigError` that names the place (`file: section.key`), the value and the expected
form.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

D = TypeVar("D")


class ConfigError(ValueError):
    """A configuration value, key or file is wrong; the message is one line for the user."""


def check(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_at_least(options: object, minimum: float, *names: str) -> None:
    """Raises ConfigError unless each attribute in `names` is None, or finite and at least `minimum`."""
    for name in names:
        value = getattr(options, name)
        check(value is None or minimum <= value < math.inf, f"{name} = {value}: expected {minimum} or more")


def check_below_one(options: object, *names: str) -> None:
    """Raises ConfigError unless each attribute in `names` is None or in [0, 1)."""
    for name in names:
        value = getattr(options, name)
        check(value is None or 0 <= value < 1, f"{name} = {value}: expected 0 <= {name} < 1")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, kept: `typing.get_type_hints` compiles the text of each annotation again."""
    return typing.get_type_hints(cls)


def build(cls: type[D], values: Mapping[str, Any], where: str, separator: str = ": ") -> D:
    """A new instance of dataclass `cls` with `values`; nested mappings become nested dataclasses.

    Messages put `separator` between `where` and a key: a colon after a file, a dot after a section. Raises ConfigError
    for an unknown key, a value of the wrong type, or a value that `cls` itself rejects.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = field_types(cls)  # type: ignore[arg-type]
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
    """`value` converted to the annotated type `hint`. Raises ConfigError naming `where`."""

    def refuse(expected: str) -> NoReturn:
        text = repr(value)
        raise ConfigError(f"{where} = {text if len(text) <= 80 else text[:77] + '...'}: expected {expected}")

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
        return value if value in arguments else refuse(f"one of {', '.join(map(str, arguments))}")
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            refuse("a table of keys")
        return build(typing.cast(type, hint), value, where, ".")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            refuse("a list")
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        elif len(value) != len(arguments):
            refuse(f"{len(arguments)} values")
        return tuple(convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            refuse("a table of keys")
        return {str(key): convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        refuse({int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint)))
    return value


class Whole(dict[str, Any]):
    """A table that replaces another one where `merge` would merge them."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated with `over`: nested tables are merged key by key, all other values (and a `Whole`) replaced."""
    merged = Whole(base) if isinstance(base, Whole) else dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and not isinstance(value, Whole):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def plain(value: Any) -> Any:
    """`value` with dataclasses as dicts and tuples as lists, ready for JSON or TOML; entries of None are omitted."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """`values` (from `plain`) as TOML text: first the plain keys, then one section per table."""
    lines = [f"{_key(k)} = {toml_value(v)}" for k, v in values.items() if not _is_section(v)]
    for key, value in values.items():
        if _is_section(value):
            name = f"{prefix}{_key(key)}"
            single = isinstance(value, Mapping)
            for table in [value] if single else value:
                lines += ["", f"[{name}]" if single else f"[[{name}]]", to_toml(table, f"{name}.").rstrip("\n")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _key(key: str) -> str:
    bare = bool(key) and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else json.dumps(key)


def toml_value(value: Any) -> str:
    """A plain value as TOML. Raises TypeError for a value that TOML has no form for."""
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"no TOML form for {type(value).__name__}")
