# SPDX-License-Identifier: Apache-2.0
"""A training run described as data: frozen dataclasses that check their values.

A recipe has the sections `model`, `data`, `tasks`, `optimizer`, `surgery`, `weighting`, `regularisation`, `training`,
`checkpoint` and `logging`. Optional `stages` are partial recipes that run in order, each laid over the whole. A TOML file
may extend another (`extends = "name-or-file"`), and the command line can set any value (`section.key=value`).
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

from minbert_fast.common.schema import ConfigError, build, check, check_at_least, check_below_one, merge, plain, to_toml
from minbert_fast.common.storage import inside, regular
from minbert_fast.data.sampling import Scheme
from minbert_fast.model.config import BertConfig, Pooling  # noqa: F401  (BertConfig: an import path of earlier versions)


@dataclass(frozen=True)
class ModelOptions:
    """The encoder: its weights, pooling and dropout. An empty name means the embedded tiny model."""

    name: str = ""
    pooling: Pooling = "mean"
    dropout: float | None = None  # of hidden states and attention; None keeps the model's configuration
    freeze: bool = False  # train the heads only (the course's `--option pretrain`)

    def __post_init__(self) -> None:
        check_below_one(self, "dropout")


@dataclass(frozen=True)
class DataOptions:
    """The examples and their order. An empty directory means the embedded sample data."""

    directory: str = ""
    files: Mapping[str, Any] = field(default_factory=dict)  # {dataset: {split: path}}; take precedence over directory
    cache: str = ""  # token cache directory; empty: the user's cache directory
    scheme: Scheme = "cycle"
    max_length: int = 128  # tokens
    max_bad_rows: float = 0.01  # share of a file's rows

    def __post_init__(self) -> None:
        check_at_least(self, 2, "max_length")
        check(0 <= self.max_bad_rows <= 1, f"max_bad_rows = {self.max_bad_rows}: expected a fraction from 0 to 1")
        for dataset, splits in self.files.items():
            paths = splits.values() if isinstance(splits, Mapping) else [None]
            check(all(isinstance(path, str) for path in paths), f"files.{dataset} = {splits!r}: expected split = path")


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedule: linear warm-up over a share `warmup` of the steps, then `schedule`."""

    lr: float = 2e-5
    head_lr: float | None = None  # None: lr
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    decay_all: bool = True  # False: no decay of biases and LayerNorms
    correct_bias: bool = True
    schedule: Literal["linear", "cosine", "exponential", "constant"] = "linear"
    warmup: float = 0.1  # share of all steps
    gamma: float = 0.96  # exponential: factor per epoch
    layer_decay: float = 1.0  # learning rate factor from each layer to the layer below
    clip: float = 1.0  # maximum gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        check_at_least(self, 0, "lr", "head_lr", "eps", "weight_decay", "clip", "gamma", "layer_decay")
        check(all(0 <= b < 1 for b in self.betas), f"betas = {self.betas}: expected 0 <= beta < 1")
        check(0 <= self.warmup <= 1, f"warmup = {self.warmup}: expected a share from 0 to 1")


@dataclass(frozen=True)
class SurgeryOptions:
    """How the tasks' gradients of the shared encoder are combined; `none` adds them unchanged."""

    method: str = "none"
    reduction: Literal["sum", "mean"] = "sum"


@dataclass(frozen=True)
class WeightingOptions:
    """Dynamic weights of the tasks' losses; each multiplies the task's own `weight`."""

    method: Literal["none", "uncertainty", "dwa", "famo", "random"] = "none"
    lr: float = 0.01  # uncertainty: learning rate of the log-variances
    logit_lr: float = 0.025  # famo: Adam's learning rate of the logits
    logit_decay: float = 0.001  # famo: decay of the logits, in Adam's gradient
    temperature: float = 2.0  # dwa: a higher temperature gives more equal weights
    window: int = 0  # dwa: compares mean losses over this many steps; 0: an epoch

    def __post_init__(self) -> None:
        check_at_least(self, 0, "lr", "logit_lr", "logit_decay", "window")
        check(0 < self.temperature < math.inf, f"temperature = {self.temperature}: expected above 0")


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
        check(
            not (self.r_drop and self.smart), "r_drop and smart: set only one; both use the second copy of an example"
        )

    @property
    def duplicates_examples(self) -> bool:
        """Whether a batch holds each example twice."""
        return self.r_drop > 0 or self.smart > 0


@dataclass(frozen=True)
class TrainingOptions:
    """Length of the run, batch size, precision, model selection."""

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 32  # examples per task and step; a task's own `batch_size` takes precedence
    seed: int = 11711
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    graphs: bool = True  # on CUDA: replay each step as a captured graph; false: run it eagerly
    shard: bool = False  # several processes: each stores only its part of the gradients and moments
    select: str = "score"  # the dev metric that chooses the best model
    evaluate_every: int = 0  # steps; 0: at the end of each epoch
    evaluate_untrained: bool = True  # also evaluate before the first step
    patience: int = 0  # stop after this many evaluations without a better score; 0: never
    max_skipped: int = 10  # stop after this many consecutive steps with a loss or gradient that is not finite
    ema: float = 0.0  # decay of a moving average of the weights, which is evaluated and saved; 0: no average

    def __post_init__(self) -> None:
        check_at_least(self, 0, "epochs", "max_steps", "evaluate_every", "patience")
        check_at_least(self, 1, "batch_size", "max_skipped")
        check(0 <= self.seed < 2**63, f"seed = {self.seed}: expected 0 or more, below 2**63")
        check_below_one(self, "ema")


@dataclass(frozen=True)
class CheckpointOptions:
    """Resumable checkpoints: one every `every` steps (0: at the end of each epoch); the newest `keep` are kept."""

    every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        check_at_least(self, 0, "every")
        check_at_least(self, 1, "keep")


@dataclass(frozen=True)
class LoggingOptions:
    """One line of metrics.jsonl every `every` steps."""

    every: int = 10

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every")


@dataclass(frozen=True)
class Recipe:
    """One experiment as data.

    `tasks[name]` holds the options of one task (head, loss, batch size, ...); `minbert_fast.tasks` checks them.
    `stages` are partial recipes that run in order. A recipe without stages is a single stage.
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
            # The flat buffers label the encoder's regions with these names, and each head's region with its task's.
            check(name not in ("shared", "words", "frozen"), f"tasks.{name}: this name is reserved, choose another")

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
        return build(Recipe, merge(plain(self), values), where)

    @classmethod
    def load(cls, name_or_file: str) -> Recipe:
        """Reads a recipe of the package by name, or a TOML file, and the recipes that it extends. Raises ConfigError."""
        path = recipe_path(name_or_file)
        return build(cls, _read_inherited(path, ()), str(path))


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
    for own in ("name", "description", "source", "published"):
        inherited.pop(own, None)
    return merge(inherited, values)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """A nested mapping from `section.key=value` strings. Values are TOML; what is not TOML is text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment!r}: expected section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        values = merge(values, value)
    return values
