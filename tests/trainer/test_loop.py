# SPDX-License-Identifier: Apache-2.0
"""The loop with a fake training step: when evaluations, records and checkpoints are due, exact resume, ends of runs."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minbert_fast.common.errors import InterruptError, RunError
from minbert_fast.common.schema import build
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.packing import pack
from minbert_fast.parallel.world import World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.stepping import StepResult
from minbert_fast.trainer import loop, plan, signals
from minbert_fast.trainer.checkpoint import CheckpointStore
from minbert_fast.trainer.outputs import RunDirectory
from minbert_fast.trainer.results import format_outcome
from minbert_fast.trainer.schedule import lr_scale
from minbert_fast.trainer.signals import StopSignals
from tests.small import read_records

TASKS = ("a", "b")
STEPS_PER_EPOCH = 4
TIMES = ("step_seconds", "time")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))
        self.register_buffer("seen", torch.zeros(4))  # as a head's running statistics


class StandIn:
    """A fake step with state that a checkpoint must hold: momentum, noise from torch's generator, a step counter."""

    broken: frozenset[int] = frozenset()  # steps with a loss that is not finite
    average = None

    def __init__(self, model: Model) -> None:
        self.model, self.momentum, self.count = model, torch.zeros(4), 0

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        self.count += 1
        noise = torch.randn(4)
        bad = torch.tensor([self.count in self.broken, False])
        loss = torch.where(bad, torch.nan, torch.tensor([1.0, 2.0]) * batch.packed.num_tokens)
        if not bad.any():
            self.momentum = 0.9 * self.momentum + noise + batch.packed.tokens.float().mean()
            with torch.no_grad():
                self.model.seen += self.momentum
                self.model.weight -= 0.1 * lr_scale * (self.momentum + self.model.seen)
        gram = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        return StepResult(loss, noise.norm(), gram, bad)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {"momentum": self.momentum}, "scalars": {"count": self.count}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.momentum = state["tensors"]["momentum"].clone()
        self.count = state["scalars"]["count"]


def batch_at(stage: int, step: int) -> MultitaskBatch:
    """A batch that depends on stage and step alone."""
    numbers = np.random.default_rng([stage, step])
    sentences = [[numbers.integers(1, 50, numbers.integers(1, 6)) for _ in range(2)] for _ in TASKS]
    return MultitaskBatch(
        packed=pack(sentences),
        tasks=TASKS,
        arity=dict.fromkeys(TASKS, 1),
        labels={},
        rows={task: np.array([2 * step, 2 * step + 1]) for task in TASKS},
    )


def accuracy_at(step: int, prime: int) -> float:
    """A task's fake accuracy, which goes up and down over the steps."""
    return (step * prime) % 7 / 7


