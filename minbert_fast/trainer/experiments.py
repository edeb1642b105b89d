# SPDX-License-Identifier: Apache-2.0
"""Many runs in one go: each in a directory of its own, done ones skipped, interrupted ones resumed; tables of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from minbert_fast.common.errors import RunError
from minbert_fast.common.schema import ConfigError, merge, plain
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.trainer.job import Options, train
from minbert_fast.trainer.outputs import SUMMARY


@dataclass(frozen=True)
class Place:
    """What runs of one series share: where they run, and with what."""

    device: str = "auto"
    backend: Literal["auto", "fast", "reference"] = "auto"


@dataclass(frozen=True)
class Trial:
    """How one run ended: its `summary.json`, or the line that says why there is none."""

    name: str
    directory: Path
    summary: Mapping[str, Any] | None
    failure: str = ""

    def score(self, metric: str) -> float | None:
        """A dev metric of the best model, or None."""
        value = (self.summary or {}).get("dev", {}).get(metric)
        return None if value is None else float(value)


def run_or_resume(name: str, recipe: Recipe, directory: Path, place: Place, command: str) -> Trial:
    """Runs `recipe` in `directory`, going on with what is there already; a finished run of it is only read.

    A run that cannot be (its data are missing, its recipe has changed since) gives a Trial that says why.
    """
    done = directory / SUMMARY
    if not done.is_file() or not stands_for(ran(directory), recipe):
        options = Options(directory, place.device, place.backend, resume=directory.is_dir(), command=command)
        try:
            train(recipe, options)
        except (ConfigError, ValueError) as error:
            return Trial(name, directory, None, str(error))
        except RunError as error:
            if error.status > 128:  # stopped by a signal: so is the series
                raise
            return Trial(name, directory, None, str(error))
    try:
        return Trial(name, directory, json.loads(done.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        return Trial(name, directory, None, f"{done}: cannot be read ({error})")


def ran(directory: Path) -> Recipe | None:
    """The recipe of the run in `directory` as it was carried out, without tasks that had no data."""
    try:
        return Recipe.load(str(directory / "last" / "recipe.toml"))
    except ConfigError:
        return None


def stands_for(found: Recipe | None, recipe: Recipe) -> bool:
    """Whether a finished run of `found` need not be looked at again for `recipe`.

    What depends on the data there were (tasks left out, a shorter length) is not compared.
    """
    if found is None or any(plain(recipe.tasks.get(name)) != plain(found.tasks[name]) for name in found.tasks):
        return False

    def asked(r: Recipe) -> Any:
        stages = [{key: stage[key] for key in ("training", "optimizer") if key in stage} for stage in r.stages]
        data = r.data.directory, r.data.scheme
        return r.name, r.training, r.optimizer, r.surgery, r.weighting, r.regularisation, data, r.model, stages

    return bool(asked(found) == asked(recipe))


def limited(recipe: Recipe, steps: int | None) -> Recipe:
    """The recipe with at most so many steps, in each of its stages where it has any."""
    if steps is None:
        return recipe
    if not recipe.stages:
        return recipe.with_values({"training": {"max_steps": steps}}, "--max-steps")
    stages = tuple(merge(stage, {"training": {"max_steps": steps}}) for stage in recipe.stages)
    return replace(recipe, stages=stages)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for people and for Markdown: columns aligned, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)]) + "\n"


def shown(value: float | None) -> str:
    """A score with three places, "-" where there is none."""
    return "-" if value is None else f"{value:.3f}"
