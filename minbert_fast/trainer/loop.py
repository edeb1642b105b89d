# SPDX-License-Identifier: Apache-2.0
"""The training loop: runs the steps of all stages, with evaluations, checkpoints and records when they are due.

All decisions depend on `State` alone, which a checkpoint holds, so a resumed run continues exactly as an uninterrupted
one would. After each step, in this order: evaluate if due, write the step's record, save a checkpoint if due, stop if a
signal has arrived.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from minbert_fast.common.errors import InterruptError, RunError, is_out_of_memory
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.parallel.world import Agreement, World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.runs import format_score
from minbert_fast.trainer.checkpoint import Checkpoint, CheckpointStore, State, collect_tensors, load_model, load_step
from minbert_fast.trainer.outputs import RunDirectory
from minbert_fast.trainer.progress import Progress
from minbert_fast.trainer.records import Clock, Observation, Observer, dev_record, training_record
from minbert_fast.trainer.schedule import lr_scale
from minbert_fast.trainer.signals import StopSignals

if TYPE_CHECKING:
    from minbert_fast.step.stepping import TrainingStep

SHOWN_EXAMPLES = 8  # examples named when non-finite losses stop a run


@dataclass(frozen=True)
class Evaluation:
    """Dev scores of the model at one step."""

    metrics: Mapping[str, float | None]
    score: float  # the metric that chooses the best model; minus infinity if it is not a number
    write: Callable[[Path], None]  # writes the files of predictions/


@dataclass(frozen=True)
class Stage:
    """One resolved stage of a recipe, with the functions that run it."""

    recipe: Recipe
    steps_per_epoch: int
    limit: int | None  # the stage's own max_steps
    patience: int  # evaluations without a better score that end the stage; 0: no limit
    build_step: Callable[[], TrainingStep]  # prepares the model for this stage
    batches: Callable[[int], Generator[MultitaskBatch, None, None]]  # from a step of the stage on, on the step's device
    locate: Callable[[str, int], str]  # (task, row) -> "file:line"

    @property
    def schedule_steps(self) -> int:
        """Steps of the learning rate schedule: all epochs of the stage, even if the stage is cut short."""
        return self.recipe.training.epochs * self.steps_per_epoch

    @property
    def steps(self) -> int:
        """Most steps that the stage takes."""
        return self.schedule_steps if self.limit is None else min(self.schedule_steps, self.limit)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `best` includes an evaluation at the end that was not due, which `state` does not."""

    state: State
    best: dict[str, Any] | None
    reason: str