class Run:
    """One process that runs in directory `path`."""

    def __init__(self, path: Path, recipe: Mapping[str, Any], **hooks: Any) -> None:
        self.path = path
        self.recipe = build(Recipe, {"tasks": {task: {} for task in TASKS}, **recipe}, "test")
        self.eager = hooks.pop("eager", True)
        self.at_evaluation: Callable[[int], None] = hooks.pop("at_evaluation", lambda step: None)
        self.at_step: Callable[[int], None] = hooks.pop("at_step", lambda step: None)
        self.metric = "score"
        self.scores: Callable[[Tensor], float] = hooks.pop("scores", lambda weight: -float(weight.square().sum()))
        self.broken: frozenset[int] = hooks.pop("broken", frozenset())
        self.judged_by = {task: f"{task}_accuracy" for task in TASKS} if self.recipe.training.best_per_task else {}
        self.stop_after: int | None = hooks.pop("stop_after", None)
        self.world: World = hooks.pop("world", World())
        self.shown: Path | None = hooks.pop("shown", None)
        assert not hooks
        self.model = Model()
        self.evaluations: list[int] = []

    def stages(self) -> list[plan.Stage]:
        found = []
        for index, recipe in enumerate(self.recipe.resolved_stages()):
            own = self.recipe.stages[index].get("training", {}).get("max_steps") if self.recipe.stages else None
            found.append(
                plan.Stage(
                    recipe=recipe,
                    steps_per_epoch=STEPS_PER_EPOCH,
                    steps=plan.schedule_steps(recipe.training.epochs, STEPS_PER_EPOCH) if own is None else own,
                    patience=recipe.training.patience,
                    build_step=self.build_step,
                    batches=lambda first, end, index=index: self.batches(index, first, end),
                    locate=lambda task, row: f"{task}.csv:{row + 2}",
                )
            )
        return plan.share_steps(found, self.recipe.training.max_steps)

    def build_step(self) -> StandIn:
        step = StandIn(self.model)
        step.broken = self.broken
        return step

    def batches(self, stage: int, first: int, end: int) -> Generator[MultitaskBatch, None, None]:
        for step in range(first, end):
            self.at_step(self.trainer.state.step + 1)
            yield batch_at(stage, step)

    def evaluate(self) -> plan.Evaluation:
        step = self.trainer.state.step
        self.at_evaluation(step)
        self.evaluations.append(step)
        score = self.scores(self.model.weight.detach())
        metrics = {self.metric: score}
        if self.judged_by:
            metrics |= {"a_accuracy": accuracy_at(step, 3), "b_accuracy": accuracy_at(step, 5)}
        return plan.Evaluation(metrics, lambda d: (d / "p.csv").write_text(str(step)) and None)

    def save(self, directory: Path) -> None:
        (directory / "weight.json").write_text(json.dumps(self.model.weight.tolist()))

    def go(self, resume: bool = False) -> loop.Outcome:
        torch.manual_seed(5)
        with RunDirectory(self.path, self.shown) as files:
            files.prepare("", {})
            checkpoint = CheckpointStore(files.checkpoints, 1).newest(pytest.fail) if resume else None
            self.trainer = loop.Trainer(
                recipe=self.recipe,
                stages=self.stages(),
                model=self.model,
                files=files,
                evaluate=self.evaluate,
                save=self.save,
                constants={"fingerprint": "x"},
                checkpoint=checkpoint,
                judged_by=self.judged_by,
                fetch_every_step=self.eager,
                stop_after=self.stop_after,
                world=self.world,
            )
            outcome = self.trainer.run()
            files.write_directory("last", self.save)
            return outcome

    def records(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in TIMES} for line in read_records(self.path)]

    def files(self) -> dict[str, str]:
        names = ["last/weight.json", "best/weight.json", "predictions/p.csv"]
        names += [f"best-{task}/weight.json" for task in self.judged_by]
        return {name: (self.path / name).read_text() for name in names}


RECIPE: dict[str, Any] = {
    "training": {"epochs": 3},
    "logging": {"every": 1},
    "checkpoint": {"every": 3, "keep": 1},
    "optimizer": {"warmup": 0.2},
}
STAGED: dict[str, Any] = RECIPE | {
    "stages": [{"training": {"epochs": 1}}, {"training": {"epochs": 5, "max_steps": 6}, "optimizer": {"lr": 1.0}}],
    "training": {"evaluate_every": 3},
}


RETURNING: dict[str, Any] = RECIPE | {  # stages that start from the best, the first and the initial weights
    "training": {"epochs": 0.5, "evaluate_every": 2, "best_per_task": True},
    "stages": [
        {"training": {"epochs": 1.75}, "tasks": {"a": {}}},
        {"training": {"start": "best"}, "tasks": {"b": {}}},
        {"training": {"start": 1}},
        {"training": {"start": 0}},
    ],
}


class KilledError(BaseException):
    """Ends a run without saving anything, as SIGKILL does."""


# ---- When things are due --------------------------------------------------------------------------------------


