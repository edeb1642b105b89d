# SPDX-License-Identifier: Apache-2.0
"""A training run described as data: `Recipe`, the files that it is read from, and values of the command line.

Its sections are in sections.py. Optional `stages` are partial recipes that run in order, each laid over the whole. A TOML
file may extend another (`extends = "name-or-file"`; `tasks.NAME = false` drops a task of it), and the command line can set
any value (`section.key=value`).
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from minbert_fast.common.schema import ConfigError, Whole, build, check, merge, plain, to_toml
from minbert_fast.common.storage import inside, regular
from minbert_fast.recipes.sections import (
    SPLITS,
    CheckpointOptions,
    DataOptions,
    LoggingOptions,
    ModelOptions,
    OptimizerOptions,
    Published,
    RegularisationOptions,
    SurgeryOptions,
    TrainingOptions,
    WeightingOptions,
)


@dataclass(frozen=True)
class Recipe:
    """One experiment as data.

    `tasks[name]` holds the options of one task (head, loss, batch size, ...); `minbert_fast.tasks` checks them.
    `stages` are partial recipes that run in order. A recipe without stages is a single stage.
    """

    name: str = "default"  # of the recipe
    description: str = ""  # what it trains, in one line
    source: str = ""  # the report that it comes from
    unstated: str = ""  # values that the report does not state, and where the recipe has them from
    published: Published = field(default_factory=Published)  # the report's scores
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    tasks: Mapping[str, Any] = field(  # {task: {option: value}}
        default_factory=lambda: {"sentiment": {}, "paraphrase": {}, "similarity": {}}
    )
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    surgery: SurgeryOptions = field(default_factory=SurgeryOptions)
    weighting: WeightingOptions = field(default_factory=WeightingOptions)
    regularisation: RegularisationOptions = field(default_factory=RegularisationOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    stages: tuple[Mapping[str, Any], ...] = ()  # partial recipes that run in order; none: one stage with all tasks
    imports: Mapping[str, str] = field(default_factory=dict)  # files of `--import`: SHA-256 by name

    def __post_init__(self) -> None:
        check(bool(self.tasks), "tasks: expected at least one task")
        for name, options in self.tasks.items():
            check(isinstance(options, Mapping), f"tasks.{name} = {options!r}: expected a table of keys")
            # The flat buffers label the encoder's regions with these names, and each head's region with its task's.
            check(name not in ("shared", "words", "frozen"), f"tasks.{name}: this name is reserved, choose another")
        for index, stage in enumerate(self.stages):
            where = f"stages[{index}]"
            check("stages" not in stage, f"{where}.stages: a stage has no stages of its own")
            for key, value in stage.items():
                section = isinstance(getattr(self, key, None), Mapping) or is_dataclass(getattr(self, key, None))
                check(isinstance(value, Mapping) or not section, f"{where}.{key} = {value!r}: expected a table of keys")
            for name, options in stage.get("tasks", {}).items():
                check(isinstance(options, Mapping), f"{where}.tasks.{name} = {options!r}: expected a table of keys")
            start = stage.get("training", {}).get("start", self.training.start)
            earlier = start in ("last", "best") or (isinstance(start, int) and 0 <= start <= index)
            check(
                earlier,
                f"{where}.training.start = {start!r}: expected last, best, or the number of an earlier stage "
                "(from 1; 0: the weights before the first stage)",
            )

    def resolved_stages(self) -> tuple[Recipe, ...]:
        """One complete recipe per stage: the whole recipe updated with the stage's values.

        A stage that names `tasks` trains only those; their options default to the recipe's.
        """
        if not self.stages:
            return (self,)
        base = plain(self)
        del base["stages"]
        resolved = []
        for index, stage in enumerate(self.stages):
            values = merge(base, stage)
            if "tasks" in stage:
                values["tasks"] = {name: merge(base["tasks"].get(name, {}), o) for name, o in stage["tasks"].items()}
            resolved.append(build(Recipe, values, f"stages[{index}]", "."))
        return tuple(resolved)

    def to_toml(self) -> str:
        """All values as TOML text; `Recipe.load` reads an equal recipe from it."""
        return to_toml(plain(self))

    def with_values(self, values: Mapping[str, Any], where: str) -> Recipe:
        """This recipe updated with `values`, which are nested as in a file."""
        return build(Recipe, _without_removed_tasks(merge(plain(self), values)), where)

    def with_paths(self, change: Callable[[str], str]) -> Recipe:
        """This recipe, stages included, with `change(path)` in place of the name of each file and directory."""
        values = _with_paths(plain(self), change)
        values["stages"] = [_with_paths(stage, change) for stage in values["stages"]]
        return build(Recipe, values, self.name)

    @classmethod
    def load(cls, name_or_file: str) -> Recipe:
        """Reads a recipe of the package by name, or a TOML file, and the recipes that it extends. Raises ConfigError."""
        path = recipe_path(name_or_file)
        return build(cls, _without_removed_tasks(_read_inherited(path, ())), str(path))


def _with_paths(values: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The values of a recipe or a stage with `change` applied to paths; names of data sets on the hub stay."""

    def changed(value: Any, keys: Container[str] | None = None) -> Any:
        """`change` applied to every text in `value`, in a table only to those under `keys` (None: all)."""
        if isinstance(value, Mapping):
            return {key: changed(item) if keys is None or key in keys else item for key, item in value.items()}
        return [changed(item, keys) for item in value] if isinstance(value, list | tuple) else value and change(value)

    def source(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [source(item) for item in value]
        return value if isinstance(value, Mapping) and value.get("hub") else changed(value, SPLITS)

    values = dict(values)
    for section, keys in {"model": ("name",), "data": ("directory", "files", "cache")}.items():
        if section in values:
            values[section] = changed(values[section], keys)
    if "tasks" in values:
        tasks = values["tasks"].items()
        values["tasks"] = {n: {**o, "data": source(o["data"])} if "data" in o else o for n, o in tasks}
    return values


def absolute_path(path: str) -> str:
    """The absolute form of `path` if it exists, else `path`, which may be a name on the hub."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("minbert_fast") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_path(name_or_file: str, folder: Path | None = None) -> Path:
    """The file of a recipe, given as a path to a .toml file or as the name of a shipped recipe.

    With `folder`, the folder of the recipe that extends this one, a path is relative to it and must stay within it.
    Raises ValueError.
    """
    if name_or_file.endswith(".toml"):
        return Path(name_or_file) if folder is None else inside(folder, name_or_file)
    if name_or_file in recipe_names():
        return Path(str(resources.files("minbert_fast") / "recipes" / f"{name_or_file}.toml"))
    close = difflib.get_close_matches(name_or_file, recipe_names(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(recipe_names())}, or a .toml file"
    raise ConfigError(f"recipe {name_or_file!r}: no such recipe; {hint}")


def _read_inherited(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a recipe file, merged over those of the file that it extends; `seen` are the files read before."""
    try:
        values = tomllib.loads(regular(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from None
    if path.resolve() in seen:  # after reading: resolve() fails for a loop of links
        raise ConfigError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r}: expected text")
    try:
        parent_path = recipe_path(parent, path.parent)
    except ValueError as error:
        raise ConfigError(f"{path}: extends: {error}") from None
    inherited = _read_inherited(parent_path, (*seen, path.resolve()))
    for own in ("name", "description", "published"):
        inherited.pop(own, None)
    return merge(inherited, values)


def _without_removed_tasks(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without the tasks that are `false`, which removes an inherited task."""
    tasks = values.get("tasks")
    if isinstance(tasks, Mapping):
        return values | {"tasks": {name: options for name, options in tasks.items() if options is not False}}
    return values


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """A nested mapping from `section.key=value` strings. Values are TOML; what is not TOML is text.

    A table on the right side, as in `tasks={sentiment={}}`, replaces the whole table of that name.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not key:
            raise ConfigError(f"--set {assignment!r}: expected section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if isinstance(value, dict):
            value = Whole(value)
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values
