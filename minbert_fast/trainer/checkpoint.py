# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that resume a run exactly, and the state of a run that they hold. A crash never leaves one half written.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minbert_fast.common.errors import translate_write_errors
from minbert_fast.common.storage import file_digest, flush_directory, remove, write_directory, write_json, write_tensors
from minbert_fast.step.stepping import TrainingStep

FORMAT = 1
NEWEST = 2  # checkpoints of a running run: if the newest is damaged, the other one serves
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
    keep: int = NEWEST

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
        self.prune(self.keep)

    def prune(self, keep: int) -> None:
        """Removes all but the newest `keep` checkpoints. Raises RunError if the disk refuses."""
        with translate_write_errors(self.folder):
            for _, old in self._entries()[keep:]:
                remove(old)

    def newest(self, report: Callable[[str], None], rename: bool = True) -> Checkpoint | None:
        """Reads the newest undamaged checkpoint; None if there is none.

        Renames damaged ones to `step-N.damaged`, so that they do not count among the `keep`, and calls `report` with
        one line for each. Of several processes that read one folder, a single one may `rename`.
        """
        for step, path in self._entries():
            try:
                return read_checkpoint(path, step)
            except OSError as error:
                reason = f"{Path(error.filename or path).name}: {error.strerror}"
            except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            report(f"{path} is damaged ({reason}) and skipped")
            if not rename:
                continue
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


@dataclass
class State:
    """Counters and scores of a run. JSON-able; the field names are keys of checkpoints/*/state.json."""

    step: int = 0  # over all stages
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: int = -1  # step of the last scheduled evaluation
    stage_best: float | None = None  # best score of this stage
    task_best: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task: as `best`, by the task's own metric
    stale: int = 0  # evaluations since this stage's best score
    best: dict[str, Any] | None = None  # {"step", "stage", "score" (None if not finite), "metrics"}
    untrained: dict[str, float | None] | None = None
    skipped: dict[str, int] = field(default_factory=dict)  # skipped steps by task
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    record: dict[str, Any] | None = None  # this step's line of metrics.jsonl
    timings: dict[str, float] = field(default_factory=dict)  # seconds by part

    def begin_stage(self, index: int) -> None:
        """Resets the counters that belong to one stage."""
        self.stage, self.stage_step, self.stage_best, self.stale = index, 0, None, 0


def collect_tensors(model: nn.Module, step: TrainingStep) -> tuple[dict[str, Tensor], Any]:
    """All tensors of a run (model, optimizer, random generators) by unique name, and the scalars of the step."""
    state = step.state_dict()
    tensors = {f"model/{name}": tensor for name, tensor in _parameters(model).items()}
    tensors |= {f"step/{name}": tensor for name, tensor in state["tensors"].items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors, state["scalars"]


def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies the checkpoint's parameters and buffers into the model."""
    prefix = "model/"
    set_weights(model, {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)})


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's parameters and buffers by name, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _parameters(model).items()}


@torch.no_grad()
def set_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies `tensors` (from `copy_weights`) into the model's parameters and buffers, in place."""
    for name, parameter in _parameters(model).items():
        parameter.copy_(tensors[name])


def load_step(step: TrainingStep, checkpoint: Checkpoint) -> None:
    """Restores the step's state and the random generators."""
    tensors = {n.removeprefix("step/"): t for n, t in checkpoint.tensors.items() if n.startswith("step/")}
    step.load_state_dict({"tensors": tensors, "scalars": checkpoint.state["step"]})
    torch.set_rng_state(checkpoint.tensors["random/cpu"])
    if "random/cuda" in checkpoint.tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(checkpoint.tensors["random/cuda"])


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied parameters appear once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


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