def test_steps_evaluations_and_records_of_a_plain_run(tmp_path: Path) -> None:
    run = Run(tmp_path, RECIPE)
    outcome = run.go()
    assert outcome.state.step == 12
    assert run.evaluations == [0, 4, 8, 12]
    records = run.records()
    assert [r["step"] for r in records] == list(range(13))
    assert [r["step"] for r in records if "dev/score" in r] == [0, 4, 8, 12]
    assert [r["epoch"] for r in records[:6]] == [0, 0.25, 0.5, 0.75, 1.0, 1.25]
    tokens = np.cumsum([batch_at(0, step).packed.num_tokens for step in range(12)])
    assert [r["tokens"] for r in records[1:]] == tokens.tolist()
    assert records[1]["loss/b"] == 2.0 * batch_at(0, 0).packed.num_tokens
    assert records[1]["conflicts"] == 1.0
    assert records[1]["cosine/a|b"] == -0.5
    base = run.recipe.optimizer.lr
    assert records[1]["lr"] == pytest.approx(base / 3)
    assert records[12]["lr"] == pytest.approx(base / 10)


def test_max_steps_is_the_length_of_the_schedule_too(tmp_path: Path) -> None:
    """A run of 60 steps once ended inside the warm-up of a schedule that was made for the whole epoch."""
    for steps in (5, 20):  # fewer and more than the epochs' 12
        run = Run(tmp_path / str(steps), RECIPE | {"training": {"epochs": 3, "max_steps": steps}})
        assert run.go().state.step == steps
        rates = [r["lr"] / run.recipe.optimizer.lr for r in run.records()[1:]]
        assert rates == pytest.approx([lr_scale(s, steps, STEPS_PER_EPOCH, run.recipe.optimizer) for s in range(steps)])
    cut = Run(tmp_path / "cut", RECIPE, stop_after=5)
    cut.go()
    rates = [r["lr"] / cut.recipe.optimizer.lr for r in cut.records()[1:]]
    assert rates == pytest.approx([lr_scale(s, 12, STEPS_PER_EPOCH, cut.recipe.optimizer) for s in range(5)])


def test_stages_share_max_steps(tmp_path: Path) -> None:
    training = STAGED["training"] | {"max_steps": 5}
    run = Run(tmp_path, STAGED | {"training": training})
    run.go()
    assert [stage.steps for stage in run.stages()] == [2, 3]  # of 4 and 6
    assert [(r["stage"], r["epoch"]) for r in run.records()[1:]] == [
        (0, 0.25), (0, 0.5), (1, 0.75), (1, 1.0), (1, 1.25)
    ]  # fmt: skip


@pytest.mark.parametrize(("epochs", "steps"), [(0.25, 1), (0.5, 2), (1.75, 7), (0.001, 1), (0, 0)])
def test_parts_of_an_epoch(tmp_path: Path, epochs: float, steps: int) -> None:
    run = Run(tmp_path, RECIPE | {"training": {"epochs": epochs}})
    assert run.go().state.step == steps


def test_records_follow_logging_every(tmp_path: Path) -> None:
    run = Run(tmp_path, RECIPE | {"logging": {"every": 5}})
    run.go()
    assert [r["step"] for r in run.records()] == [0, 1, 4, 5, 8, 10, 12]


def test_fetching_late_gives_the_same_records(tmp_path: Path) -> None:
    """On a GPU, results are fetched only when they are logged."""
    runs = [Run(tmp_path / str(eager), RECIPE | {"logging": {"every": 5}}, eager=eager) for eager in (True, False)]
    for run in runs:
        run.go()
    assert runs[0].records() == runs[1].records()


def test_stages_run_one_after_the_other(tmp_path: Path) -> None:
    run = Run(tmp_path, STAGED)
    outcome = run.go()
    assert outcome.state.step == 4 + 6
    assert run.evaluations == [0, 3, 4, 6, 9, 10]
    assert [r["stage"] for r in run.records()] == [0] * 5 + [1] * 6
    assert run.records()[5]["epoch"] == 1.25
    second = run.stages()[1].recipe.optimizer
    rates = [r["lr"] for r in run.records()[5:]]
    assert rates == pytest.approx([second.lr * lr_scale(s, 6, STEPS_PER_EPOCH, second) for s in range(6)])


def test_a_stage_is_evaluated_as_often_as_its_recipe_says(tmp_path: Path) -> None:
    run = Run(tmp_path, RECIPE | {"training": {"epochs": 1}, "stages": [{"training": {"evaluate_every": 2}}, {}]})
    run.go()
    assert run.evaluations == [0, 2, 4, 8]


