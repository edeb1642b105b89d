# SPDX-License-Identifier: Apache-2.0
"""Callbacks: the caller's own code at logged steps, at evaluations, and at the end of a run.

For example, a run that ends at a score above 0.8:

    class Watch(Callback):
        def on_evaluation(self, event: EvaluationEvent) -> bool:
            return (event.metrics["score"] or 0) > 0.8

    fit("default", data="data", model="model", callbacks=[Watch()])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepEvent:
    """A logged training step (every `logging.every` steps, and the first)."""

    step: int  # steps done, over all stages
    steps: int  # of the whole run
    losses: Mapping[str, float]  # mean loss of each task in this step
    lr: float | None  # learning rate of the encoder's top layer
    grad_norm: float


@dataclass(frozen=True)
class EvaluationEvent:
    """An evaluation on the dev rows."""

    step: int
    metrics: Mapping[str, float | None]  # None: not a number
    best: bool  # the best one so far; its model is in best/


@dataclass(frozen=True)
class EndEvent:
    """The end of a run: everything is written."""

    steps: int
    reason: str
    metrics: Mapping[str, float | None]  # dev scores of the best model; empty without dev rows
    output: Path


class Callback:
    """Derive from this class and override what you need. Methods are called on the main process (rank 0) alone.

    `on_step` and `on_evaluation` stop the run by returning True. The model is evaluated and saved, and `resume=True`
    continues the run.
    """

    def on_step(self, event: StepEvent) -> bool | None:
        """After a logged step."""

    def on_evaluation(self, event: EvaluationEvent) -> bool | None:
        """After an evaluation, also the one before the first step (step 0)."""

    def on_end(self, event: EndEvent) -> None:
        """After the last file is written."""
