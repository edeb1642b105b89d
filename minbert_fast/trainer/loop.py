# SPDX-License-Identifier: Apache-2.0
"""The training loop: stages of steps, with evaluations, checkpoints and records where they are due.

Everything the loop decides depends on `State` alone, which a checkpoint holds; so a resumed run enters at the same
place and takes the same course. After each step, in this order: evaluate if due, write the step's record, save a
checkpoint if due, leave if a signal asked for it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from minbert_fast.common.errors import InterruptError, RunError
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.parallel.world import World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.trainer.checkpoint import Checkpoint, CheckpointStore
from minbert_fast.trainer.observe import Observation, Observer
from minbert_fast.trainer.outputs import RunDirectory
from minbert_fast.trainer.progress import Progress
from minbert_fast.trainer.records import Clock, Records
from minbert_fast.trainer.schedule import lr_scale
from minbert_fast.trainer.signals import StopSignals
from minbert_fast.trainer.state import State, gather, load_parameters, restore

if TYPE_CHECKING:
    from minbert_fast.step.stepping import TrainingStep

SHOWN_EXAMPLES = 8  # places named when training stops for non-finite losses


class Batches(Protocol):
    """An iterator over a stage's batches that stops its thread when closed."""

    def __iter__(self) -> Iterator[tuple[int, MultitaskBatch]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """Dev scores, the one by which the best model is kept, and what writes the files of `predictions/`."""

    metrics: Mapping[str, float | None]
    score: float  # minus infinity where it is not a number
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Stage:
    """One resolved stage of a recipe, with the means to run it."""

    recipe: Recipe
    steps_per_epoch: int
    limit: int | None  # steps at most, if the stage sets its own max_steps
    patience: int  # evaluations without a better score that end it; 0: never
    begin: Callable[[], TrainingStep]  # sets the model up for this stage
    batches: Callable[[int], Batches]  # from the given step of the stage on, on the step's device
    place: Callable[[str, int], str]  # (task, row) -> "file:line"

    @property
    def schedule_steps(self) -> int:
        """Steps over which the learning rate runs its course: all of the stage's epochs, even if cut short."""
        return self.recipe.training.epochs * self.steps_per_epoch

    @property
    def steps(self) -> int:
        """Steps that the stage takes at most."""
        return self.schedule_steps if self.limit is None else min(self.schedule_steps, self.limit)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the state, and the best evaluation (which a cut between two due ones may have added)."""

    state: State
    best: dict[str, Any] | None
    reason: str


class Trainer:
    """Runs the stages of a recipe. Raises RunError or InterruptError with a line for the user.

    `evaluate` gives the model's dev scores, or None where there is nothing to evaluate on; `save` writes the model
    directory. `constants` go into every checkpoint's state beside "run" and "step".
    """

    def __init__(
        self,
        recipe: Recipe,
        stages: Sequence[Stage],
        model: nn.Module,
        files: RunDirectory,
        evaluate: Callable[[], Evaluation | None],
        save: Callable[[Path], None],
        constants: Mapping[str, Any],
        progress: Callable[[int, int], Progress],
        eager_fetch: bool = True,  # look at every step's result at once (free on a CPU; on a GPU it would stall)
        world: World | None = None,
    ) -> None:
        self.recipe = recipe
        self.stages = stages
        self.model = model
        self.files = files
        self.evaluate = evaluate
        self.save = save
        self.constants = constants
        self.eager_fetch = eager_fetch
        self.world = world or World()
        self.store = CheckpointStore(files.checkpoints, recipe.checkpoint.keep)
        self.total = sum(stage.steps for stage in stages)
        if recipe.training.max_steps is not None:
            self.total = min(self.total, recipe.training.max_steps)
        self._progress = progress
        self._observer = Observer()
        self._signals = StopSignals()

    # ---- The run ----------------------------------------------------------------------------------------------------

    def run(self, checkpoint: Checkpoint | None = None) -> Outcome:
        """Trains from the beginning or from `checkpoint` (whose tensors the model has not got yet) to the end."""
        self.state = State() if checkpoint is None else State(**checkpoint.state["run"])
        self._saved = -1 if checkpoint is None else checkpoint.step
        self._step: TrainingStep | None = None
        self._clock = Clock(self.state)
        self._records = Records(self.state, self.stages, self._clock)
        self._start_records(checkpoint)
        self.progress = self._progress(self.state.step, self.total)
        try:
            with self._signals:
                for index in range(self.state.stage, len(self.stages)):
                    if index != self.state.stage:
                        self._adopt_average()
                        self.state.begin_stage(index)
                    self._run_stage(self.stages[index], checkpoint)
                    checkpoint = None
                    if self.state.step >= self.total:
                        break
                self._checkpoint()
                self._adopt_average()
                best = self._final_evaluation()
        except InterruptError as stop:
            raise InterruptError(
                stop.number,
                f"{stop.signal_name}: stopped after step {self.state.step}, which is saved; "
                f"python -m minbert_fast.train --resume --output {shlex.quote(str(self.files.path))} goes on",
            ) from None
        except RunError as error:
            kept = f"; the checkpoint of step {self._saved} is whole" if self._saved >= 0 else ""
            raise RunError(f"{error}{kept}") from error
        finally:
            self.progress.close()
        self._clock.tick("other")
        early = self.state.step < self.total
        return Outcome(self.state, best, "no better score for a while" if early else "all steps taken")

    def _run_stage(self, stage: Stage, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            load_parameters(self.model, checkpoint.tensors)
        self._step = stage.begin()
        if checkpoint is not None:
            restore(self._step, checkpoint)
        self._settle(stage)
        if self._over(stage):
            return
        with closing(stage.batches(self.state.stage_step)) as batches:
            self._clock.tick("other")
            for _, batch in batches:
                self._clock.tick("data")
                self._take_step(stage, batch)
                self._settle(stage)
                if self._over(stage):
                    return

    def _take_step(self, stage: Stage, batch: MultitaskBatch) -> None:
        assert self._step is not None
        state = self.state
        scale = lr_scale(state.stage_step, stage.schedule_steps, stage.steps_per_epoch, stage.recipe.optimizer)
        try:
            result = self._step(batch, scale)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise RunError(self._memory_advice(stage, batch)) from error
        state.step += 1
        state.stage_step += 1
        state.tokens += batch.step_tokens
        state.record = None
        self._observer.add(state.step, batch, result)
        self._clock.tick("steps", result.seconds)
        logged = state.step == 1 or state.step % self.recipe.logging.every == 0 or self._evaluation_due(stage)
        if logged or self.eager_fetch or self._checkpoint_due(stage):
            self._observe(stage, scale, logged)
        if not logged:
            self.progress.advance(1, None, self._clock.tokens_per_second)

    def _settle(self, stage: Stage) -> None:
        """What is due after a step (or at a resumed run's first look at its state)."""
        state = self.state
        try:
            if self._evaluation_due(stage) and state.evaluated != state.step:
                with self._averaged():
                    self._evaluate(stage)
        except InterruptError:
            pass  # its checkpoint says that the evaluation is still due
        if state.record is not None:
            self.files.metrics.write(state.record)
        stop = self.world.agreed(self._signals.received)
        if stop is not None or self._checkpoint_due(stage):
            self._checkpoint()
        if stop is not None:
            raise InterruptError(stop, "stopped between two steps")

    # ---- What is due when -------------------------------------------------------------------------------------------

    def _over(self, stage: Stage) -> bool:
        tired = 0 < stage.patience <= self.state.stale
        return self.state.step >= self.total or self.state.stage_step >= stage.steps or tired

    def _evaluation_due(self, stage: Stage) -> bool:
        if self.state.step == 0:
            return self.recipe.training.evaluate_untrained and self.total > 0
        if self.state.stage_step == 0:
            return False
        every = stage.recipe.training.evaluate_every
        regular = self.state.step % every if every else self.state.stage_step % stage.steps_per_epoch
        return regular == 0 or self.state.stage_step == stage.steps

    def _checkpoint_due(self, stage: Stage) -> bool:
        if self.state.stage_step == 0:
            return False
        every = self.recipe.checkpoint.every
        regular = self.state.step % every if every else self.state.stage_step % stage.steps_per_epoch
        return regular == 0 or self.state.stage_step == stage.steps

    # ---- Averaged weights -------------------------------------------------------------------------------------------

    def _averaged(self) -> AbstractContextManager[None]:
        """The model as it is judged and kept: with the averaged weights, if the recipe has them averaged."""
        average = None if self._step is None else self._step.average
        return nullcontext() if average is None else average.applied()

    def _adopt_average(self) -> None:
        """What a stage's training comes to, and the next stage starts from."""
        if self._step is not None and self._step.average is not None:
            self._step.average.adopt()

    # ---- Evaluation and records -------------------------------------------------------------------------------------

    def _evaluate(self, stage: Stage) -> None:
        state = self.state
        self._clock.tick("other")
        with self._signals.interruptible():
            evaluation = self.evaluate()
        self._clock.tick("evaluation")
        if evaluation is not None:
            if state.step == 0:
                state.untrained = dict(evaluation.metrics)
            else:
                if _better(evaluation, state.best):
                    self._keep_best(evaluation)
                    state.best = self._as_best(evaluation)
                improved = state.stage_best is None or evaluation.score > state.stage_best
                state.stale = 0 if improved else state.stale + 1
                if improved and math.isfinite(evaluation.score):
                    state.stage_best = evaluation.score
            state.record = self._record_dev(evaluation)
        state.evaluated = state.step

    def _final_evaluation(self) -> dict[str, Any] | None:
        """The best evaluation, after one of the model at the end if none was due there.

        Only a run cut short by max_steps ends where no evaluation is due. That evaluation is no part of the state:
        a run resumed from here knows nothing of it, and goes on as if it had not been cut.
        """
        state = self.state
        if state.evaluated == state.step:
            return state.best
        self._clock.tick("other")
        with self._signals.interruptible():
            evaluation = self.evaluate()
        self._clock.tick("evaluation")
        if evaluation is None:
            return state.best
        self.files.metrics.write(self._record_dev(evaluation))
        if not _better(evaluation, state.best):
            return state.best
        if state.best is not None:
            self.files.set_aside("best", "predictions")
        self._keep_best(evaluation)
        return self._as_best(evaluation)

    def _keep_best(self, evaluation: Evaluation) -> None:
        if self.world.is_main:
            self.files.write_directory("best", self.save)
            self.files.write_directory("predictions", evaluation.write)

    def _as_best(self, evaluation: Evaluation) -> dict[str, Any]:
        score = evaluation.score if math.isfinite(evaluation.score) else None
        return {"step": self.state.step, "score": score, "metrics": dict(evaluation.metrics)}

    def _record_dev(self, evaluation: Evaluation) -> dict[str, Any]:
        self.progress.say(f"step {self.state.step}: {shown_metrics(evaluation.metrics)}")
        return self._records.dev(evaluation.metrics)

    def _observe(self, stage: Stage, scale: float | None, logged: bool) -> None:
        """Looks at the results since the last look; records the last one if `logged`, and every skipped step."""
        state = self.state
        for seen in self._observer.fetch():
            if seen.skipped:
                state.skipped_steps += 1
                state.skipped_in_a_row += 1
                for task in seen.skipped:
                    state.skipped[task] = state.skipped.get(task, 0) + 1
            else:
                state.skipped_in_a_row = 0
            last = seen.step == state.step
            if seen.skipped or (logged and last):
                record = self._records.training(seen, scale if last else None)
                if last:
                    state.record = record | (state.record or {})
                else:
                    self.files.metrics.write(record)
                if logged and last:
                    self.progress.advance(1, seen.losses, self._clock.tokens_per_second)
                    self._clock.look()
            if state.skipped_in_a_row >= self.recipe.training.max_skipped:
                self._give_up(stage, seen)

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def _start_records(self, checkpoint: Checkpoint | None) -> None:
        self.files.metrics.open(before_step=None if checkpoint is None else checkpoint.step)
        if checkpoint is not None:
            self.files.bring_back("best", "predictions")
            if self.state.record is not None:
                self.files.metrics.write(self.state.record)

    def _checkpoint(self) -> None:
        state = self.state
        if self._saved == state.step or self._step is None:
            return
        self._clock.tick("other")
        self._observe(self.stages[state.stage], None, logged=False)
        if state.record is not None:
            self.files.metrics.write(state.record)
        self.files.metrics.flush()
        tensors, scalars = gather(self.model, self._step)  # by every process: each may keep a part of the moments
        if self.world.is_main:
            self.store.save(state.step, tensors, {"run": asdict(state), "step": scalars, **self.constants})
        self._saved = state.step
        self._clock.tick("checkpoint")

    # ---- When things go wrong ---------------------------------------------------------------------------------------

    def _give_up(self, stage: Stage, seen: Observation) -> None:
        """Stops a run whose losses stay non-finite. Skipped steps changed nothing: the model is the last good one."""
        places = [stage.place(task, row) for task in seen.skipped for row in dict.fromkeys(seen.rows[task].tolist())]
        shown = ", ".join(places[:SHOWN_EXAMPLES])
        more = f" and {len(places) - SHOWN_EXAMPLES} more" if len(places) > SHOWN_EXAMPLES else ""
        if self.state.record is not None:
            self.files.metrics.write(self.state.record)
        with self._averaged():
            self.files.write_directory("last", self.save)
        raise RunError(
            f"stopped after step {seen.step}: {self.state.skipped_in_a_row} steps in a row had losses or gradients "
            f"that are not finite, the last in {', '.join(seen.skipped)} (examples {shown}{more}); the last good "
            f"model is in {self.files.path / 'last'}; a lower --lr may help"
        )

    def _memory_advice(self, stage: Stage, batch: MultitaskBatch) -> str:
        options = stage.recipe
        examples = sum(batch.num_examples(task) for task in batch.tasks)
        return (
            f"out of memory at step {self.state.step + 1}, a batch of {examples} examples with "
            f"{batch.packed.num_tokens:,} tokens (longest sentence {batch.packed.max_seqlen}): lower --batch-size (now "
            f"{options.training.batch_size}) or --set data.max_length (now {options.data.max_length})"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU (torch.OutOfMemoryError) or in main memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)


def shown_metrics(metrics: Mapping[str, float | None]) -> str:
    """Scores in one line."""
    return ", ".join(f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in metrics.items())


def _better(evaluation: Evaluation, best: Mapping[str, Any] | None) -> bool:
    if best is None or best["score"] is None:
        return True
    return bool(evaluation.score > best["score"])
