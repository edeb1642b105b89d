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
