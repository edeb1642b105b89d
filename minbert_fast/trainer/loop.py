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
from typing import Any

from torch import Tensor, nn

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
    copy_weights,
    load_model,
    load_step,
    set_weights,
)
from minbert_fast.trainer.outputs import RunDirectory
from minbert_fast.trainer.plan import Evaluation, Stage
from minbert_fast.trainer.progress import Progress
from minbert_fast.trainer.records import Clock, Observation, Observer, evaluation_record, training_record
from minbert_fast.trainer.schedule import lr_scale
from minbert_fast.trainer.signals import StopSignals

KEPT = "kept/"  # start of the names of checkpointed tensors that a later stage starts from
SHOWN_EXAMPLES = 8  # examples named when non-finite losses stop a run


@dataclass(frozen=True)
class Outcome:
    """How a run ended. The best evaluations include one at the end that was not due, which those in `state` do not."""

    state: State
    best: dict[str, Any] | None
    task_best: dict[str, dict[str, Any]]  # by task, if the recipe keeps the best model of each
    reason: str
    finished: bool  # False: `stop_after` cut the run


@dataclass
class Trainer:
    """Runs the stages of a recipe. Raises RunError or InterruptError with a line for the user."""

    recipe: Recipe
    stages: Sequence[Stage]
    model: nn.Module
    files: RunDirectory
    evaluate: Callable[[], Evaluation | None]  # called on rank 0; None: there are no dev files
    save: Callable[[Path], None]  # writes the model directory
    constants: Mapping[str, Any]  # further entries of every checkpoint's state.json
    judged_by: Mapping[str, str] = field(default_factory=dict)  # task -> the metric that judges it
    fetch_every_step: bool = True  # costs nothing on a CPU; on a GPU it would wait for every step to finish
    world: World = field(default_factory=World)
    callbacks: Sequence[Callback] = ()
    stop_after: int | None = None  # cut the run after this many steps, resumed parts included

    def __post_init__(self) -> None:
        self.store = CheckpointStore(self.files.checkpoints, max(self.recipe.checkpoint.keep, NEWEST))
        self.total = sum(stage.steps for stage in self.stages)
        self.end = self.total if self.stop_after is None else min(self.total, self.stop_after)

    # ---- The run ----------------------------------------------------------------------------------------------------

    def run(self, checkpoint: Checkpoint | None = None) -> Outcome:
        """Trains to the end, from the start or from `checkpoint`, whose tensors it loads into the model."""
        self.state = State() if checkpoint is None else State(**checkpoint.state["run"])
        self._saved = -1 if checkpoint is None else checkpoint.step  # step of the last checkpoint
        self._kept = self._initial_weights(checkpoint)
        self._observer = Observer()
        self._signals = StopSignals()
        self._stopped = False  # by a callback
        self._watched = self.world.from_main(lambda: bool(self.callbacks))  # by callbacks, which rank 0 alone calls
        self._agreed = Agreement(self.world)
        self._clock = Clock(self.state)
        self.files.metrics.open(before_step=None if checkpoint is None else checkpoint.step)
        if checkpoint is not None:
            self.files.bring_back("best", "predictions", *(f"best-{task}" for task in self.judged_by))
            if self.state.record is not None:
                self.files.metrics.write(self.state.record)
        self._progress = Progress(self.state.step, self.total, self.world.is_main)
        try:
            with self._signals:
                self._run_stages(checkpoint)
                self._save_checkpoint()
                self._adopt_average()
                final = self._final_evaluation()
        except InterruptError as stop:
            raise InterruptError(
                stop.number,
                f"{stop.signal_name}: stopped after step {self.state.step}, which is saved; to continue: "
                f"python -m minbert_fast.train --resume --output {shlex.quote(str(self.files.shown))}",
            ) from None
        except RunError as error:
            known = self._saved >= 0 and self.world.is_main  # other ranks do not know whether rank 0 has written it
            kept = f"; the checkpoint of step {self._saved} is intact" if known else ""
            raise RunError(f"{error}{kept}") from error
        finally:
            self._progress.close()
        self._clock.tick("other")
        step = self.state.step
        if self._cut:
            who = "stopped by a callback" if self._stopped else "stopped"
            reason = f"{who} after step {step:,} of {self.total:,}: --resume continues"
        else:
            reason = "no better score for a while" if step < self.total else "all steps taken"
        return Outcome(self.state, final.best, final.task_best, reason, not self._cut)

    @property
    def _cut(self) -> bool:
        """Whether a callback or `stop_after` ends the run before its last step."""
        return self.state.step < self.total and (self._stopped or self.end <= self.state.step)

    def _run_stages(self, checkpoint: Checkpoint | None) -> None:
        for index in range(self.state.stage, len(self.stages)):
            if index != self.state.stage:
                self._adopt_average()
                self._begin_stage(index)
            self._run_stage(self.stages[index], checkpoint)
            checkpoint = None
            if self._cut:
                return

    def _run_stage(self, stage: Stage, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            load_model(self.model, checkpoint)
        self.__dict__.pop("_step", None)  # frees the memory of the stage before first
        self._step: TrainingStep = stage.build_step()
        if checkpoint is not None:
            load_step(self._step, checkpoint)
        self._after_step(stage)
        if self._stage_finished(stage):
            return
        with closing(stage.batches(self.state.stage_step, stage.steps)) as batches:
            self._clock.tick("other")
            for batch in batches:
                self._clock.tick("data")
                self._take_step(stage, batch)
                self._after_step(stage)
                if self._stage_finished(stage):
                    return

    def _take_step(self, stage: Stage, batch: MultitaskBatch) -> None:
        state = self.state
        scale = lr_scale(state.stage_step, stage.steps, stage.steps_per_epoch, stage.recipe.optimizer)
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

    # ---- The first weights of a stage -------------------------------------------------------------------------------

    def _initial_weights(self, checkpoint: Checkpoint | None) -> dict[str, dict[str, Tensor]]:
        """Weights that later stages start from, by name: "best" of this stage, or the number of a finished stage."""
        kept: dict[str, dict[str, Tensor]] = {}
        if self._needed("0", self.state.stage):
            kept["0"] = copy_weights(self.model)  # before a checkpoint is loaded
        for name, tensor in checkpoint.tensors.items() if checkpoint is not None else ():
            if name.startswith(KEPT):
                weights, _, parameter = name.removeprefix(KEPT).partition("/")
                kept.setdefault(weights, {})[parameter] = tensor
        return kept

    def _begin_stage(self, index: int) -> None:
        """Moves on to stage `index`, which takes its first weights from where its recipe says."""
        start = str(self.stages[index].recipe.training.start)
        if self._needed(str(index), index):
            self._kept[str(index)] = copy_weights(self.model)  # the last weights of the stage that has just ended
        if start in self._kept:
            set_weights(self.model, self._kept[start])
        elif start == "best":
            self._progress.say(f"stage {index + 1} starts from the last weights: stage {index} has no finite score")
        self._kept = {n: w for n, w in self._kept.items() if n != "best" and self._needed(n, index + 1)}
        self.state.begin_stage(index)

    def _needed(self, start: str, first: int) -> bool:
        """Whether stage `first` or one after it starts from the weights called `start`."""
        return any(str(stage.recipe.training.start) == start for stage in self.stages[first:])

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

    # ---- Averaged weights -------------------------------------------------------------------------------------------

    def _averaged_weights(self) -> AbstractContextManager[None]:
        """Inside the block the model has its averaged weights, if the recipe averages them."""
        return nullcontext() if self._step.average is None else self._step.average.applied()

    def _adopt_average(self) -> None:
        """Replaces the weights by their average for good, at the end of a stage."""
        if self._step.average is not None:
            self._step.average.adopt()

    # ---- Evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """A scheduled evaluation: updates the state, and best/ if the score is the best one so far."""
        state, evaluation = self.state, self._measure()
        if evaluation is not None:
            better = state.step > 0 and _beats(evaluation, self.recipe.training.select, state.best)
            if state.step == 0:
                state.untrained = dict(evaluation.metrics)
            else:
                if better:
                    state.best = self._keep_best(evaluation)
                self._keep_task_bests(evaluation, state)
                score = evaluation.score(self.stages[state.stage].recipe.training.select)
                improved = state.stage_best is None or score > state.stage_best
                state.stale = 0 if improved else state.stale + 1
                if improved and math.isfinite(score):
                    state.stage_best = score
                    if self._needed("best", state.stage + 1):
                        self._kept["best"] = copy_weights(self.model)
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
        self._keep_task_bests(evaluation, bests, provisional=True)
        better = _beats(evaluation, self.recipe.training.select, state.best)
        self._tell(EvaluationEvent(state.step, evaluation.metrics, better))
        if better:
            if state.best is not None:
                self.files.set_aside("best", "predictions")
            bests.best = self._keep_best(evaluation)
        return bests

    def _measure(self) -> Evaluation | None:
        """Rank 0's evaluation, in every process; the others cannot write its predictions.

        A signal interrupts rank 0 alone, and with it all: the others note theirs, so that every process goes the same way.
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

    def _keep_best(self, evaluation: Evaluation) -> dict[str, Any]:
        if self.world.is_main:
            self.files.write_directory("best", self.save)
            self.files.write_directory("predictions", evaluation.write)
        return self._summarise(evaluation, self.recipe.training.select)

    def _keep_task_bests(self, evaluation: Evaluation, bests: State, provisional: bool = False) -> None:
        """Saves best-TASK/ for each task that this stage trains and that has its best score now, if the recipe asks.

        Writes the scores to `bests.task_best`. A provisional result sets the directory aside that it replaces.
        """
        if not self.recipe.training.best_per_task:
            return
        trained = self.stages[self.state.stage].recipe.tasks
        for task, metric in self.judged_by.items():
            before = bests.task_best.get(task)
            if task not in trained or not _beats(evaluation, metric, before):
                continue
            if provisional and before is not None:
                self.files.set_aside(f"best-{task}")
            if self.world.is_main:
                self.files.write_directory(f"best-{task}", self.save)
            bests.task_best[task] = self._summarise(evaluation, metric)

    def _summarise(self, evaluation: Evaluation, metric: str) -> dict[str, Any]:
        score = evaluation.score(metric)
        found = {"step": self.state.step, "score": score if math.isfinite(score) else None}
        train = {"train": dict(evaluation.train)} if evaluation.train else {}
        return found | {"metrics": dict(evaluation.metrics)} | train

    def _report_dev(self, evaluation: Evaluation) -> dict[str, Any]:
        scores = (f"{name} {format_score(value)}" for name, value in evaluation.metrics.items())
        self._progress.say(f"step {self.state.step}: {', '.join(scores)}")
        return evaluation_record(evaluation, self.state, self.stages)

    # ---- Records and checkpoints ------------------------------------------------------------------------------------

    def _observe(self, stage: Stage, scale: float | None, logged: bool) -> None:
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
                self._abort(stage, seen)

    def _tell(self, event: StepEvent | EvaluationEvent) -> None:
        """Calls every callback on rank 0. The run ends, in every process, if one of them returns True."""

        def call() -> list[bool]:  # each callback, even after one that stops the run
            if isinstance(event, StepEvent):
                return [bool(callback.on_step(event)) for callback in self.callbacks]
            return [bool(callback.on_evaluation(event)) for callback in self.callbacks]

        if self._watched:
            self._stopped |= any(self.world.from_main(call))

    def _save_checkpoint(self) -> None:
        state = self.state
        if self._saved == state.step:
            return
        self._clock.tick("other")
        self._observe(self.stages[state.stage], None, logged=False)
        if state.record is not None:
            self.files.metrics.write(state.record)
        self.files.metrics.flush()
        # In every process, because each may hold a part of the moments.
        tensors, scalars = collect_tensors(self.model, self._step)
        for weights in self._kept.keys() - {"0"}:  # a resumed run finds those before the first stage by itself
            tensors |= {f"{KEPT}{weights}/{name}": tensor for name, tensor in self._kept[weights].items()}
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


def _beats(evaluation: Evaluation, metric: str, best: Mapping[str, Any] | None) -> bool:
    return best is None or best["score"] is None or evaluation.score(metric) > best["score"]
