# SPDX-License-Identifier: Apache-2.0
"""What a training run does: frozen dataclasses, checked when they are made.

`Recipe` is one experiment as data: sections `model`, `data`,
`tasks`, `optimizer`, `surgery`, `weighting`, `regularisation`, `training`, `checkpoint`, `logging`, and optional
`stages` (each a partial recipe laid over the whole, run one after the other). A TOML file may start from another
(`extends = "name-or-file"`), and any value can be set from the command line (`section.key=value`).
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from minbert_fast.common.schema import ConfigError, build, check, merge, plain, to_toml
from minbert_fast.common.storage import inside, regular
from minbert_fast.model.config import BertConfig, Pooling  # noqa: F401  (BertConfig: an import path of earlier versions)

# ---- Recipes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """The encoder: which weights, how sentences are pooled, what is dropped. Empty name: the embedded tiny model."""

    name: str = ""
    pooling: Pooling = "mean"
    dropout: float | None = None  # hidden and attention dropout; None keeps the model's own configuration
    freeze: bool = False  # course's `--option pretrain`: heads only

    def __post_init__(self) -> None:
        check(self.dropout is None or 0 <= self.dropout < 1, f"dropout = {self.dropout}: expected 0 <= p < 1")


@dataclass(frozen=True)
class DataOptions:
    """Where examples come from and in what order. Empty directory: the embedded sample data."""

    directory: str = ""
    files: Mapping[str, Any] = field(default_factory=dict)  # single files: {dataset: {split: path}}; they go first
    cache: str = ""  # token cache directory; empty: the user's cache directory
    scheme: Literal["cycle", "each-once", "sequential"] = "cycle"
    max_length: int = 128
    max_bad_rows: float = 0.01

    def __post_init__(self) -> None:
        check(self.max_length >= 2, f"max_length = {self.max_length}: expected at least 2 tokens")
        check(0 <= self.max_bad_rows <= 1, f"max_bad_rows = {self.max_bad_rows}: expected a fraction from 0 to 1")
        for dataset, splits in self.files.items():
            paths = splits.values() if isinstance(splits, Mapping) else [None]
            check(all(isinstance(path, str) for path in paths), f"files.{dataset} = {splits!r}: expected split = path")


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedule: the rate warms up linearly over `warmup` of the steps, then follows `schedule`."""

    lr: float = 2e-5
    head_lr: float | None = None  # None: lr
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    decay_all: bool = True  # False: biases and LayerNorms are not decayed
    correct_bias: bool = True
    schedule: Literal["linear", "cosine", "exponential", "constant"] = "linear"
    warmup: float = 0.1  # share of all steps
    gamma: float = 0.96  # exponential: factor an epoch
    layer_decay: float = 1.0  # learning rate factor from each layer to the one below it
    clip: float = 1.0  # gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr", "eps", "weight_decay", "clip", "gamma", "layer_decay"):
            value = getattr(self, name)
            check(value is None or (math.isfinite(value) and value >= 0), f"{name} = {value}: expected 0 or more")
        check(all(0 <= b < 1 for b in self.betas), f"betas = {self.betas}: expected 0 <= beta < 1")
        check(0 <= self.warmup <= 1, f"warmup = {self.warmup}: expected a share from 0 to 1")


@dataclass(frozen=True)
class SurgeryOptions:
    """What happens to the tasks' gradients of the shared encoder before they are added (`none`: nothing)."""

    method: str = "none"
    reduction: Literal["sum", "mean"] = "sum"


@dataclass(frozen=True)
class WeightingOptions:
    """Weights of the tasks' losses that change as training goes on; they come on top of the tasks' own `weight`."""

    method: Literal["none", "uncertainty", "dwa"] = "none"
    lr: float = 0.01  # uncertainty: of the gradient descent on the log-variances
    temperature: float = 2.0  # dwa: the higher, the more alike the weights
    window: int = 0  # dwa: steps whose mean losses are compared; 0: an epoch

    def __post_init__(self) -> None:
        check(math.isfinite(self.lr) and self.lr >= 0, f"lr = {self.lr}: expected 0 or more")
        check(0 < self.temperature < math.inf, f"temperature = {self.temperature}: expected above 0")
        check(self.window >= 0, f"window = {self.window}: expected 0 or more")


@dataclass(frozen=True)
class RegularisationOptions:
    """What is asked of the model beside the labels: that it answers an example alike each time. 0 asks nothing."""

    r_drop: float = 0.0  # weight of the divergence between two answers under different dropout
    smart: float = 0.0  # weight of the divergence between the answers to an example and to its perturbed twin
    noise: float = 0.003  # smart: standard deviation of the perturbation that the ascent starts from
    step: float = 0.1  # smart: how far it goes along a gradient whose largest element is 1
    radius: float = 0.01  # smart: bound on each element of the perturbation
    proximal: float = 0.0  # weight of the divergence from the answers of a teacher, the weights' moving average
    momentum: float = 0.99  # proximal: the average's decay

    def __post_init__(self) -> None:
        for name in ("r_drop", "smart", "noise", "step", "radius", "proximal"):
            value = getattr(self, name)
            check(math.isfinite(value) and value >= 0, f"{name} = {value}: expected 0 or more")
        check(0 <= self.momentum < 1, f"momentum = {self.momentum}: expected 0 <= decay < 1")
        check(not (self.r_drop and self.smart), "r_drop and smart: expected one of them, each has a use for the twins")

    @property
    def twins(self) -> bool:
        """Whether each example is in its batch twice."""
        return self.r_drop > 0 or self.smart > 0


