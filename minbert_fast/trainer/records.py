# SPDX-License-Identifier: Apache-2.0
"""The lines of metrics.jsonl, and the seconds that each part of a run takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minbert_fast.reporting.runs import TRAINING_PARTS
from minbert_fast.trainer.observe import Observation
from minbert_fast.trainer.state import State

if TYPE_CHECKING:
    from minbert_fast.trainer.loop import Stage


class Clock:
    """Adds the run's time to `state.timings` by part, and measures the training speed since `reset_speed`."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._last = time.monotonic()
        self.reset_speed()

    def tick(self, name: str, parts: Mapping[str, float] | None = None) -> None:
        """Adds the time since the last tick: the seconds in `parts` to those parts, the rest to part `name`."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self._state.seconds += elapsed
        known = dict(parts or {})
        for part, seconds in {**known, name: max(0.0, elapsed - sum(known.values()))}.items():
            self._state.timings[part] = self._state.timings.get(part, 0.0) + seconds

    def reset_speed(self) -> None:
        """Starts a new interval for `speed`."""
        self._begin = self._counters()

    def speed(self) -> tuple[float, float]:
        """Seconds per step and tokens per second since `reset_speed`, without evaluations and checkpoints."""
        steps, tokens, seconds = (now - then for now, then in zip(self._counters(), self._begin, strict=True))
        return seconds / max(steps, 1), tokens / max(seconds, 1e-9)

    def _counters(self) -> tuple[float, float, float]:
        seconds = sum(self._state.timings.get(part, 0.0) for part in TRAINING_PARTS)
        return self._state.step, self._state.tokens, seconds


def training_record(
    seen: Observation, state: State, stages: Sequence[Stage], clock: Clock, scale: float | None
) -> dict[str, Any]:
    """A step's losses and gradients. `scale` is the learning rate's factor; None for a step before the state's own."""
    record = _position(seen.step, state, stages)
    if scale is not None:
        record["lr"] = stages[state.stage].recipe.optimizer.lr * scale
    record |= {f"loss/{task}": loss for task, loss in seen.losses.items()}
    record |= {"grad_norm": seen.grad_norm, "conflicts": seen.conflicts}
    record |= {f"cosine/{pair}": cosine for pair, cosine in seen.cosines.items()}
    record |= {f"weight/{task}": weight for task, weight in seen.weights.items()}
    if seen.skipped:
        record["skipped"] = list(seen.skipped)
    if scale is not None:
        record |= {"tokens": state.tokens, "skipped_steps": state.skipped_steps}
        record |= {"step_seconds": clock.speed()[0], "time": state.seconds}
    return record


def dev_record(metrics: Mapping[str, float | None], state: State, stages: Sequence[Stage]) -> dict[str, Any]:
    """The record of the state's own step with the dev scores added."""
    scores = {f"dev/{name}": value for name, value in metrics.items()}
    return _position(state.step, state, stages) | (state.record or {}) | scores


def _position(step: int, state: State, stages: Sequence[Stage]) -> dict[str, Any]:
    """Step, epoch and stage of a record. `step` may be earlier than the state's own."""
    before = sum(stage.recipe.training.epochs for stage in stages[: state.stage])
    epoch = before + (state.stage_step + step - state.step) / max(stages[state.stage].steps_per_epoch, 1)
    return {"step": step, "epoch": round(epoch, 6), "stage": state.stage}
