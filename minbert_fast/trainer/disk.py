# SPDX-License-Identifier: Apache-2.0
"""The disk space that a run needs, compared with what is free before the first step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from minbert_fast.common.errors import RunError
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.trainer.checkpoint import NEWEST
from minbert_fast.trainer.plan import Stage

ROW_BYTES = 300  # about, for each dev row in predictions/: the prediction, and the texts that the report may show


@dataclass(frozen=True)
class Room:
    """Bytes that a run's directory takes, estimated: at most while it runs, and when it is finished."""

    running: int
    finished: int

    def __str__(self) -> str:
        return f"about {show_bytes(self.running)} of disk space while it runs, {show_bytes(self.finished)} afterwards"


def estimate(model: nn.Module, recipe: Recipe, stages: Sequence[Stage], dev_rows: int) -> Room:
    """The room of a run: its models, predictions/, and checkpoints with weights, moments and further copies of weights."""
    whole = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    heads = getattr(model, "heads", model)
    frozen = all(stage.recipe.model.freeze for stage in stages)
    trained = sum(p.nbytes for p in heads.parameters()) if frozen else whole
    copies = sum(value > 0 for s in stages[:1] for value in (s.recipe.training.ema, s.recipe.regularisation.proximal))
    returned = len({str(stage.recipe.training.start) for stage in stages[1:]} - {"last", "0"})  # weights kept for later
    checkpoint = whole + 2 * trained + (copies + returned) * whole
    written = sum(math.ceil(s.steps / (recipe.checkpoint.every or s.steps_per_epoch or 1)) for s in stages)
    kept = max(recipe.checkpoint.keep, NEWEST)
    models = 2 + len(recipe.tasks) * recipe.training.best_per_task  # best/, last/, best-TASK/
    results = models * whole + dev_rows * ROW_BYTES
    # A new checkpoint is complete before the oldest one is removed; so is a new best/ before the old one.
    running = min(written, kept + 1) * checkpoint + results
    return Room(running, min(written, recipe.checkpoint.keep) * checkpoint + results)


def check_room(room: Room, directory: Path) -> None:
    """Raises RunError if `directory`, with what a stopped run left in it, has no room for the run."""
    total, _, free = shutil.disk_usage(directory)
    present = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if total and room.running > free + present:  # some network file systems report no sizes
        raise RunError(
            f"{directory}: the run needs {room}, and {show_bytes(free + present)} are free: choose another --output, or "
            "free some space"
        )


def show_bytes(count: int) -> str:
    """A number of bytes for a message, in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.{0 if count >= 1e7 else 1}f} MB"