def test_the_best_model_is_kept(tmp_path: Path) -> None:
    scores = iter([0.9, 0.1, 0.5, 0.5])  # of equal scores the first one counts
    run = Run(tmp_path, RECIPE, scores=lambda weight: next(scores))
    outcome = run.go()
    assert outcome.best == {"step": 8, "stage": 0, "score": 0.5, "metrics": {"score": 0.5}}
    assert outcome.state.untrained == {"score": 0.9}
    assert run.files()["predictions/p.csv"] == "8"
    assert run.files()["best/weight.json"] != run.files()["last/weight.json"]


def test_a_non_finite_score_is_never_best(tmp_path: Path) -> None:
    scores = iter([0.0, -math.inf, 0.2, -math.inf])
    outcome = Run(tmp_path, RECIPE, scores=lambda weight: next(scores)).go()
    assert outcome.best is not None
    assert outcome.best["step"] == 8


def test_an_error_is_best_where_it_is_lowest(tmp_path: Path) -> None:
    recipe = RECIPE | {"training": {"epochs": 2, "select": "a_mae"}}
    errors = iter([0.9, 0.2, 0.7])
    run = Run(tmp_path, recipe, scores=lambda weight: next(errors))
    run.metric = "a_mae"
    outcome = run.go()
    assert outcome.best is not None
    assert outcome.best["step"] == 4


def test_patience_ends_the_stage_and_not_the_run(tmp_path: Path) -> None:
    recipe = RECIPE | {
        "training": {"epochs": 9, "patience": 2},
        "stages": [{}, {"training": {"epochs": 1}}],
    }
    scores = iter([9.0, 0.5, 0.6, 0.4, 0.6, 0.1])  # an equal score is no better one
    run = Run(tmp_path, recipe, scores=lambda weight: next(scores))
    outcome = run.go()
    assert run.evaluations == [0, 4, 8, 12, 16, 20]
    assert outcome.state.step == 20
    assert outcome.reason == "no better score for a while"


def test_a_stage_starts_from_the_weights_that_its_recipe_names(tmp_path: Path) -> None:
    """The best of the stage before, the last ones of stage 1, those before the first stage; not simply the last."""
    before: dict[int, list[float]] = {}

    def note(step: int) -> None:
        before[step] = run.model.weight.tolist()

    best = 4  # of the steps 2, 4, 6 and 7 at which the first stage is evaluated
    scores = {0: 0.0, 2: 0.1, best: 0.9, 6: 0.3, 7: 0.2}
    run = Run(tmp_path, RETURNING, at_step=note, scores=lambda weight: scores.get(run.trainer.state.step, 0.0))
    assert run.go().state.step == 7 + 2 + 2 + 2
    second, third, fourth = 7 + 1, 7 + 2 + 1, 7 + 4 + 1
    assert before[second] == before[best + 1] != before[7]
    assert before[fourth] == before[1] == list(range(4))
    alone = Run(tmp_path / "alone", RETURNING | {"stages": RETURNING["stages"][:1]})
    alone.go()
    assert before[third] == json.loads((tmp_path / "alone" / "last" / "weight.json").read_text())


def test_the_best_weights_of_a_stage_are_its_own_and_by_its_own_metric(tmp_path: Path) -> None:
    """A stage whose scores stay below those of the stage before has a best all the same."""
    before: dict[int, list[float]] = {}

    def note(step: int) -> None:
        before[step] = run.model.weight.tolist()

    best = 8  # of the steps 8, 10 and 11 at which the second stage is evaluated; a_accuracy is highest at step 2
    scores = {2: 0.9, 4: 1.0, 6: 0.9, 7: 0.9, best: 0.5, 10: 0.2, 11: 0.1}
    stages: list[dict[str, Any]] = [
        {"training": {"epochs": 1.75, "select": "a_accuracy"}},
        {"training": {"epochs": 1, "start": "best"}},
        {"training": {"start": "best"}},
    ]
    recipe = RETURNING | {"stages": stages}
    run = Run(tmp_path, recipe, at_step=note, scores=lambda weight: scores.get(run.trainer.state.step, 0.0))
    run.go()
    assert before[8] == before[3] != before[5]
    assert before[12] == before[best + 1] != before[11]


