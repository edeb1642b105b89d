# SPDX-License-Identifier: Apache-2.0
"""What next? Advice that follows from a run's records, each with a command where one expresses it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from minbert_fast.common.schema import ConfigError
from minbert_fast.reporting.runs import Run, numbers
from minbert_fast.reporting.verdicts import collapsed_class, verdicts
from minbert_fast.tasks.base import build_task

HIGHEST_RATE = 1e-3  # of AdamW, for any encoder
RISE = 1.02  # a dev loss this many times its lowest value has risen


class Advice(NamedTuple):
    """A reason and the command that follows from it; the command is empty if no flag of `train` expresses it."""

    reason: str
    command: str


def next_steps(run: Run) -> list[Advice]:
    """Advice for the next run, the most important first; how to use the model if there is nothing to improve."""
    advice = []
    training, optimizer = (numbers(run.recipe.get(section)) for section in ("training", "optimizer"))
    # A score may fall while its loss does too, of rare labels for example: that is no matter of the learning rate.
    fallen = [v.task for v in verdicts(run) if v.level == "worse" and not _loss_fell(run, v.task)]
    overfitted = _rising_losses(run)
    if run.summary.get("demonstration"):
        own = "python -m minbert_fast.train --data DIR --model DIR"
        advice.append(Advice("This was a demonstration on sample data: train real weights on your own data.", own))
    if fallen:
        lower = f"--lr {min(optimizer['lr'] / 10, HIGHEST_RATE):g}" if "lr" in optimizer else ""
        reason = f"Training made it worse ({', '.join(fallen)}): lower the learning rate."
        advice.append(Advice(reason, _train(run, "lower-lr", lower)))
    if (warmup := _ended_in_warmup(run, optimizer)) and not fallen:
        reason = "The run ended while the learning rate was still warming up: take more steps."
        if run.summary.get("finished") is False:
            command = f"python -m minbert_fast.train --resume --output {shlex.quote(str(run.directory))}"
        else:
            command = _train(run, "longer", f"--max-steps {warmup}")
        advice.append(Advice(reason, command))
    elif not fallen and not overfitted and _best_was_last(run):
        longer = f"--epochs {2 * training.get('epochs', 1):g}"
        if "max_steps" in training:
            longer = f"--max-steps {2 * training['max_steps']:g}"
        reason = "The last evaluation was the best one: train longer."
        advice.append(Advice(reason, _train(run, "longer", longer)))
    if overfitted and not _best_was_last(run):  # while the score rises, patience would stop nothing
        since = ", ".join(f"{task} since epoch {epoch:.3g}" for task, epoch in overfitted.items())
        advice.append(
            Advice(f"Dev losses have risen ({since}): stop early.", _train(run, "early", "--set training.patience=1"))
        )
    collapses = {n: found for n, task in run.tasks.items() if n not in fallen and (found := collapsed_class(task))}
    if collapses:
        reason = "; ".join(f"{name}: {text}" for name, text in collapses.items())
        flags = " ".join(filter(None, (_balancing(run, name) for name in collapses)))
        advice.append(Advice(f"{reason}. Weight the classes.", _train(run, "weighted", flags, staged=True)))
    if not advice and run.tasks:
        task, checkpoint = next(iter(run.tasks)), shlex.quote(str(run.directory / "best"))
        command = f"python -m minbert_fast.predict --checkpoint {checkpoint} --task {task} --input FILE --output FILE"
        advice.append(Advice("Use the model:", command))
    return advice


def without_surgery(run: Run) -> str:
    """The command of the same run without gradient surgery; empty if the run's recipe is unknown."""
    return _train(run, "no-surgery", "--surgery none", staged=True)


def _train(run: Run, suffix: str, flags: str, *, staged: bool = False) -> str:
    """The command of the same run with `flags` changed, into a new directory.

    Empty if there are no flags, if the recipe is unknown, or if it has stages, which set their own lengths and rates
    (`staged`: flags that they do not set).
    """
    recipe = next((p for n in ("best", "last") if (p := run.directory / n / "recipe.toml").is_file()), None)
    if recipe is None or (run.recipe.get("stages") and not staged) or not flags:
        return ""
    output = shlex.quote(f"{run.directory}-{suffix}")
    return f"python -m minbert_fast.train --recipe {shlex.quote(str(recipe))} {flags} --output {output}"


def _balancing(run: Run, task: str) -> str:
    """The flag that weights the classes of a task, or draws them equally often if its head takes no weights."""
    options = (run.recipe.get("tasks") or {}).get(task) or {}
    for key, value, text in (("class_weights", "balanced", "balanced"), ("balanced", True, "true")):
        try:
            build_task(task, {**options, key: value})
        except ConfigError:
            continue
        return f"--set tasks.{task}.{key}={text}"
    return ""


def _loss_fell(run: Run, task: str) -> bool:
    """Whether the task's dev loss is lower than before training."""
    key = f"{task}_loss"
    return run.dev.get(key, np.inf) < run.untrained.get(key, -np.inf)


def _ended_in_warmup(run: Run, optimizer: Mapping[str, float]) -> int:
    """The whole schedule's number of steps if the learning rate was still rising at the end; else 0.

    No schedule rises after its warm-up. The rate's rise a step gives the length of the warm-up, and that its share of all
    steps.
    """
    last = run.records[-1].get("stage", 0) if run.records else 0
    rates = [
        (record["step"], lr)
        for record in run.records
        if record.get("stage", 0) == last and (lr := numbers(record).get("lr"))
    ]
    if len(rates) < 2 or rates[-1][1] <= rates[-2][1]:
        return 0
    (before, low), (step, high) = rates[-2:]
    per_step = (high - low) / (step - before)
    peak, share = optimizer.get("lr", high), optimizer.get("warmup", 0.0)
    return max(2 * int(step), round(peak / per_step / share) if share else 0)


def _evaluations(run: Run) -> list[Mapping[str, Any]]:
    """The records with dev scores of a trained model."""
    return [r for r in run.records if r["step"] > 0 and any(key.startswith("dev/") for key in r)]


def _best_was_last(run: Run) -> bool:
    found, best = _evaluations(run), numbers(run.summary.get("best"))
    return len(found) > 1 and best.get("step") == found[-1]["step"]


def _rising_losses(run: Run) -> dict[str, float]:
    """Tasks whose dev loss has risen from its lowest value, and the epoch of that value."""
    found = {}
    for task in run.tasks:
        key = f"dev/{task}_loss"
        trained = [r for r in _evaluations(run) if key in numbers(r)]
        losses = [r[key] for r in trained]
        if len(losses) > 1 and losses[-1] > RISE * min(losses):
            found[task] = float(trained[int(np.argmin(losses))].get("epoch", np.nan))
    return found
