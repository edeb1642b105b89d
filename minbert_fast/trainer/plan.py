# SPDX-License-Identifier: Apache-2.0
"""What the loop works on: the stages of a run, their lengths in steps, and the scores of an evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.stepping import TrainingStep
from minbert_fast.tasks.metrics import lower_is_better


@dataclass(frozen=True)
class Evaluation:
    """Scores of the model at one step; None for a score that is not finite."""

    metrics: Mapping[str, float | None]  # on the dev files
    write: Callable[[Path], None]  # writes the files of predictions/
    train: Mapping[str, float | None] = field(default_factory=dict)  # on training rows, if the recipe asks for them

    def score(self, metric: str) -> float:
        """A dev score, higher is better: errors and losses with a minus sign; minus infinity if it is not a number."""
        value = self.metrics.get(metric)
        if value is None or not math.isfinite(value):
            return -math.inf
        return -value if lower_is_better(metric) else value


@dataclass(frozen=True)
class Stage:
    """One resolved stage of a recipe, with the functions that run it."""

    recipe: Recipe
    steps_per_epoch: int
    steps: int  # of the stage, and of its learning rate schedule
    patience: int  # evaluations without a better score that end the stage; 0: no limit
    build_step: Callable[[], TrainingStep]  # prepares the model for this stage
    batches: Callable[[int, int], Generator[MultitaskBatch, None, None]]  # of the stage's steps [first, end)
    locate: Callable[[str, int], str]  # (task, row) -> "file:line"


def schedule_steps(epochs: float, steps_per_epoch: int) -> int:
    """Steps of `epochs`, rounded to whole ones; at least one step unless `epochs` is 0."""
    return max(1, round(epochs * steps_per_epoch)) if epochs else 0


def share_steps(stages: Sequence[Stage], max_steps: int | None) -> list[Stage]:
    """The stages of a run of `max_steps` steps, shared in proportion to the stages' own lengths; None changes nothing."""
    if max_steps is None:
        return list(stages)
    ends = list(itertools.accumulate(stage.steps for stage in stages))
    if ends[-1] == 0:
        ends = list(range(1, len(stages) + 1))
    ends = [round(max_steps * end / ends[-1]) for end in ends]
    return [replace(s, steps=end - begin) for s, begin, end in zip(stages, [0, *ends], ends, strict=False)]