def test_without_a_finite_score_the_best_weights_are_the_last_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run says so: a stage fell back to the last weights without a word."""
    stages = [{"training": {"max_steps": 3}}, {"training": {"start": "best"}}]
    runs = []
    for start in ("best", "last"):
        stages[1] = {"training": {"start": start}}
        runs.append(Run(tmp_path / start, RECIPE | {"stages": stages}, scores=lambda weight: math.nan))
        runs[-1].go()
    assert runs[0].files()["last/weight.json"] == runs[1].files()["last/weight.json"]
    assert capsys.readouterr().out.count("stage 2 starts from the last weights: stage 1 has no finite score") == 1


def test_each_tasks_best_model_is_kept_from_the_stages_that_train_it(tmp_path: Path) -> None:
    run = Run(tmp_path, RETURNING | {"stages": RETURNING["stages"][:2]})
    outcome = run.go()
    assert run.evaluations == [0, 2, 4, 6, 7, 8, 9]
    best_a = max((2, 4, 6, 7), key=lambda step: accuracy_at(step, 3))  # steps of the first stage, which trains a
    best_b = max((8, 9), key=lambda step: accuracy_at(step, 5))
    assert {task: (kept["step"], kept["score"]) for task, kept in outcome.task_best.items()} == {
        "a": (best_a, accuracy_at(best_a, 3)),
        "b": (best_b, accuracy_at(best_b, 5)),
    }
    assert accuracy_at(4, 5) > accuracy_at(best_b, 5), "a better score in the other stage does not count"


def test_train_scores_stand_in_the_records_and_beside_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path, RECIPE)
    plain = run.evaluate
    run.evaluate = lambda: replace(plain(), train={"score": 0.25})  # type: ignore[method-assign]
    outcome = run.go()
    assert [r["train/score"] for r in run.records() if "dev/score" in r] == [0.25] * 4
    assert outcome.best is not None
    assert outcome.best["train"] == {"score": 0.25}


def test_fractions_of_an_epoch_are_whole_steps(tmp_path: Path) -> None:
    for epochs, steps in ((0.5, 2), (1.75, 7), (0.01, 1), (2.0, 8)):
        run = Run(tmp_path / str(epochs), RECIPE | {"training": {"epochs": epochs}})
        assert run.go().state.step == steps
        assert run.evaluations[-1] == steps


def test_zero_epochs_are_no_error(tmp_path: Path) -> None:
    run = Run(tmp_path, RECIPE | {"training": {"epochs": 0}})
    outcome = run.go()
    assert outcome.state.step == 0
    assert outcome.best is not None


# ---- Exact resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [RECIPE, STAGED, RETURNING], ids=["plain", "staged", "returning"])
def test_a_run_killed_anywhere_and_resumed_equals_an_uninterrupted_one(tmp_path: Path, recipe: dict[str, Any]) -> None:
    killed_anywhere(Run, tmp_path, recipe)


def killed_anywhere(kind_of_run: type[Run], tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Kills a run after each step and at each evaluation, resumes it, and compares the files with an uninterrupted run."""
    whole = kind_of_run(tmp_path / "whole", recipe)
    whole.go()
    moments = [("step", step) for step in range(1, whole.trainer.total + 1)]
    moments += [("evaluation", step) for step in whole.evaluations]
    for kind, moment in moments:

        def die(step: int, moment: int = moment) -> None:
            if step == moment:
                raise KilledError

        path = tmp_path / f"{kind}{moment}"
        with pytest.raises(KilledError):
            kind_of_run(path, recipe, **{f"at_{kind}": die}).go()
        resumed = kind_of_run(path, recipe)
        resumed.go(resume=True)
        assert resumed.files() == whole.files(), (kind, moment)
        assert resumed.records() == whole.records(), (kind, moment)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_step_and_save(tmp_path: Path, number: int) -> None:
    whole = Run(tmp_path / "whole", RECIPE)
    whole.go()
    handler = signal.getsignal(number)
    for moment in (1, 5, 12):

        def send(step: int, moment: int = moment) -> None:
            if step == moment:
                os.kill(os.getpid(), number)

        path = tmp_path / str(moment)
        with pytest.raises(InterruptError, match=f"after step {moment}.*--resume") as raised:
            Run(path, RECIPE, at_step=send).go()
        assert raised.value.status == 128 + number
        assert signal.getsignal(number) is handler
        assert (path / "checkpoints" / f"step-{moment:08d}").is_dir()
        resumed = Run(path, RECIPE)
        resumed.go(resume=True)
        assert resumed.files() == whole.files()
        assert resumed.records() == whole.records()


