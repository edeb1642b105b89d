# SPDX-License-Identifier: Apache-2.0
"""A training run described as data: frozen dataclasses that check their values.

A recipe has the sections `model`, `data`, `tasks`, `optimizer`, `surgery`, `weighting`, `regularisation`, `training`,
`checkpoint` and `logging`. Optional `stages` are partial recipes that run in order, each laid over the whole. A TOML file
may extend another (`extends = "name-or-file"`; `tasks.NAME = false` drops a task of it), and the command line can set any
value (`section.key=value`).
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from minbert_fast.common.schema import (
    ConfigError,
    Whole,
    build,
    check,
    check_at_least,
    check_below_one,
    merge,
    plain,
    to_toml,
)
from minbert_fast.common.storage import inside, regular
from minbert_fast.data.sampling import Scheme
from minbert_fast.model.config import BertConfig, Pooling  # noqa: F401  (BertConfig: an import path of earlier versions)

SPLITS = ("dev", "train", "test")
SCORED = ("_accuracy", "_pearson", "_macro_f1", "_spearman")  # ends of the metrics that reports publish


@dataclass(frozen=True)
class ModelOptions:
    """The encoder: its weights, pooling and dropout. An empty name means the embedded tiny model."""

    name: str = ""  # weights: a directory, a hub name or a course .pt file
    pooling: Pooling = "mean"  # of a sentence's tokens into one vector; a task's own `pooling` takes precedence
    dropout: float | None = None  # of hidden states and attention; unset: as in the model's configuration
    freeze: bool = False  # train the heads only (the course's `--option pretrain`)

    def __post_init__(self) -> None:
        check_below_one(self, "dropout")


@dataclass(frozen=True)
class DataOptions:
    """The examples and their order. An empty directory means the embedded sample data."""

    directory: str = ""  # of data files in the course's layout
    files: Mapping[str, Any] = field(default_factory=dict)  # {dataset: {split: path}}; take precedence over directory
    cache: str = ""  # token cache directory; empty: the user's cache directory
    scheme: Scheme = "cycle"  # of an epoch: cycle, each-once or sequential (docs/data.md)
    max_length: int = 128  # tokens of a sequence, [CLS] and [SEP] included; longer ones are cut
    max_bad_rows: float = 0.01  # a file with this share of malformed rows, or more, is refused
    holdout: float = 0.1  # share of the training rows that serves as dev rows of a task without any; 0: no dev rows
    held_out: Mapping[str, str] = field(default_factory=dict)  # hash of the rows it was taken from; set by the run

    def __post_init__(self) -> None:
        check_at_least(self, 2, "max_length")
        check(0 <= self.holdout < 1, f"holdout = {self.holdout}: expected a fraction below 1")
        check(0 <= self.max_bad_rows <= 1, f"max_bad_rows = {self.max_bad_rows}: expected a fraction from 0 to 1")
        for dataset, splits in self.files.items():
            known = isinstance(splits, Mapping) and splits.keys() <= {*SPLITS}
            fits = known and all(isinstance(path, str) for path in splits.values())
            check(fits, f"files.{dataset} = {splits!r}: expected split = path, for the splits {', '.join(SPLITS)}")


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedule: linear warm-up over a share `warmup` of the steps, then `schedule`."""

    lr: float = 2e-5  # learning rate
    head_lr: float | None = None  # learning rate of the tasks' heads; unset: lr
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the averages of the gradient and of its square
    eps: float = 1e-6  # added to the root of the squares' average
    weight_decay: float = 0.0  # share of a weight that an update at learning rate 1 removes
    decay_all: bool = True  # false: no decay of biases and LayerNorms
    correct_bias: bool = True  # scale the averages, which start at zero, to their full size
    schedule: Literal["linear", "cosine", "exponential", "constant"] = "linear"  # of the rate after the warm-up
    warmup: float = 0.1  # share of all steps
    gamma: float = 0.96  # exponential: factor per epoch
    layer_decay: float = 1.0  # learning rate factor from each layer to the layer below
    clip: float = 1.0  # maximum gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        check_at_least(self, 0, "lr", "head_lr", "eps", "weight_decay", "clip", "gamma", "layer_decay")
        check(self.eps > 0, f"eps = {self.eps}: expected a number above 0, weights without a gradient would become nan")
        check(all(0 <= b < 1 for b in self.betas), f"betas = {self.betas}: expected 0 <= beta < 1")
        check(0 <= self.warmup <= 1, f"warmup = {self.warmup}: expected a share from 0 to 1")

    def unused(self) -> dict[str, str]:
        """Maps each key that has no effect, the other values being as they are, to what it belongs to."""
        rules = {"gamma": (self.schedule == "exponential", 'schedule = "exponential"')}
        rules |= {"decay_all": (self.weight_decay > 0, "weight_decay")}
        return {key: reader for key, (read, reader) in rules.items() if not read}


