# SPDX-License-Identifier: Apache-2.0
"""Rules of `--resume`: the values of a recipe that may change, finished runs, and the checkpoint that a run goes on from."""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minbert_fast.common.device import Precision
from minbert_fast.common.provenance import describe_environment
from minbert_fast.common.schema import ConfigError, plain
from minbert_fast.common.storage import read_json
from minbert_fast.model.weights import CONFIG
from minbert_fast.parallel.world import World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.runs import flatten
from minbert_fast.step.backends import Backend
from minbert_fast.trainer.checkpoint import STATE, Checkpoint, CheckpointStore, differences
from minbert_fast.trainer.outputs import CHECKPOINTS, SUMMARY, saved_recipe_path

SHOWN_CHANGES = 5  # differences named when a run cannot be resumed

# Keys of a recipe that do not affect the trained model.
WITHOUT_EFFECT = ("name", "description", "source", "unstated", "published", "checkpoint", "logging")
# Values that may differ when a run is resumed: paths (the content of the files is compared), the length of the last stage.
CHANGEABLE = {
    "data": ("directory", "files", "cache", "max_bad_rows", "held_out"),
    "model": ("name",),
    "training": ("max_steps", "shard"),
}
FOUND_IN_LABELS = ("kind", "classes", "class_counts", "row_count", "found_range")  # options that `complete` fills in