@dataclass(frozen=True)
class TrainingOptions:
    """How long, how many, how exact."""

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 32  # examples a task and step; a task's own `batch_size` goes first
    seed: int = 11711
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    graphs: bool = True  # on CUDA: replay the step as captured graphs, one a bucket of batch sizes; false: eagerly
    shard: bool = False  # several processes: each keeps its part of the gradients and moments only
    select: str = "score"  # dev metric by which the best model is kept
    evaluate_every: int = 0  # steps; 0: at the end of each epoch
    evaluate_untrained: bool = True  # dev scores before the first step, to compare with
    patience: int = 0  # early stopping: evaluations without a better score; 0: never
    max_skipped: int = 10  # steps in a row with losses or gradients that are not finite, before training stops
    ema: float = 0.0  # decay of a moving average of the weights, which is what is evaluated and saved; 0: none

    def __post_init__(self) -> None:
        check(self.epochs >= 0, f"epochs = {self.epochs}: expected 0 or more")
        check(self.max_steps is None or self.max_steps >= 0, f"max_steps = {self.max_steps}: expected 0 or more")
        check(self.batch_size >= 1, f"batch_size = {self.batch_size}: expected at least 1")
        check(0 <= self.seed < 2**63, f"seed = {self.seed}: expected 0 or more")
        for name in ("evaluate_every", "patience"):
            check(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: expected 0 or more")
        check(self.max_skipped >= 1, f"max_skipped = {self.max_skipped}: expected at least 1")
        check(0 <= self.ema < 1, f"ema = {self.ema}: expected 0 <= decay < 1")


@dataclass(frozen=True)
class CheckpointOptions:
    """Resumable checkpoints: one every `every` steps (0: at the end of each epoch), the newest `keep` kept."""

    every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        check(self.every >= 0, f"every = {self.every}: expected 0 or more")
        check(self.keep >= 1, f"keep = {self.keep}: expected at least 1")


@dataclass(frozen=True)
class LoggingOptions:
    """One line of metrics.jsonl every `every` steps."""

    every: int = 10

    def __post_init__(self) -> None:
        check(self.every >= 1, f"every = {self.every}: expected at least 1")


@dataclass(frozen=True)
class Recipe:
    """One experiment as data.

    `tasks[name]` holds that task's own options (head, loss, batch size, ...); `minbert_fast.tasks` checks them.
    `stages` are partial recipes, run in order; without any, the recipe is its own single stage.
    """

    name: str = "default"
    description: str = ""
    source: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    tasks: Mapping[str, Any] = field(default_factory=lambda: {"sentiment": {}, "paraphrase": {}, "similarity": {}})
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    surgery: SurgeryOptions = field(default_factory=SurgeryOptions)
    weighting: WeightingOptions = field(default_factory=WeightingOptions)
    regularisation: RegularisationOptions = field(default_factory=RegularisationOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    stages: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check(bool(self.tasks), "tasks: expected at least one task")
        for name, options in self.tasks.items():
            check(isinstance(options, Mapping), f"tasks.{name} = {options!r}: expected a table of keys")

    def resolved_stages(self) -> tuple[Recipe, ...]:
        """One complete recipe a stage, each the whole recipe with the stage's values laid over it.

        A stage that names `tasks` trains just those (their options still fall back on the recipe's own).
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
        """The recipe with every value written out; `Recipe.load` reads it back equal."""
        return to_toml(plain(self))

    def with_values(self, values: Mapping[str, Any], where: str) -> Recipe:
        """This recipe with `values` (nested as in the file) laid over it."""
        return build(Recipe, merge(plain(self), values), where)

    @classmethod
    def load(cls, name_or_file: str) -> Recipe:
        """A named recipe of the package, or a TOML file; `extends` is followed. Raises ConfigError."""
        path = recipe_path(name_or_file)
        return build(cls, _read_chain(path, ()), str(path))


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("minbert_fast") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_path(name_or_file: str, beside: Path | None = None) -> Path:
    """The file of a recipe: a path as given, or a name that ships with the package.

    `beside` is the folder of a recipe that extends this one; a path then stays within it. Raises ValueError.
    """
    if name_or_file.endswith(".toml"):
        return Path(name_or_file) if beside is None else inside(beside, name_or_file)
    if name_or_file in recipe_names():
        return Path(str(resources.files("minbert_fast") / "recipes" / f"{name_or_file}.toml"))
    close = difflib.get_close_matches(name_or_file, recipe_names(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(recipe_names())}, or a .toml file"
    raise ConfigError(f"recipe {name_or_file!r}: no such recipe; {hint}")


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        values = tomllib.loads(regular(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from None
    if path.resolve() in seen:  # asked of a file that could be read: a loop of links cannot be resolved
        raise ConfigError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r}: expected text")
    try:
        following = recipe_path(parent, path.parent)
    except ValueError as error:
        raise ConfigError(f"{path}: extends: {error}") from None
    inherited = _read_chain(following, (*seen, path.resolve()))
    for own in ("name", "description", "source", "published"):
        inherited.pop(own, None)
    return merge(inherited, values)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`section.key=value` strings as a nested mapping; values read as TOML, bare words as text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment!r}: expected section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        nested: Any = value
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values
