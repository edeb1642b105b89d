# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what a run needs to go on exactly where it was, in files that no crash leaves half written.

    checkpoints/step-00000120/
        tensors.safetensors   parameters, optimizer moments, random generators
        state.json            counters, scores, and the fingerprint of recipe, data and model
        manifest.json         sizes and SHA-256 of the other two

Safetensors and JSON only: nothing in a checkpoint is executed when it is read.
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

from minbert_fast.common.errors import writing
from minbert_fast.common.storage import file_digest, flush_directory, remove, write_directory, write_json, write_tensors

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: its step (of the whole run), tensors on the CPU, and the JSON state."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointStore:
    """The `checkpoints/` folder of a run, of which the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of `step`, then prunes older ones. Raises RunError where the disk refuses."""
        path = self.folder / f"step-{step:08d}"

        def fill(directory: Path) -> None:
            digest = write_tensors(directory / TENSORS, tensors)
            write_json(directory / STATE, state)
            digests = {TENSORS: digest, STATE: file_digest(directory / STATE)}
            files = {n: {"bytes": (directory / n).stat().st_size, "sha256": d} for n, d in digests.items()}
            write_json(directory / MANIFEST, {"format": FORMAT, "step": step, "files": files})

        with writing(path):
            write_directory(path, fill)
            for _, old in self._entries()[self.keep :]:
                remove(old)
        return path

    def newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None. `report` hears of each damaged one that is passed over.

        Damaged ones are renamed to `step-N.damaged`, so that they never push a whole one out.
        """
        for step, path in self._entries():
            checkpoint = read_checkpoint(path, step)
            if isinstance(checkpoint, Checkpoint):
                return checkpoint
            report(f"{path} is damaged ({checkpoint}) and passed over")
            with writing(path):
                aside = path.with_name(f"{path.name}.damaged")
                remove(aside)
                path.rename(aside)
                flush_directory(self.folder)
        return None

    def _entries(self) -> list[tuple[int, Path]]:
        """Checkpoints by step, newest first."""
        found = []
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            match = _NAME.fullmatch(entry.name)
            if match:
                found.append((int(match[1]), entry))
        return sorted(found, reverse=True)


def read_checkpoint(path: Path, step: int) -> Checkpoint | str:
    """The checkpoint in directory `path`, or the reason why it cannot be used."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this version reads {FORMAT}"
        if manifest["step"] != step:
            return f"its manifest is of step {manifest['step']!r}"
        for name in (TENSORS, STATE):
            recorded = manifest["files"][name]
            if (path / name).stat().st_size != recorded["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes of {recorded['bytes']}"
            if file_digest(path / name) != recorded["sha256"]:
                return f"{name} is not what was written: its checksum differs"
        state = json.loads((path / STATE).read_bytes())
        return Checkpoint(path, step, load_file(path / TENSORS), state)
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"


def differences(then: Any, now: Any, says: str = "{name} was {then}, now {now}") -> list[str]:
    """What differs between two fingerprints (nested mappings of plain values), a line a value, each as `says` puts it."""
    return [says.format(name=name, then=_shown(a), now=_shown(b)) for name, a, b in _different(then, now, "")]


_ABSENT = object()


def _different(then: Any, now: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in [*then, *(key for key in now if key not in then)]:
            name = f"{where}.{key}" if where else str(key)
            yield from _different(then.get(key, _ABSENT), now.get(key, _ABSENT), name)
    elif then != now:
        yield where, then, now


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