def fixed_values(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe that a resumed run must share with the interrupted one; files without their folders."""
    values: dict[str, Any] = plain(recipe.with_paths(lambda path: Path(path).name))
    values = {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
    for section, keys in CHANGEABLE.items():
        values[section] = {key: value for key, value in values[section].items() if key not in keys}
    return values


def changed_values(executed: Recipe, recipe: Recipe, positions: int) -> list[str]:
    """The fixed values that `recipe` does not share with the recipe of a finished run: `key was X, now Y`.

    Values that the run's data and model decide do not count: tasks and stages without data, options that labels fill in,
    and a maximum length above the model's `positions`.
    """

    def values(of: Recipe) -> dict[str, Any]:
        found = fixed_values(of)
        found["data"]["max_length"] = min(found["data"]["max_length"], positions)
        found["tasks"] = _only(found["tasks"], executed.tasks)
        stages = found.pop("stages")
        for i, (stage, ran) in enumerate(zip(stages, executed.stages, strict=False)):
            if len(executed.stages) == len(recipe.stages):  # none of them was dropped
                found[f"stages[{i}]"] = {**stage, "tasks": _only(stage.get("tasks", {}), ran.get("tasks", {}))}
        return flatten(found)

    then, now = values(executed), values(recipe)
    changed = [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)]
    filled_in = {key for key in changed if key.rpartition(".")[2] in FOUND_IN_LABELS and not now.get(key)}
    return [f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in changed if key not in filled_in]


def positions_of(output: Path) -> int:
    """The positions of the finished run's model: the length of the longest sequence that it reads."""
    config = output / "last" / CONFIG
    return int(read_json(config)["max_position_embeddings"]) if config.is_file() else sys.maxsize


def _only(tasks: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: options for name, options in tasks.items() if name in names}


def finished_line(output: Path, recipe: Recipe) -> str | None:
    """The line that `--resume` prints for a finished run with nothing left to do; None if the run has steps left.

    Raises ConfigError if the finished run was one of another recipe, or if it is to go on and kept no checkpoint.
    """
    path, saved = output / SUMMARY, saved_recipe_path(output)
    summary = read_json(path) if path.is_file() and saved.is_file() else {}
    if not summary.get("finished"):
        return None
    executed = Recipe.load(str(saved))
    if changed := changed_values(executed, recipe, positions_of(output)):
        shown = "; ".join(changed[:SHOWN_CHANGES])
        raise ConfigError(f"{output} holds a different, finished run: {shown}; choose another --output, or --overwrite")
    ended = f"{output}: finished after {summary['steps']:,} steps"
    onwards = f"train on from its model with --model {output / 'last'} --output DIR"
    if recipe.training.max_steps in (None, executed.training.max_steps):
        return f"{ended}, nothing is left to do; {onwards}"
    if not any((output / CHECKPOINTS).glob("step-*")):
        raise ConfigError(
            f"{ended} and kept no checkpoint (checkpoint.keep = 0): choose another --output, or {onwards}"
        )
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


def settings_of(output: Path) -> tuple[Backend, Precision] | None:
    """Backend and precision of the run under `output`, as its checkpoints or its summary say; None without either."""
    for path in (*(output / CHECKPOINTS).glob(f"step-*/{STATE}"), output / SUMMARY):
        try:
            content = read_json(path)
            found = content if path.name == SUMMARY else content["fingerprint"]
            backend, precision = found["backend"], found["precision"]
        except (OSError, ValueError, KeyError, TypeError):  # damaged: reported when it is loaded
            continue
        return "reference" if backend == "reference" else "fast", "bf16" if precision == "bf16" else "fp32"
    return None


def as_begun(recipe: Recipe, output: Path) -> Recipe:
    """`recipe` with `precision = "auto"` if the run under `output` began with it, and it meant the one in `recipe`."""
    saved, begun = saved_recipe_path(output), settings_of(output)
    if begun is None or recipe.training.precision != begun[1] or not saved.is_file():
        return recipe
    auto = Recipe.load(str(saved)).training.precision == "auto"
    return recipe.with_values({"training": {"precision": "auto"}}, "--resume") if auto else recipe


def find_checkpoint(
    output: Path,
    fingerprint: Mapping[str, Any],
    steps: Sequence[int],
    device: torch.device,
    notify: Callable[[str], None],
    rename: bool = True,
) -> Checkpoint | None:
    """The checkpoint that the run under `output` goes on from; None if there is none. Every rank reads it.

    `fingerprint` and `steps`, the length of each stage, are those of the run as it is now; `rename` as for
    `CheckpointStore.newest`. Raises ConfigError if the checkpoint belongs to another run.
    """
    found = CheckpointStore(output / CHECKPOINTS).newest(notify, rename)
    if found is None:
        notify(f"no checkpoint in {output}: starting from the beginning")
        return None
    now = json.loads(json.dumps(fingerprint))  # the checkpoint's went through JSON too
    if changed := differences(found.state["fingerprint"], now):
        more = f" (and {len(changed) - SHOWN_CHANGES} more differences)" if len(changed) > SHOWN_CHANGES else ""
        other = "give --resume alone, or with the flags that the run was started with"
        if all(line.startswith("data.") for line in changed):
            other += "; if a data file has changed since, restore it, or start a new run under another --output"
        raise ConfigError(f"{output} holds a different run: {'; '.join(changed[:SHOWN_CHANGES])}{more}; {other}")
    then, stage = found.state["steps"], found.state["run"]["stage"]
    if then != steps:
        line = f"the run now has {sum(steps):,} steps, not {sum(then):,}"
        if then[:stage] != steps[:stage] or sum(steps) < found.step:
            raise ConfigError(f"{output}: {line}: a stage that has ended cannot change its length")
        notify(f"{line}: its learning rate follows the new length from here on")
    for line in differences(found.state["environment"], describe_environment(device)):
        notify(f"{line}: results may differ in the last bits from those of an uninterrupted run")
    notify(f"resuming after step {found.step}")
    return found


def check_ranks_agree(
    world: World, conditions: Callable[[], Mapping[str, Any]], checkpoint: Checkpoint | None, output: Path
) -> None:
    """Raises ConfigError if the processes, perhaps on several machines, are about to train different runs.

    `conditions` returns what they must share, beside the checkpoint that they go on from.
    """
    if world.size == 1:
        return
    start = "the beginning"
    if checkpoint is not None:
        state = json.dumps(checkpoint.state, sort_keys=True).encode()
        start = f"step {checkpoint.step}, {hashlib.blake2b(state, digest_size=4).hexdigest()}"
    first, *others = world.every({"starts from": start, **conditions()})
    for rank, other in enumerate(others, start=1):
        unlike = differences(first, other, f"{{name}} {{then}} on rank 0, {{now}} on rank {rank}")
        if unlike:
            raise ConfigError(
                f"cannot train together: {'; '.join(unlike[:SHOWN_CHANGES])}; every machine needs the same flags, "
                f"data, model and checkpoints in {output}"
            )
