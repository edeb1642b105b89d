# SPDX-License-Identifier: Apache-2.0
"""The types, defaults and meanings of a recipe's keys, read from the dataclasses that define them and their comments."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Mapping
from typing import Any

from minbert_fast.common.schema import field_types, plain, toml_value


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a section."""

    name: str
    type: str  # as a user writes the value: "text", "number", "a | b"
    default: str  # as TOML; "unset" without a value
    line: str  # the comment beside the field; empty without one


def keys_of(section: type) -> list[Key]:
    """The keys of a section in the order of its dataclass, inherited ones first. Nested sections are left out."""
    hints = field_types(section)
    keys = []
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        owner = next(cls for cls in section.__mro__ if field.name in inspect.get_annotations(cls))
        keys.append(
            Key(field.name, type_text(hints[field.name]), _default_text(default), comments(owner).get(field.name, ""))
        )
    return keys


@functools.cache
def comments(cls: type) -> Mapping[str, str]:
    """The comments that stand behind a class's own annotated fields, by field."""
    source = textwrap.dedent(inspect.getsource(cls))
    by_line = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            places = (by_line.get(line, "") for line in (statement.lineno, statement.end_lineno or 0))
            found[statement.target.id] = next(filter(None, places), "")
    return found


def type_text(hint: Any) -> str:
    """A type as a user writes values of it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_text(a) for a in arguments if a is not types.NoneType)
    if origin is tuple:
        inner = dict.fromkeys(type_text(a) for a in arguments if a is not Ellipsis)
        return f"list of {', '.join(inner)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"table of {type_text(arguments[1])}"
    return {int: "whole number", float: "number", str: "text", bool: "true | false", Any: "table"}.get(hint, str(hint))


def _default_text(value: Any) -> str:
    if value is None or value is dataclasses.MISSING:
        return "unset"
    if isinstance(value, Mapping):
        items = ", ".join(f"{key} = {_default_text(item)}" for key, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    return toml_value(plain(value))
