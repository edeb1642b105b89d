# SPDX-License-Identifier: Apache-2.0
"""The training loop: runs the steps of all stages, with evaluations, checkpoints and records when they are due.

All decisions depend on `State` alone, which a checkpoint holds, so a resumed run continues exactly as an uninterrupted
one would. After each step, in this order: evaluate if due, write the step's record, save a checkpoint if due, stop if a
signal has arrived.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from minbert_fast.common.errors import InterruptError, RunError, is_out_of_memory
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.parallel.world import Agreement, World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.runs import format_score
from minbert_fast.step.stepping import TrainingStep
from minbert_fast.trainer.callbacks import Callback, EvaluationEvent, StepEvent
from minbert_fast.trainer.checkpoint import (
    NEWEST,
    Checkpoint,
    CheckpointStore,
    State,
    collect_tensors,
    load_model,
    load_step,
)
from minbert_fast.trainer.kept_weights import KeptWeights
from minbert_fast.trainer.outputs import RunDirectory
from minbert_fast.trainer.plan import Evaluation, Stage
from minbert_fast.trainer.progress import Progress
from minbert_fast.trainer.records import Clock, Observation, Observer, evaluation_record, training_record
from minbert_fast.trainer.schedule import lr_scale
from minbert_fast.trainer.signals import StopSignals

SHOWN_EXAMPLES = 8  # examples named when non-finite losses stop a run


@dataclass(frozen=True)
class Outcome:
    """How a run ended. The best evaluations include one at the end that was not due, which those in `state` do not."""

    state: State
    best: dict[str, Any] | None
    task_best: dict[str, dict[str, Any]]  # by task, if the recipe keeps the best model of each
    reason: str
    finished: bool  # False: `stop_after` cut the run


class _Active(NamedTuple):
    """The stage that is being trained."""

    stage: Stage
    step: TrainingStep

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the model has its averaged weights, if the recipe averages them."""
        return nullcontext() if self.step.average is None else self.step.average.applied()


