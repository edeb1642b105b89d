# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that resume a run exactly, written so that a crash never leaves one half written.

    checkpoints/step-00000120/
        tensors.safetensors   parameters, optimizer moments, random generators
        state.json            counters, scores, and the fingerprint of recipe, data and model
        manifest.json         sizes and SHA-256 of the other two

The files are safetensors and JSON: reading a checkpoint executes no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minbert_fast.common.errors import translate_write_errors
from minbert_fast.common.storage import file_digest, flush_directory, remove, write_directory, write_json, write_tensors

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: the step of the whole run, tensors on the CPU, and the JSON state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class CheckpointStore:
    """The `checkpoints/` folder of a run, which holds the newest `keep` checkpoints."""

    folder: Path
    keep: int

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes the checkpoint of `step`, then removes the oldest ones. Raises RunError if the disk refuses."""
        path = self.folder / f"step-{step:08d}"

        def fill(directory: Path) -> None:
            digest = write_tensors(directory / TENSORS, tensors)
            write_json(directory / STATE, state)
            digests = {TENSORS: digest, STATE: file_digest(directory / STATE)}
            files = {n: {"bytes": (directory / n).stat().st_size, "sha256": d} for n, d in digests.items()}
            write_json(directory / MANIFEST, {"format": FORMAT, "step": step, "files": files})

        with translate_write_errors(path):
            write_directory(path, fill)
            for _, old in self._entries()[self.keep :]:
                remove(old)

    def newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """Reads the newest undamaged checkpoint; None if there is none.

        Renames damaged ones to `step-N.damaged`, so that they do not count among the `keep`, and calls `report` with
        one line for each.
        """
        for step, path in self._entries():
            try:
                return read_checkpoint(path, step)
            except OSError as error:
                reason = f"{Path(error.filename or path).name}: {error.strerror}"
            except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            report(f"{path} is damaged ({reason}) and skipped")
            with translate_write_errors(path):
                damaged = path.with_name(f"{path.name}.damaged")
                remove(damaged)
                path.rename(damaged)
                flush_directory(self.folder)
        return None

    def _entries(self) -> list[tuple[int, Path]]:
        """Steps and paths of the checkpoints, newest first."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [(int(match[1]), entry) for entry in entries if (match := _NAME.fullmatch(entry.name))]
        return sorted(found, reverse=True)


def read_checkpoint(path: Path, step: int) -> Checkpoint:
    """Reads and verifies the checkpoint in directory `path`. Raises ValueError and others for a damaged one."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT}")
    if manifest["step"] != step:
        raise ValueError(f"its manifest is of step {manifest['step']!r}")
    for name in (TENSORS, STATE):
        recorded, size = manifest["files"][name], (path / name).stat().st_size
        if size != recorded["bytes"]:
            raise ValueError(f"{name} has {size} bytes, expected {recorded['bytes']}")
        if file_digest(path / name) != recorded["sha256"]:
            raise ValueError(f"the checksum of {name} differs from the manifest's")
    return Checkpoint(step, load_file(path / TENSORS), json.loads((path / STATE).read_bytes()))


def differences(then: Any, now: Any, template: str = "{name} was {then}, now {now}") -> list[str]:
    """One line, formatted by `template`, for each value that differs between two nested mappings of plain values."""
    return [template.format(name=name, then=_show(a), now=_show(b)) for name, a, b in _different(then, now, "")]


_ABSENT = object()


def _different(then: Any, now: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*then, *now]):
            name = f"{prefix}.{key}" if prefix else str(key)
            yield from _different(then.get(key, _ABSENT), now.get(key, _ABSENT), name)
    elif then != now:
        yield prefix, then, now


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
