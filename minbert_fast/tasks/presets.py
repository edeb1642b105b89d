# SPDX-License-Identifier: Apache-2.0
"""Presets: a kind of task with some options set, from `presets.toml`. A task's own options replace them one by one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any

PRESETS: Mapping[str, dict[str, Any]] = MappingProxyType(
    tomllib.loads((resources.files("minbert_fast.tasks") / "presets.toml").read_text(encoding="utf-8"))
)


def preset_of(kind: str, options: Mapping[str, Any]) -> str:
    """The preset that a task's `kind` names; empty if it names none.

    In earlier versions `sentiment` with data = "polarity" and `nli` with triplets were options of one kind; recipes and
    saved models that say so mean the presets `polarity` and `nli-triplets`.
    """
    if kind == "sentiment" and options.get("data") == "polarity":
        return "polarity"
    if kind == "nli" and ("objectives" in options or options.get("data") == "triplets"):
        return "nli-triplets"
    return kind if kind in PRESETS else ""