@dataclass(frozen=True)
class SurgeryOptions:
    """How the tasks' gradients of the shared encoder are combined; `none` adds them unchanged."""

    method: str = "none"  # none, pcgrad, upgrad, ... (docs/surgery.md)
    reduction: Literal["sum", "mean"] = "sum"  # of the tasks' gradients after the surgery


@dataclass(frozen=True)
class WeightingOptions:
    """Dynamic weights of the tasks' losses; each multiplies the task's own `weight`."""

    method: str = "none"  # none (each weight is 1), uncertainty, dwa, famo, random (docs/surgery.md: one of your own)
    lr: float = 0.01  # uncertainty: learning rate of the log-variances
    logit_lr: float = 0.025  # famo: Adam's learning rate of the logits
    logit_decay: float = 0.001  # famo: decay of the logits, in Adam's gradient
    temperature: float = 2.0  # dwa: a higher temperature gives more equal weights
    window: int = 0  # dwa: compares mean losses over this many steps; 0: an epoch

    def __post_init__(self) -> None:
        check_at_least(self, 0, "lr", "logit_lr", "logit_decay", "window")
        check(0 < self.temperature < math.inf, f"temperature = {self.temperature}: expected above 0")

    def unused(self) -> dict[str, str]:
        """Maps each key that has no effect, the other values being as they are, to what it belongs to."""
        readers = {
            "lr": "uncertainty",
            "logit_lr": "famo",
            "logit_decay": "famo",
            "temperature": "dwa",
            "window": "dwa",
        }
        if self.method not in ("none", "random", *readers.values()):  # a method of the user's own may read any of them
            return {}
        return {key: f'method = "{method}"' for key, method in readers.items() if method != self.method}


@dataclass(frozen=True)
class RegularisationOptions:
    """Consistency regularisation: penalties for outputs that change under dropout or perturbation. 0: no penalty."""

    r_drop: float = 0.0  # weight of the divergence between outputs under two dropout masks
    smart: float = 0.0  # weight of the divergence between outputs of an example and of its perturbed copy
    noise: float = 0.003  # smart: standard deviation of the initial perturbation
    step: float = 0.1  # smart: step size along the gradient, whose largest element is scaled to 1
    radius: float = 0.01  # smart: bound on each element of the perturbation
    proximal: float = 0.0  # weight of the divergence from a teacher whose weights are a moving average
    momentum: float = 0.99  # proximal: decay of the moving average

    def __post_init__(self) -> None:
        check_at_least(self, 0, "r_drop", "smart", "noise", "step", "radius", "proximal")
        check_below_one(self, "momentum")
        # Without noise an example and its copy are equal, and the gradient of their divergence is rounding error.
        check(self.noise > 0 or not self.smart, f"noise = {self.noise}: smart needs a perturbation to start from")
        check(
            not (self.r_drop and self.smart), "r_drop and smart: set only one; both use the second copy of an example"
        )

    def unused(self) -> dict[str, str]:
        """Maps each key that has no effect, the other values being as they are, to what it belongs to."""
        readers = {"noise": "smart", "step": "smart", "radius": "smart", "momentum": "proximal"}
        return {key: penalty for key, penalty in readers.items() if not getattr(self, penalty)}

    @property
    def duplicates_examples(self) -> bool:
        """Whether a batch holds each example twice."""
        return self.r_drop > 0 or self.smart > 0