@dataclass
class Trainer:
    """Runs the stages of a recipe. Raises RunError or InterruptError with a line for the user."""

    recipe: Recipe
    stages: Sequence[Stage]
    model: nn.Module
    files: RunDirectory
    evaluate: Callable[[], Evaluation | None]  # None: there are no dev files
    save: Callable[[Path], None]  # writes the model directory
    constants: Mapping[str, Any]  # further entries of every checkpoint's state.json
    fetch_every_step: bool = True  # costs nothing on a CPU; on a GPU it would wait for every step to finish
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        self.store = CheckpointStore(self.files.checkpoints, self.recipe.checkpoint.keep)
        self.total = sum(stage.steps for stage in self.stages)
        if self.recipe.training.max_steps is not None:
            self.total = min(self.total, self.recipe.training.max_steps)

    # ---- The run ----------------------------------------------------------------------------------------------------

    def run(self, checkpoint: Checkpoint | None = None) -> Outcome:
        """Trains to the end, from the start or from `checkpoint`, whose tensors it loads into the model."""
        self.state = State() if checkpoint is None else State(**checkpoint.state["run"])
        self._saved = -1 if checkpoint is None else checkpoint.step  # step of the last checkpoint
        self._step: TrainingStep | None = None
        self._observer = Observer()
        self._signals = StopSignals()
        self._agreed = Agreement(self.world)
        self._clock = Clock(self.state)
        self.files.metrics.open(before_step=None if checkpoint is None else checkpoint.step)
        if checkpoint is not None:
            self.files.bring_back("best", "predictions")
            if self.state.record is not None:
                self.files.metrics.write(self.state.record)
        self._progress = Progress(self.state.step, self.total, self.world.is_main)
        try:
            with self._signals:
                self._run_stages(checkpoint)
                self._save_checkpoint()
                self._adopt_average()
                best = self._final_evaluation()
        except InterruptError as stop:
            raise InterruptError(
                stop.number,
                f"{stop.signal_name}: stopped after step {self.state.step}, which is saved; to continue: "
                f"python -m minbert_fast.train --resume --output {shlex.quote(str(self.files.path))}",
            ) from None
        except RunError as error:
            kept = f"; the checkpoint of step {self._saved} is intact" if self._saved >= 0 else ""
            raise RunError(f"{error}{kept}") from error
        finally:
            self._progress.close()
        self._clock.tick("other")
        early = self.state.step < self.total
        return Outcome(self.state, best, "no better score for a while" if early else "all steps taken")

    def _run_stages(self, checkpoint: Checkpoint | None) -> None:
        for index in range(self.state.stage, len(self.stages)):
            if index != self.state.stage:
                self._adopt_average()
                self.state.begin_stage(index)
            self._run_stage(self.stages[index], checkpoint)
            checkpoint = None
            if self.state.step >= self.total:
                return

    def _run_stage(self, stage: Stage, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            load_model(self.model, checkpoint)
        self._step = stage.build_step()
        if checkpoint is not None:
            load_step(self._step, checkpoint)
        self._after_step(stage)
        if self._stage_finished(stage):
            return
        with closing(stage.batches(self.state.stage_step)) as batches:
            self._clock.tick("other")
            for batch in batches:
                self._clock.tick("data")
                self._take_step(stage, batch)
                self._after_step(stage)
                if self._stage_finished(stage):
                    return

    def _take_step(self, stage: Stage, batch: MultitaskBatch) -> None:
        assert self._step is not None
        state = self.state
        scale = lr_scale(state.stage_step, stage.schedule_steps, stage.steps_per_epoch, stage.recipe.optimizer)
        try:
            result = self._step(batch, scale)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(_out_of_memory_message(stage, batch, state.step + 1)) from error
        state.step += 1
        state.stage_step += 1
        state.tokens += batch.step_tokens
        state.record = None
        self._observer.add(state.step, batch, result)
        self._clock.tick("steps", result.seconds)
        logged = state.step == 1 or state.step % self.recipe.logging.every == 0 or self._evaluation_due(stage)
        if logged or self.fetch_every_step or self._checkpoint_due(stage):
            self._observe(stage, scale, logged)
        if not logged:
            self._progress.advance(None, self._clock.speed()[1])

    def _after_step(self, stage: Stage) -> None:
        """Evaluates, records, saves and stops, as far as each is due after a step or at the start of a (resumed) stage."""
        state = self.state
        try:
            if self._evaluation_due(stage) and state.evaluated != state.step:
                with self._averaged_weights():
                    self._evaluate()
        except InterruptError:
            pass  # handled below; the checkpoint says that the evaluation is still due
        if state.record is not None:
            self.files.metrics.write(state.record)
        stop = self._agreed(self._signals.received)
        if stop is not None or self._checkpoint_due(stage):
            self._save_checkpoint()
        if stop is not None:
            raise InterruptError(stop, "stopped between two steps")

    # ---- When things are due ----------------------------------------------------------------------------------------

    def _stage_finished(self, stage: Stage) -> bool:
        patience_exhausted = 0 < stage.patience <= self.state.stale
        return self.state.step >= self.total or self.state.stage_step >= stage.steps or patience_exhausted

    def _evaluation_due(self, stage: Stage) -> bool:
        if self.state.step == 0:
            return self.recipe.training.evaluate_untrained and self.total > 0
        return self._due(stage, stage.recipe.training.evaluate_every)

    def _checkpoint_due(self, stage: Stage) -> bool:
        return self._due(stage, self.recipe.checkpoint.every)

    def _due(self, stage: Stage, every: int) -> bool:
        """Whether the step is a multiple of `every` (0: the last one of an epoch), or the stage's last."""
        if self.state.stage_step == 0:
            return False
        remainder = self.state.step % every if every else self.state.stage_step % stage.steps_per_epoch
        return remainder == 0 or self.state.stage_step == stage.steps

    # ---- Averaged weights -------------------------------------------------------------------------------------------

    def _averaged_weights(self) -> AbstractContextManager[None]:
        """Inside the block the model has its averaged weights, if the recipe averages them."""
        average = None if self._step is None else self._step.average
        return nullcontext() if average is None else average.applied()

    def _adopt_average(self) -> None:
        """Replaces the weights by their average for good, at the end of a stage."""
        if self._step is not None and self._step.average is not None:
            self._step.average.adopt()

    # ---- Evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """A scheduled evaluation: updates the state, and best/ if the score is the best one so far."""
        state, evaluation = self.state, self._measure()
        if evaluation is not None:
            if state.step == 0:
                state.untrained = dict(evaluation.metrics)
            else:
                if _is_better(evaluation, state.best):
                    state.best = self._keep_best(evaluation)
                improved = state.stage_best is None or evaluation.score > state.stage_best
                state.stale = 0 if improved else state.stale + 1
                if improved and math.isfinite(evaluation.score):
                    state.stage_best = evaluation.score
            state.record = self._report_dev(evaluation)
        state.evaluated = state.step

    def _final_evaluation(self) -> dict[str, Any] | None:
        """The best evaluation, including one at the end of a run that `max_steps` cut between two scheduled ones.

        The additional evaluation does not enter the state: a run that resumes from here continues as if it had never
        been cut.
        """
        state = self.state
        evaluation = None if state.evaluated == state.step else self._measure()
        if evaluation is None:
            return state.best
        self.files.metrics.write(self._report_dev(evaluation))
        if not _is_better(evaluation, state.best):
            return state.best
        if state.best is not None:
            self.files.set_aside("best", "predictions")
        return self._keep_best(evaluation)

    def _measure(self) -> Evaluation | None:
        self._clock.tick("other")
        with self._signals.interruptible():
            evaluation = self.evaluate()
        self._clock.tick("evaluation")
        return evaluation

    def _keep_best(self, evaluation: Evaluation) -> dict[str, Any]:
        if self.world.is_main:
            self.files.write_directory("best", self.save)
            self.files.write_directory("predictions", evaluation.write)
        score = evaluation.score if math.isfinite(evaluation.score) else None
        return {"step": self.state.step, "score": score, "metrics": dict(evaluation.metrics)}

    def _report_dev(self, evaluation: Evaluation) -> dict[str, Any]:
        scores = (f"{name} {format_score(value)}" for name, value in evaluation.metrics.items())
        self._progress.say(f"step {self.state.step}: {', '.join(scores)}")
        return dev_record(evaluation.metrics, self.state, self.stages)

    # ---- Records and checkpoints ------------------------------------------------------------------------------------

    def _observe(self, stage: Stage, scale: float | None, logged: bool) -> None:
        """Fetches the results since the last fetch; records every skipped step, and the last step if `logged`."""
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
                record = training_record(seen, state, self.stages, self._clock, scale if last else None)
                if last:
                    state.record = record | (state.record or {})
                else:
                    self.files.metrics.write(record)
                if logged and last:
                    self._progress.advance(seen.losses, self._clock.speed()[1])
                    self._clock.reset_speed()
            if state.skipped_in_a_row >= self.recipe.training.max_skipped:
                self._abort(stage, seen)

    def _save_checkpoint(self) -> None:
        state = self.state
        if self._saved == state.step or self._step is None:
            return
        self._clock.tick("other")
        self._observe(self.stages[state.stage], None, logged=False)
        if state.record is not None:
            self.files.metrics.write(state.record)
        self.files.metrics.flush()
        # In every process, because each may hold a part of the moments.
        tensors, scalars = collect_tensors(self.model, self._step)
        if self.world.is_main:
            self.store.save(state.step, tensors, {"run": asdict(state), "step": scalars, **self.constants})
        self._saved = state.step
        self._clock.tick("checkpoint")

    def _abort(self, stage: Stage, seen: Observation) -> None:
        """Saves last/ and stops a run whose losses stay non-finite; skipped steps have not changed the model."""
        places = [stage.locate(task, row) for task in seen.skipped for row in dict.fromkeys(seen.rows[task].tolist())]
        more = f" and {len(places) - SHOWN_EXAMPLES} more" if len(places) > SHOWN_EXAMPLES else ""
        if self.state.record is not None:
            self.files.metrics.write(self.state.record)
        with self._averaged_weights():
            self.files.write_directory("last", self.save)
        raise RunError(
            f"stopped after step {seen.step}: {self.state.skipped_in_a_row} steps in a row had losses or gradients "
            f"that are not finite, the last in {', '.join(seen.skipped)} (examples "
            f"{', '.join(places[:SHOWN_EXAMPLES])}{more}); the last good model is in {self.files.path / 'last'}; "
            "a lower --lr may help"
        )


def _out_of_memory_message(stage: Stage, batch: MultitaskBatch, step: int) -> str:
    examples = sum(batch.num_examples(task) for task in batch.tasks)
    return (
        f"out of memory at step {step}, a batch of {examples} examples with {batch.packed.num_tokens:,} tokens (longest "
        f"sentence {batch.packed.max_seqlen}): lower --batch-size (now {stage.recipe.training.batch_size}) or "
        f"--set data.max_length (now {stage.recipe.data.max_length})"
    )


def _is_better(evaluation: Evaluation, best: Mapping[str, Any] | None) -> bool:
    return best is None or best["score"] is None or evaluation.score > best["score"]