def test_ctrl_c_that_arrives_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to every process, and torchrun passes it on to each: the second one ended a run unsaved."""

    def send(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        with pytest.raises(InterruptError, match=r"after step 3.*--resume"):
            Run(tmp_path / "once", RECIPE, at_step=send).go()
        monkeypatch.setattr(signals, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path / "twice", RECIPE, at_step=send).go()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("own", [ValueError("not a readable safetensors file"), None])
def test_a_library_that_catches_the_interruption_does_not_hide_it(own: Exception | None) -> None:
    """Ctrl-C while safetensors read the weights was a damaged file, and a series went on with its next run."""

    def read() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except InterruptError:
            if own is not None:
                raise own from None

    with pytest.raises(InterruptError, match="interrupted"), StopSignals() as stop, stop.interruptible():
        read()


def test_a_signal_aborts_an_evaluation_and_a_resumed_run_repeats_it(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", RECIPE)
    whole.go()
    for moment in (0, 4, 12):

        def send(step: int, moment: int = moment) -> None:
            if step == moment:
                os.kill(os.getpid(), signal.SIGTERM)

        stopped = Run(tmp_path / str(moment), RECIPE, at_evaluation=send)
        with pytest.raises(InterruptError):
            stopped.go()
        assert moment not in stopped.evaluations
        resumed = Run(tmp_path / str(moment), RECIPE)
        resumed.go(resume=True)
        assert moment in resumed.evaluations
        assert resumed.files() == whole.files()
        assert resumed.records() == whole.records()
        kept = CheckpointStore(resumed.path / "checkpoints", 1).newest(pytest.fail)
        assert kept is not None
        assert (kept.step, kept.state["run"]["evaluated"]) == (12, 12), "a longer run goes on from these scores"


@pytest.mark.parametrize("cut", [0, 2, 4, 5, 11, 12])
def test_a_run_cut_by_stop_after_resumes_as_if_uncut(tmp_path: Path, cut: int) -> None:
    whole = Run(tmp_path / "whole", RECIPE)
    whole.go()
    first = Run(tmp_path / "cut", RECIPE, stop_after=cut)
    outcome = first.go()
    assert outcome.finished == (cut == 12)
    assert outcome.state.step == cut
    assert outcome.best is not None
    assert first.evaluations[-1] == cut
    assert [r["step"] for r in first.records()] == list(range(cut + 1))
    second = Run(tmp_path / "cut", RECIPE)
    second.go(resume=True)
    assert second.records() == whole.records()
    assert second.files() == whole.files()


def test_the_best_model_of_a_cut_is_dropped_on_resume(tmp_path: Path) -> None:
    """A better score in the extra evaluation at a cut must not change the best model of the whole run."""

    def scored(values: dict[int, float]) -> Callable[[Tensor], float]:
        sequence = iter(values.values())
        return lambda weight: next(sequence)

    cut = Run(tmp_path, RECIPE, stop_after=6, scores=scored({0: 0.0, 4: 0.5, 6: 0.9}))
    outcome = cut.go()
    assert outcome.best is not None
    assert (outcome.best["step"], cut.files()["predictions/p.csv"]) == (6, "6")
    resumed = Run(tmp_path, RECIPE, scores=scored({8: 0.4, 12: 0.3}))
    outcome = resumed.go(resume=True)
    assert outcome.best is not None
    assert (outcome.best["step"], resumed.files()["predictions/p.csv"]) == (4, "4")


def test_each_tasks_best_model_of_a_cut_is_dropped_on_resume(tmp_path: Path) -> None:
    recipe = RECIPE | {"training": {"epochs": 3, "best_per_task": True}}
    whole = Run(tmp_path / "whole", recipe)
    best = whole.go().task_best
    cut = Run(tmp_path / "cut", recipe, stop_after=9)
    assert cut.go().task_best["a"]["step"] == 9
    assert best["a"]["step"] == 4
    resumed = Run(tmp_path / "cut", recipe)
    assert resumed.go(resume=True).task_best == best
    assert resumed.files() == whole.files()


def test_a_running_run_keeps_a_checkpoint_in_reserve(tmp_path: Path) -> None:
    """`checkpoint.keep` is for a finished run: if the newest one is damaged, the other one serves."""
    Run(tmp_path, RECIPE).go()
    kept = [path.name for path in (tmp_path / "checkpoints").glob("step-*")]
    assert sorted(kept) == ["step-00000009", "step-00000012"]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, RECIPE)
    run.go()
    files, records = run.files(), run.records()
    again = Run(tmp_path, RECIPE)
    assert again.go(resume=True).state.step == 12
    assert (again.files(), again.records(), again.evaluations) == (files, records, [])


# ---- Failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [True, False])
def test_skipped_steps_are_counted_and_recorded_with_their_task(
    tmp_path: Path, eager: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, RECIPE | {"logging": {"every": 6}}, broken=frozenset({3, 6, 7}), eager=eager)
    outcome = run.go()
    assert outcome.state.skipped_steps == 3
    assert outcome.state.skipped == {"a": 3}
    assert {r["step"]: r["skipped"] for r in run.records() if "skipped" in r} == {3: ["a"], 6: ["a"], 7: ["a"]}
    assert [r["step"] for r in run.records()] == [0, 1, 3, 4, 6, 7, 8, 12]
    assert run.records()[2]["loss/a"] is None
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert said == ["step 3 is skipped: the loss or gradient of a is not finite"]  # the first one alone
    last = format_outcome(outcome, tmp_path).splitlines()
    assert last[1] == "skipped steps, whose loss or gradient was not finite: 3 (a 3)"
    assert "skipped steps" not in format_outcome(Run(tmp_path / "whole", RECIPE).go(), tmp_path)


def test_a_checkpoint_counts_the_skipped_steps_that_were_not_fetched_yet(tmp_path: Path) -> None:
    recipe = RECIPE | {"logging": {"every": 50}}
    run = Run(tmp_path, recipe, broken=frozenset({5}), eager=False, stop_after=5)
    assert run.go().state.skipped == {"a": 1}
    assert run.records()[-1]["skipped"] == ["a"]


@pytest.mark.parametrize("eager", [True, False])
def test_consecutive_skipped_steps_stop_the_run_and_name_the_examples(tmp_path: Path, eager: bool) -> None:
    recipe = RECIPE | {"training": {"epochs": 3, "max_skipped": 3}}
    run = Run(tmp_path, recipe, broken=frozenset(range(5, 99)), eager=eager)
    with pytest.raises(RunError, match=r"3 steps in a row .* in a \(examples a.csv:14, a.csv:15\)") as raised:
        run.go()
    assert "checkpoint of step" in str(raised.value)
    good = Run(tmp_path / "good", RECIPE, stop_after=4)
    good.go()
    if eager:
        assert json.loads((tmp_path / "last" / "weight.json").read_text()) == json.loads(
            (tmp_path / "good" / "last" / "weight.json").read_text()
        )


def test_alternating_skipped_steps_do_not_stop_the_run(tmp_path: Path) -> None:
    recipe = RECIPE | {"training": {"epochs": 3, "max_skipped": 2}}
    assert Run(tmp_path, recipe, broken=frozenset(range(1, 13, 2))).go().state.skipped_steps == 6


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_batch_and_what_to_lower(tmp_path: Path, error: Exception) -> None:
    class Hungry(StandIn):
        def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
            if self.count == 4:
                raise error
            return super().__call__(batch, lr_scale)

    run = Run(tmp_path, RECIPE)
    run.build_step = lambda: Hungry(run.model)  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"out of memory at step 5, a batch of 4 examples .*--batch-size \(now 32\)"):
        run.go()


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    class Wrong(StandIn):
        def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
            raise RuntimeError("shape mismatch")

    run = Run(tmp_path, RECIPE)
    run.build_step = lambda: Wrong(run.model)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run.go()


def test_a_vanished_output_directory_gives_a_one_line_error(tmp_path: Path) -> None:
    def vanish(step: int) -> None:
        if step == 5:
            (tmp_path / "run").rename(tmp_path / "elsewhere")

    with pytest.raises(RunError, match="cannot be written"):
        Run(tmp_path / "run", RECIPE, at_step=vanish).go()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert Run(tmp_path / "run", RECIPE).go(resume=True).state.step == 12


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(tmp_path / "whole", RECIPE)
    whole.go()

    def fill_up(step: int) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        if step == 8:
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(RunError, match=r"No space left on device\); the checkpoint of step 6 is intact"):
        Run(tmp_path / "run", RECIPE, at_step=fill_up).go()
    monkeypatch.undo()
    resumed = Run(tmp_path / "run", RECIPE)
    resumed.go(resume=True)
    assert resumed.files() == whole.files()


def test_batches_are_closed_after_every_kind_of_end(tmp_path: Path) -> None:
    closed = []

    class Closing(Run):
        def batches(self, stage: int, first: int, end: int) -> Generator[MultitaskBatch, None, None]:
            try:
                yield from super().batches(stage, first, end)
            finally:
                closed.append(stage)

    Closing(tmp_path / "a", STAGED).go()
    assert closed == [0, 1]
    with suppress(RunError):
        Closing(tmp_path / "b", RECIPE | {"training": {"max_skipped": 1}}, broken=frozenset({2})).go()
    assert closed == [0, 1, 0]


# ---- Rank 1 of two --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Second(World):
    """A rank without callbacks that hears what rank 0, with a callback, would say."""

    rank: int = 1
    size: int = 2
    at_evaluation: Callable[[], None] = lambda: None
    heard: list[str] = field(default_factory=list)  # the functions that rank 0 called

    def from_main(self, make: Callable[[], Any]) -> Any:
        self.heard.append(make.__name__)
        if make.__name__ == "measure":
            self.at_evaluation()
            return plan.Evaluation({"score": 0.5}, lambda directory: None)
        return [False] if make.__name__ == "call" else True

    def begin_largest(self, numbers: Tensor) -> None:
        """The others have received no signal."""


def test_a_rank_that_waits_for_an_evaluation_notes_a_signal(tmp_path: Path) -> None:
    """It left the evaluation, which the others finished, and sent its next message where they awaited another."""
    world = Second(at_evaluation=lambda: os.kill(os.getpid(), signal.SIGTERM))
    run = Run(tmp_path, {}, world=world)
    with pytest.raises(InterruptError, match="SIGTERM: stopped after step 1"):
        run.go()
    assert run.trainer.state.untrained == {"score": 0.5}
    assert run.evaluations == []


def test_callbacks_of_rank_0_alone_are_heard_by_all(tmp_path: Path) -> None:
    """A script that gave callbacks to rank 0 alone, which calls them, ended in processes that waited for each other."""
    world = Second()
    Run(tmp_path, {"training": {"max_steps": 4}, "logging": {"every": 3}}, world=world).go()
    evaluation, step = ["measure", "call"], ["call"]
    assert world.heard[1:] == [*evaluation, *step, *step, *step, *evaluation]  # steps 0, 1, 3 and 4


def test_another_rank_names_the_directory_of_rank_0_and_vouches_for_no_checkpoint(tmp_path: Path) -> None:
    """It named a temporary directory of its own, and a checkpoint that rank 0 may have failed to write."""
    recipe = {"training": {"max_skipped": 2}, "checkpoint": {"every": 1}}
    run = Run(tmp_path / "own", recipe, world=Second(), shown=tmp_path / "run", broken=frozenset({3, 4}))
    with pytest.raises(RunError, match=f"the last good model is in {tmp_path}/run/last; a lower --lr may help$"):
        run.go()
