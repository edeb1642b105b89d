# SPDX-License-Identifier: Apache-2.0
"""What a run writes down of its steps: the lines of metrics.jsonl, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minbert_fast.reporting.runs import TRAINING
from minbert_fast.trainer.observe import Observation
from minbert_fast.trainer.state import State

if TYPE_CHECKING:
    from minbert_fast.trainer.loop import Stage


class Clock:
    """Books the time of a run in its state, by part; and the pace since the last look."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._last = time.monotonic()
        self._looked = self._counters()

    def tick(self, name: str, parts: Mapping[str, float] | None = None) -> None:
        """Books the time since the last call under `parts` as far as they are known, the rest of it under `name`."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self._state.seconds += elapsed
        known = dict(parts or {})
        for part, seconds in {**known, name: max(0.0, elapsed - sum(known.values()))}.items():
            self._state.timings[part] = self._state.timings.get(part, 0.0) + seconds

    @property
    def step_seconds(self) -> float:
        """Seconds of training a step (without evaluations and checkpoints) since `look`."""
        steps, _, seconds = self._since()
        return seconds / max(steps, 1)

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of training since `look`."""
        _, tokens, seconds = self._since()
        return tokens / max(seconds, 1e-9)

    def look(self) -> None:
        """The pace is counted anew from here."""
        self._looked = self._counters()

    def _since(self) -> tuple[float, float, float]:
        steps, tokens, seconds = (now - then for now, then in zip(self._counters(), self._looked, strict=True))
        return steps, tokens, seconds

    def _counters(self) -> tuple[float, float, float]:
        seconds = sum(self._state.timings.get(part, 0.0) for part in TRAINING)
        return self._state.step, self._state.tokens, seconds


class Records:
    """Makes lines of metrics.jsonl out of a run's state and what was seen of its steps."""

    def __init__(self, state: State, stages: Sequence[Stage], clock: Clock) -> None:
        self._state = state
        self._stages = stages
        self._clock = clock

    def training(self, seen: Observation, scale: float | None) -> dict[str, Any]:
        """A step's losses and gradients; with `scale` (of the learning rate; the state's own step) its rate and pace."""
        state = self._state
        record = self._place(seen.step)
        if scale is not None:
            record["lr"] = self._stages[state.stage].recipe.optimizer.lr * scale
        record |= {f"loss/{task}": loss for task, loss in seen.losses.items()}
        record |= {"grad_norm": seen.grad_norm, "conflicts": seen.conflicts}
        record |= {f"cosine/{pair}": cosine for pair, cosine in seen.cosines.items()}
        record |= {f"weight/{task}": weight for task, weight in seen.weights.items()}
        if seen.skipped:
            record["skipped"] = list(seen.skipped)
        if scale is not None:
            record |= {"tokens": state.tokens, "skipped_steps": state.skipped_steps}
            record |= {"step_seconds": self._clock.step_seconds, "time": state.seconds}
        return record

    def dev(self, metrics: Mapping[str, float | None]) -> dict[str, Any]:
        """The scores after the state's own step, added to what is recorded of it already."""
        scores = {f"dev/{name}": value for name, value in metrics.items()}
        return self._place(self._state.step) | (self._state.record or {}) | scores

    def _place(self, step: int) -> dict[str, Any]:
        """Where in the run a step lies; skipped steps may be seen late."""
        state, stage = self._state, self._stages[self._state.stage]
        before = sum(each.recipe.training.epochs for each in self._stages[: state.stage])
        epoch = before + (state.stage_step + step - state.step) / max(stage.steps_per_epoch, 1)
        return {"step": step, "epoch": round(epoch, 6), "stage": state.stage}
