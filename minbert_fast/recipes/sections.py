# SPDX-License-Identifier: Apache-2.0
"""The sections of a recipe: frozen dataclasses that check their values. The comments beside their keys are documentation.

`keys.py` reads the types, defaults and comments of the keys for the commands and docs/recipes.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minbert_fast.common.schema import check, check_at_least, check_below_one
from minbert_fast.data.sampling import Scheme
from minbert_fast.model.config import Pooling

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