@dataclass(frozen=True)
class TrainingOptions:
    """Length of the run, batch size, precision, evaluation, model selection."""

    epochs: float = 1.0  # passes over the data, as the scheme defines one; 0.25: a quarter of one
    max_steps: int | None = None  # length of the run and of its schedule, in place of `epochs`; stages share it
    batch_size: int = 32  # examples per task and step; a task's own `batch_size` takes precedence
    seed: int = 11711  # of all random numbers
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matrix products; weights and moments stay fp32
    graphs: bool = True  # on CUDA: replay each step as a captured graph; false: run it eagerly
    shard: bool = False  # several processes: each stores only its part of the gradients and moments
    start: Literal["last", "best"] | int = "last"  # a stage's first weights: the previous stage's, or stage N's last
    select: str = "score"  # the dev metric that chooses the best model
    best_per_task: bool = False  # also keep each task's best model, by its own metric, in best-TASK/
    evaluate_every: int = 0  # steps; 0: at the end of each epoch
    evaluate_untrained: bool = True  # also evaluate before the first step
    evaluate_train: int = 0  # training rows of each task that every evaluation scores too; 0: none
    patience: int = 0  # stop after this many evaluations without a better score; 0: never
    max_skipped: int = 10  # stop after this many consecutive steps with a loss or gradient that is not finite
    ema: float = 0.0  # decay of a moving average of the weights, which is evaluated and saved; 0: no average

    def __post_init__(self) -> None:
        check_at_least(self, 0, "epochs", "max_steps", "evaluate_every", "evaluate_train", "patience")
        check_at_least(self, 1, "batch_size", "max_skipped")
        check(0 <= self.seed < 2**63, f"seed = {self.seed}: expected 0 or more, below 2**63")
        check_below_one(self, "ema")

    def needing_evaluations(self) -> dict[str, Any]:
        """The values, by key, that have no effect on a run without evaluations."""
        values = {key: getattr(self, key) for key in ("evaluate_train", "patience", "best_per_task", "start")}
        return {key: value for key, value in values.items() if (value == "best" if key == "start" else value)}


@dataclass(frozen=True)
class CheckpointOptions:
    """Resumable checkpoints. A run keeps its newest two, or `keep` if that is more; a finished run keeps `keep`."""

    every: int = 0  # steps from one checkpoint to the next; 0: one at the end of each epoch
    keep: int = 0  # checkpoints of a finished run that stay

    def __post_init__(self) -> None:
        check_at_least(self, 0, "every", "keep")


@dataclass(frozen=True)
class LoggingOptions:
    """The run's records."""

    every: int = 10  # steps from one line of metrics.jsonl to the next

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every")


@dataclass(frozen=True)
class Published:
    """The scores of a row that a report prints, by split; a metric has the name that a run's summary.json uses."""

    dev: Mapping[str, float] = field(default_factory=dict)  # {metric: value}
    train: Mapping[str, float] = field(default_factory=dict)  # {metric: value}
    test: Mapping[str, float] = field(default_factory=dict)  # {metric: value}
    row: str = ""  # the row's name in the report
    table: str = ""  # the table of the report that holds the row
    seconds: float | None = None  # training time that the report states

    def __post_init__(self) -> None:
        check_at_least(self, 0, "seconds")
        for split in SPLITS:
            for metric, value in getattr(self, split).items():
                known = metric == "score" or metric.endswith(SCORED)
                check(known, f"{split}.{metric}: expected score, or TASK_METRIC with one of {', '.join(SCORED)}")
                check(-1 <= value <= 1, f"{split}.{metric} = {value}: expected -1 to 1")

    def __bool__(self) -> bool:
        """Whether there are scores."""
        return any(getattr(self, split) for split in SPLITS)


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
        return build(cls, _with_split(_without_removed_tasks(_read_inherited(path, ()))), str(path))


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


def _with_split(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with published dev scores under `dev`: recipes and saved models of earlier versions have them directly."""
    published = values.get("published")
    if published and isinstance(published, Mapping) and all(key.endswith(("score", *SCORED)) for key in published):
        return values | {"published": {"dev": published}}
    return values


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
