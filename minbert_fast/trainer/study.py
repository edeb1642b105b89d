# SPDX-License-Identifier: Apache-2.0
"""Optuna proposes the values of a search: from ranges and lists, with weak runs ended early, in a study on the disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minbert_fast.common.schema import ConfigError
from minbert_fast.tasks.metrics import lower_is_better
from minbert_fast.trainer.callbacks import Callback, EvaluationEvent
from minbert_fast.trainer.experiments import Trial

FILE = "optuna.db"  # SQLite, under the search's --output
STARTUP = 4  # runs before the first one may be ended early
AGAIN = "again"  # a trial's attribute: the number of the interrupted trial that it takes up

Values = Mapping[str, str]  # key of the recipe -> value as written


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`. Runs get them with three significant digits."""

    low: float
    high: float
    whole: bool

    @property
    def log(self) -> bool:
        """Whether values are drawn evenly by their logarithm: if the range spans a factor of ten."""
        return self.low > 0 and self.high >= 10 * self.low

    def __str__(self) -> str:
        return f"{self.low:.0f}..{self.high:.0f}" if self.whole else f"{self.low:g}..{self.high:g}"

    def suggest(self, trial: Any, key: str) -> None:
        """Lets an Optuna trial choose the value of `key`."""
        if self.whole:
            trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        else:
            trial.suggest_float(key, self.low, self.high, log=self.log)


Space = Mapping[str, Sequence[str] | Range]


def parse_range(text: str) -> Range:
    """The range in `LOW..HIGH`. Raises ValueError."""
    low, _, high = text.partition("..")
    found = Range(float(low), float(high), all(part.strip().lstrip("+-").isdigit() for part in (low, high)))
    if not -math.inf < found.low < found.high < math.inf:
        raise ValueError(f"{text}: expected two numbers, the smaller one first")
    return found


def run_study(
    output: Path,
    space: Space,
    metric: str,
    count: int,
    seed: int,
    run: Callable[[Values, Sequence[Callback]], Trial],
    read: Callable[[Values], object],
) -> None:
    """Runs trials until the study under `output` has `count` of them; TPE proposes, the median of earlier runs prunes.

    `run` trains one combination of values, or resumes it. `read` gets the values of each trial of an earlier call. A trial
    that was interrupted runs again. Raises ConfigError without Optuna, or if the study is one over other values.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("--optuna needs Optuna: pip install 'minbert-fast[optuna]'") from None
    states = optuna.trial.TrialState
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{(output / FILE).absolute()}")
    try:
        direction: Literal["minimize", "maximize"] = "minimize" if lower_is_better(metric) else "maximize"
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
        study = optuna.create_study(
            storage=storage, study_name="search", direction=direction, pruner=pruner, load_if_exists=True
        )
        _check_same(study, output, space, metric)
        for interrupted in study.get_trials(states=(states.RUNNING,)):
            study.tell(interrupted.number, state=states.FAIL)
            study.enqueue_trial(interrupted.params, user_attrs={AGAIN: interrupted.number})
        done = study.get_trials(states=(states.COMPLETE, states.PRUNED))
        for ended in done:
            read(_values(ended.params, space))
        for _ in range(count - len(done)):
            # Seeded by the trial's place, so that an interrupted search proposes what an uninterrupted one would.
            place = sum(AGAIN not in each.user_attrs for each in study.trials)
            study.sampler = optuna.samplers.TPESampler(seed=seed + place)
            trial = study.ask()
            for key, options in space.items():
                if isinstance(options, Range):
                    options.suggest(trial, key)
                else:
                    trial.suggest_categorical(key, list(options))
            prune = _Prune(trial, metric)
            found = run(_values(trial.params, space), [prune])
            score = found.score(metric)
            if prune.asked and not found.summary.get("finished", True):
                study.tell(trial, state=states.PRUNED)
            elif score is None:
                study.tell(trial, state=states.FAIL)
            else:
                study.tell(trial, score)
    finally:
        storage.engine.dispose()


class _Prune(Callback):
    """Reports each dev score to Optuna, and ends the run where Optuna gives it up."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial, self.metric, self.asked = trial, metric, False

    def on_evaluation(self, event: EvaluationEvent) -> bool:
        score = event.metrics.get(self.metric)
        if event.step > 0 and score is not None:
            self.trial.report(score, event.step)
            self.asked = bool(self.trial.should_prune())
        return self.asked


def _check_same(study: Any, output: Path, space: Space, metric: str) -> None:
    """Raises ConfigError if the study searches other values or another metric."""
    now = {key: str(options) if isinstance(options, Range) else ",".join(options) for key, options in space.items()}
    now["metric"] = metric
    then = study.user_attrs.get("search")
    if then is None:
        study.set_user_attr("search", now)
    elif then != now:
        listed = ", ".join(f"{key} {values}" for key, values in then.items())
        raise ConfigError(f"{output}: holds another search ({listed}); choose another --output")


def _values(parameters: Mapping[str, Any], space: Space) -> dict[str, str]:
    """A trial's values as a recipe gets them, in the order of the space."""
    return {
        key: f"{parameters[key]:.3g}" if isinstance(parameters[key], float) else str(parameters[key]) for key in space
    }