@dataclass
class Trainer:
    """Runs the stages of a recipe to the end, from the start or from `checkpoint`, whose tensors it loads into the model.

    Raises RunError or InterruptError with a line for the user.
    """

    recipe: Recipe
    stages: Sequence[Stage]
    model: nn.Module
    files: RunDirectory
    evaluate: Callable[[], Evaluation | None]  # called on rank 0; None: there are no dev files
    save: Callable[[Path], None]  # writes the model directory
    constants: Mapping[str, Any]  # further entries of every checkpoint's state.json
    checkpoint: Checkpoint | None = None
    judged_by: Mapping[str, str] = field(default_factory=dict)  # task -> the metric that judges it
    fetch_every_step: bool = True  # costs nothing on a CPU; on a GPU it would wait for every step to finish
    world: World = field(default_factory=World)
    callbacks: Sequence[Callback] = ()
    stop_after: int | None = None  # cut the run after this many steps, resumed parts included
    again: str = ""  # the command that continues an interrupted run; empty: train --resume

    def __post_init__(self) -> None:
        self.total = sum(stage.steps for stage in self.stages)
        self.end = self.total if self.stop_after is None else min(self.total, self.stop_after)
        self.state = State() if self.checkpoint is None else State(**self.checkpoint.state["run"])
        self._store = CheckpointStore(self.files.checkpoints, max(self.recipe.checkpoint.keep, NEWEST))
        self._saved = -1 if self.checkpoint is None else self.checkpoint.step  # step of the last checkpoint
        self._kept = KeptWeights(self.model, [str(stage.recipe.training.start) for stage in self.stages])
        self._observer = Observer()
        self._signals = StopSignals()
        self._stopped = False  # by a callback
        self._watched = self.world.from_main(lambda: bool(self.callbacks))  # by callbacks, which rank 0 alone calls
        self._agreed = Agreement(self.world)
        self._clock = Clock(self.state)
        self._progress = Progress(self.state.step, self.total, self.world.is_main)

    # ---- The run ----------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Trains to the end."""
        state = self.state
        self._kept.keep("0", state.stage)  # before a checkpoint is loaded
        self.files.metrics.open(before_step=None if self.checkpoint is None else self.checkpoint.step)
        if self.checkpoint is not None:
            self._kept.load(self.checkpoint)
            self.files.bring_back("best", "predictions", *(f"best-{task}" for task in self.judged_by))
            if state.record is not None:
                self.files.metrics.write(state.record)
        try:
            with self._signals:
                self._run_stages()
                final = self._final_evaluation()
        except InterruptError as stop:
            again = self.again or f"python -m minbert_fast.train --resume --output {shlex.quote(str(self.files.shown))}"
            saved = f"{stop.signal_name}: stopped after step {state.step}, which is saved"
            raise InterruptError(stop.number, f"{saved}; to continue: {again}") from None
        except RunError as error:
            known = self._saved >= 0 and self.world.is_main  # other ranks do not know whether rank 0 has written it
            kept = f"; the checkpoint of step {self._saved} is intact" if known else ""
            raise RunError(f"{error}{kept}") from error
        finally:
            self._progress.close()
        self._clock.tick("other")
        if self._cut:
            who = "stopped by a callback" if self._stopped else "stopped"
            reason = f"{who} after step {state.step:,} of {self.total:,}: --resume continues"
        else:
            reason = "no better score for a while" if state.step < self.total else "all steps taken"
        return Outcome(state, final.best, final.task_best, reason, not self._cut)

    @property
    def _cut(self) -> bool:
        """Whether a callback or `stop_after` ends the run before its last step."""
        return self.state.step < self.total and (self._stopped or self.end <= self.state.step)

    def _run_stages(self) -> None:
        first = self.state.stage
        for index in range(first, len(self.stages)):
            if index != first:
                if not self._kept.begin_stage(index):
                    words = f"stage {index + 1} starts from the last weights: stage {index} has no finite score"
                    self._progress.say(words)
                self.state.begin_stage(index)
            self._run_stage(self.stages[index], self.checkpoint if index == first else None)
            if self._cut:
                return

    def _run_stage(self, stage: Stage, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            load_model(self.model, checkpoint)
        active = _Active(stage, stage.build_step())
        if checkpoint is not None:
            load_step(active.step, checkpoint)
        self._after_step(active)
        with closing(stage.batches(self.state.stage_step, stage.steps)) as batches:
            self._clock.tick("other")
            while not self._stage_finished(stage):
                batch = next(batches)
                self._clock.tick("data")
                self._take_step(active, batch)
                self._after_step(active)
        if self._cut or stage is self.stages[-1]:
            self._save_checkpoint(active)
        if active.step.average is not None:
            active.step.average.adopt()  # replaces the weights for good

    def _take_step(self, active: _Active, batch: MultitaskBatch) -> None:
        state, stage = self.state, active.stage
        scale = lr_scale(state.stage_step, stage.steps, stage.steps_per_epoch, stage.recipe.optimizer)
        try:
            result = active.step(batch, scale)
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
            self._observe(active, scale, logged)
        if not logged:
            self._progress.advance(None, self._clock.speed()[1])

    def _after_step(self, active: _Active) -> None:
        """Evaluates, records, saves and stops, as far as each is due after a step or at the start of a (resumed) stage."""
        state = self.state
        try:
            if self._evaluation_due(active.stage) and state.evaluated != state.step:
                with active.averaged():
                    self._evaluate()
        except InterruptError:
            pass  # handled below; the checkpoint says that the evaluation is still due
        if state.record is not None:
            self.files.metrics.write(state.record)
        stop = self._agreed(self._signals.received)
        if stop is not None or self._checkpoint_due(active.stage):
            self._save_checkpoint(active)
        if stop is not None:
            raise InterruptError(stop, "stopped between two steps")

    # ---- When things are due ----------------------------------------------------------------------------------------

    def _stage_finished(self, stage: Stage) -> bool:
        patience_exhausted = 0 < stage.patience <= self.state.stale
        return self._cut or self.state.stage_step >= stage.steps or patience_exhausted

    def _evaluation_due(self, stage: Stage) -> bool:
        if self.state.step == 0:
            return self.recipe.training.evaluate_untrained and self.end > 0
        return self._due(stage, stage.recipe.training.evaluate_every)

    def _checkpoint_due(self, stage: Stage) -> bool:
        return self._due(stage, self.recipe.checkpoint.every)

    def _due(self, stage: Stage, every: int) -> bool:
        """Whether the step is a multiple of `every` (0: the last one of an epoch), or the stage's last."""
        if self.state.stage_step == 0:
            return False
        remainder = self.state.step % every if every else self.state.stage_step % stage.steps_per_epoch
        return remainder == 0 or self.state.stage_step == stage.steps

    # ---- Evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """A scheduled evaluation: updates the state, and the best models if their scores are the best ones so far."""
        state, evaluation = self.state, self._measure()
        if evaluation is not None:
            better = False
            if state.step == 0:
                state.untrained = dict(evaluation.metrics)
            else:
                better = self._keep_bests(evaluation, state)
                score = evaluation.score(self.stages[state.stage].recipe.training.select)
                improved = state.stage_best is None or score > state.stage_best
                state.stale = 0 if improved else state.stale + 1
                if improved and math.isfinite(score):
                    state.stage_best = score
                    self._kept.keep("best", state.stage + 1)
            state.record = self._report_dev(evaluation)
            self._tell(EvaluationEvent(state.step, evaluation.metrics, better))
        state.evaluated = state.step
        if self._saved == state.step:  # by a run that stopped before this evaluation: its checkpoint lacks the scores
            self._saved = -1

    def _final_evaluation(self) -> State:
        """The state with the best evaluations, including one at the end of a run that `stop_after` cut between two.

        The additional evaluation enters only the returned copy: a run that resumes from here continues as if it had
        never been cut.
        """
        state = self.state
        evaluation = None if state.evaluated == state.step else self._measure()
        if evaluation is None:
            return state
        self.files.metrics.write(self._report_dev(evaluation))
        bests = replace(state, task_best=dict(state.task_best))
        better = self._keep_bests(evaluation, bests, provisional=True)
        self._tell(EvaluationEvent(state.step, evaluation.metrics, better))
        return bests

    def _measure(self) -> Evaluation | None:
        """Rank 0's evaluation, in every process; the others cannot write its predictions.

        A signal to rank 0 interrupts the evaluation in all processes. The others note theirs: so all go the same way.
        """
        self._clock.tick("other")
        found: list[Evaluation | None] = []

        def measure() -> Evaluation | None:
            with self._signals.interruptible():
                found.append(self.evaluate())
            return found[0] and replace(found[0], write=_write_nothing)

        evaluation = self.world.from_main(measure)
        self._clock.tick("evaluation")
        return found[0] if found else evaluation

    def _keep_bests(self, evaluation: Evaluation, bests: State, provisional: bool = False) -> bool:
        """Saves the models of the best scores so far, writes these scores to `bests`, and returns whether best/ is new.

        best-TASK/ is that of a task that this stage trains, if the recipe asks. A provisional result sets the directories
        aside that it replaces.
        """
        training, stage = self.recipe.training, self.stages[self.state.stage].recipe
        best = self._keep_best("best", evaluation, training.select, bests.best, provisional)
        bests.best = best or bests.best
        for task, metric in self.judged_by.items() if training.best_per_task else ():
            before = bests.task_best.get(task)
            if task in stage.tasks and (
                kept := self._keep_best(f"best-{task}", evaluation, metric, before, provisional)
            ):
                bests.task_best[task] = kept
        return best is not None

    def _keep_best(
        self, name: str, evaluation: Evaluation, metric: str, before: Mapping[str, Any] | None, provisional: bool
    ) -> dict[str, Any] | None:
        """Saves the model as directory `name` (best/: predictions too) if its score beats `before`; returns the scores."""
        score = evaluation.score(metric)
        if before is not None and before["score"] is not None and score <= before["score"]:
            return None
        directories = {name: self.save} | ({"predictions": evaluation.write} if name == "best" else {})
        if provisional and before is not None:
            self.files.set_aside(*directories)
        for directory, fill in directories.items() if self.world.is_main else ():
            self.files.write_directory(directory, fill)
        found = {"step": self.state.step, "stage": self.state.stage, "score": score if math.isfinite(score) else None}
        train = {"train": dict(evaluation.train)} if evaluation.train else {}
        return found | {"metrics": dict(evaluation.metrics)} | train

    def _report_dev(self, evaluation: Evaluation) -> dict[str, Any]:
        scores = (f"{name} {format_score(value)}" for name, value in evaluation.metrics.items())
        self._progress.say(f"step {self.state.step}: {', '.join(scores)}")
        return evaluation_record(evaluation, self.state, self.stages)

    # ---- Records and checkpoints ------------------------------------------------------------------------------------

    def _observe(self, active: _Active, scale: float | None, logged: bool) -> None:
        """Fetches the results since the last fetch; records every skipped step, and the last step if `logged`.

        The first skipped step of a run is printed too.
        """
        state = self.state
        for seen in self._observer.fetch():
            if seen.skipped:
                state.skipped_steps += 1
                state.skipped_in_a_row += 1
                for task in seen.skipped:
                    state.skipped[task] = state.skipped.get(task, 0) + 1
                if state.skipped_steps == 1:  # of a run that skips many, the last lines count them
                    where = ", ".join(seen.skipped)
                    self._progress.say(f"step {seen.step} is skipped: the loss or gradient of {where} is not finite")
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
                    self._tell(StepEvent(seen.step, self.total, seen.losses, record.get("lr"), seen.grad_norm))
            if state.skipped_in_a_row >= self.recipe.training.max_skipped:
                self._abort(active, seen)

    def _tell(self, event: StepEvent | EvaluationEvent) -> None:
        """Calls every callback on rank 0. The run ends, in every process, if one of them returns True."""

        def call() -> list[bool]:  # each callback, even after one that stops the run
            if isinstance(event, StepEvent):
                return [bool(callback.on_step(event)) for callback in self.callbacks]
            return [bool(callback.on_evaluation(event)) for callback in self.callbacks]

        if self._watched:
            self._stopped |= any(self.world.from_main(call))

    def _save_checkpoint(self, active: _Active) -> None:
        state = self.state
        if self._saved == state.step:
            return
        self._clock.tick("other")
        self._observe(active, None, logged=False)
        if state.record is not None:
            self.files.metrics.write(state.record)
        self.files.metrics.flush()
        # In every process, because each may hold a part of the moments.
        tensors, scalars = collect_tensors(self.model, active.step)
        tensors |= self._kept.tensors()
        if self.world.is_main:
            self._store.save(state.step, tensors, {"run": asdict(state), "step": scalars, **self.constants})
        self._saved = state.step
        self._clock.tick("checkpoint")

    def _abort(self, active: _Active, seen: Observation) -> None:
        """Saves last/ and stops a run whose losses stay non-finite; skipped steps have not changed the model."""
        places = [
            active.stage.locate(task, row) for task in seen.skipped for row in dict.fromkeys(seen.rows[task].tolist())
        ]
        more = f" and {len(places) - SHOWN_EXAMPLES} more" if len(places) > SHOWN_EXAMPLES else ""
        if self.state.record is not None:
            self.files.metrics.write(self.state.record)
        with active.averaged():
            self.files.write_directory("last", self.save)
        raise RunError(
            f"stopped after step {seen.step}: {self.state.skipped_in_a_row} steps in a row had losses or gradients "
            f"that are not finite, the last in {', '.join(seen.skipped)} (examples "
            f"{', '.join(places[:SHOWN_EXAMPLES])}{more}); the last good model is in {self.files.shown / 'last'}; "
            "a lower --lr may help"
        )


def _out_of_memory_message(stage: Stage, batch: MultitaskBatch, step: int) -> str:
    examples = sum(batch.num_examples(task) for task in batch.tasks)
    return (
        f"out of memory at step {step}, a batch of {examples} examples with {batch.packed.num_tokens:,} tokens (longest "
        f"sentence {batch.packed.max_seqlen}): lower --batch-size (now {stage.recipe.training.batch_size}) or "
        f"--set data.max_length (now {stage.recipe.data.max_length})"
    )


def _write_nothing(directory: Path) -> None:
    """Stands for the predictions in an evaluation that rank 0 sends."""
