# SPDX-License-Identifier: Apache-2.0
"""Rules of `--resume`: the values of a recipe that may change, the line about a finished run, and the check for a run."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from minbert_fast.common.schema import ConfigError, plain
from minbert_fast.common.storage import read_json
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.runs import flatten
from minbert_fast.trainer.outputs import CHECKPOINTS, SUMMARY, saved_recipe_path

SHOWN_CHANGES = 5  # differences named when a run cannot be resumed

# Keys of a recipe that do not affect the trained model.
WITHOUT_EFFECT = ("name", "description", "source", "unstated", "published", "checkpoint", "logging")
# Values that may differ when a run is resumed: paths (the content of the files is compared), the length of the last stage.
CHANGEABLE = {
    "data": ("directory", "files", "cache", "max_bad_rows"),
    "model": ("name",),
    "training": ("max_steps", "shard"),
}


def fixed_values(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe that a resumed run must share with the interrupted one; files without their folders."""
    values: dict[str, Any] = plain(recipe.with_paths(lambda path: Path(path).name))
    values = {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
    for section, keys in CHANGEABLE.items():
        values[section] = {key: value for key, value in values[section].items() if key not in keys}
    return values


def finished_line(output: Path, recipe: Recipe) -> str | None:
    """The line that `--resume` prints for a finished run with nothing left to do; None if the run has steps left.

    Raises ConfigError if the finished run was one of another recipe, or if it is to go on and kept no checkpoint.
    """
    path, saved = output / SUMMARY, saved_recipe_path(output)
    summary = read_json(path) if path.is_file() and saved.is_file() else {}
    if not summary.get("finished"):
        return None
    executed = Recipe.load(str(saved))
    then, now = flatten(fixed_values(executed)), flatten(fixed_values(recipe))
    # The run dropped tasks, and so stages, that had no data, and may have shortened sentences.
    changed = [k for k in then if k not in ("stages", "data.max_length") and now.get(k) != then[k]]
    if changed:
        values = "; ".join(f"{key} was {then[key]!r}, now {now.get(key)!r}" for key in changed[:SHOWN_CHANGES])
        raise ConfigError(
            f"{output} holds a different, finished run: {values}; choose another --output, or --overwrite"
        )
    ended = f"{output}: finished after {summary['steps']:,} steps"
    onwards = f"train on from its model with --model {output / 'last'} --output DIR"
    if recipe.training.max_steps in (None, executed.training.max_steps):
        return f"{ended}, nothing is left to do; {onwards}"
    if not any((output / CHECKPOINTS).glob("step-*")):
        raise ConfigError(f"{ended} and kept no checkpoint (checkpoint.keep = 0): {onwards}")
    return None


def require_run(output: Path) -> None:
    """Raises ConfigError, naming the likely right path, unless `output` is the directory of a run."""
    if saved_recipe_path(output).is_file() or (output / SUMMARY).is_file():
        return
    around = [output, *output.absolute().parents[:2]]
    runs = [
        path.parents[1] for place in around for path in place.glob(f"*/{CHECKPOINTS}/{saved_recipe_path(output).name}")
    ]
    close = difflib.get_close_matches(output.name, [run.name for run in runs], cutoff=0.5)
    likely = [path for path in around[1:] if saved_recipe_path(path).is_file()]  # best/ was given, not its run
    likely = likely or [run for run in runs if run.name in close or run.parent == output]
    hint = f"; did you mean {' or '.join(map(str, likely[:3]))}?" if likely else ""
    missing = "holds no run" if output.is_dir() else "no such directory"
    raise ConfigError(f"--resume --output {output}: {missing}{hint}; to start a new run, leave --resume out")
