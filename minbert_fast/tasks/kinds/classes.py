# SPDX-License-Identifier: Apache-2.0
"""Shared by kinds with classes: options, the classes found in the training labels, class weights, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from minbert_fast.common.schema import ConfigError, check, check_below_one
from minbert_fast.data.label_summary import LabelSummary
from minbert_fast.data.labels import Classes, Rule
from minbert_fast.tasks import losses, metrics
from minbert_fast.tasks.base import Head, HeadOutput, Results, Task, TaskOptions

MAX_FOUND = 1_000  # a label column with more different values is taken for something else than classes
BY_CLASS = ("precision", "recall", "f1")  # metrics of one class: f1/NAME


@dataclass(frozen=True)
class ClassOptions(TaskOptions):
    """Options of a task with classes."""

    classes: tuple[str, ...] = ()  # their names, in order; empty: those of the training labels
    class_weights: Literal["balanced"] | tuple[float, ...] = ()  # factors on the loss of each class's examples
    class_counts: tuple[int, ...] = ()  # training rows of each class, for "balanced"; empty: counted in the labels
    label_smoothing: float = 0.0  # share of each target that is spread evenly over all classes
    written: Literal["names", "numbers", "decimals"] = "names"  # how prediction files write class 1: its name, 1 or 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_below_one(self, "label_smoothing")
        check(len(set(self.classes)) == len(self.classes), f"classes = {list(self.classes)}: one is named twice")
        check(len(self.classes) != 1, f"classes = {list(self.classes)}: expected two or more")
        for name in ("class_weights", "class_counts"):
            values = getattr(self, name)
            fits = isinstance(values, str) or not (values and self.classes) or len(values) == len(self.classes)
            check(fits, f"{name} = {values}: expected one number for each of the {len(self.classes)} classes")
            check(isinstance(values, str) or all(0 <= v < float("inf") for v in values), f"{name}: expected 0 or more")

    def unused(self) -> dict[str, str]:
        return super().unused() | (
            {} if self.class_weights == "balanced" else {"class_counts": 'class_weights = "balanced"'}
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """Factors on the loss of each class's examples, [C]; none if all count alike.

        `balanced` is n / (C n_c), as in scikit-learn: every class has the same share of the loss, and the mean is 1.
        """
        if not isinstance(self.class_weights, str):
            return self.class_weights
        total, classes = sum(self.class_counts), len(self.class_counts)
        return tuple(total / (classes * count) if count else 0.0 for count in self.class_counts)


class ClassHead(Head):
    """A head whose scores are [n, C], or [n] for the ordinal loss, which has thresholds between the classes.

    A subclass calls `configure` when its parameters exist.
    """

    options: ClassOptions
    thresholds: nn.Parameter | None  # [C - 1]
    class_weights: Tensor | None  # [C]; a buffer that follows from the options, so no file contains it

    def configure(self, options: ClassOptions) -> None:
        super().configure(options)
        weights = torch.tensor(options.weights) if options.weights else None
        self.register_buffer("class_weights", weights, persistent=False)

    def predict(self, output: HeadOutput) -> Tensor:
        if self.thresholds is not None:
            return self.as_written(losses.ordinal_levels(output.scores, self.thresholds))
        return self.as_written(output.scores.argmax(-1))

    def as_written(self, classes: Tensor) -> Tensor:
        """Predicted classes [n], as fp32 if prediction files write them as decimals."""
        return classes.float() if self.options.written == "decimals" else classes

    def probabilities(self, output: HeadOutput) -> Tensor:
        if self.thresholds is not None:
            return losses.ordinal_probabilities(output.scores, self.thresholds)
        return output.scores.softmax(-1)


def weighted_mean(each: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of the losses `each` [n], those of class c times weights[c]; labels int64 [n].

    Divided by n and not by the sum of the weights, so that the losses of several processes add up.
    """
    return each.mean() if weights is None else (each * weights[labels]).mean()


class ClassTask(Task):
    """A task whose label is one of C classes."""

    reported: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "macro_f1",
        "macro_precision",
        "macro_recall",
        "matthews",
        "average_precision",
    )

    @property
    def rule(self) -> Rule | None:
        return Classes(self.options.classes)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names: tuple[str, ...] = self.options.classes
        return names

    @property
    def resolved(self) -> bool:
        options = self.options
        return bool(options.classes) and (options.class_weights != "balanced" or bool(options.class_counts))

    def resolve(self, summary: LabelSummary) -> dict[str, Any]:
        options = self.options
        found: dict[str, Any] = {}
        if not options.classes:
            found["classes"] = list(self.find_classes(summary))
        if options.class_weights == "balanced" and not options.class_counts:
            counts = self.count_classes(summary, tuple(options.classes or found["classes"]))
            for name, count in counts.items():
                if not count:
                    where = f"tasks.{self.name}.class_weights"
                    raise ConfigError(f'{where} = "balanced": no training row of class {name!r}')
            found["class_counts"] = list(counts.values())
        return found

    def find_classes(self, summary: LabelSummary) -> tuple[str, ...]:
        """The classes of the training labels. Raises ConfigError if they are something else."""
        where = f"tasks.{self.name}"
        if summary.lists:
            raise ConfigError(f'{where}: a label is a list; expected kind = "multilabel"')
        names, otherwise = summary.names(), '; expected `classes`, or kind = "regression" for numbers'
        many = len(names) > MAX_FOUND or (len(names) > 50 and summary.rows < 2 * len(names))
        if summary.rows and (many or not names):
            count = f"{len(names):,}" if names else "too many"
            raise ConfigError(f"{where}: {count} different labels in {summary.rows:,} rows are no classes{otherwise}")
        if len(names) < 2:
            only = f"all {summary.rows:,} rows have the label {names[0]!r}" if names else "no row has a label"
            raise ConfigError(f"{where}: {only}; expected two classes or more")
        return names

    def count_classes(self, summary: LabelSummary, names: tuple[str, ...]) -> dict[str, int]:
        """Training rows by class."""
        rule, counts = Classes(names), dict.fromkeys(names, 0)
        for label, rows in summary.counts.items():
            try:
                counts[names[int(rule.parse(label))]] += rows
            except ValueError:
                continue  # such rows are reported as bad rows
        return counts

    # ---- Metrics and predictions -------------------------------------------------------------------------------------

    @property
    def known_metrics(self) -> tuple[str, ...]:
        names = self.options.classes
        if not names:  # until the classes are known, any name may be one
            names = tuple(filter(None, (m.partition("/")[2] for m in (self.options.metric, *self.options.metrics))))
        return (*self.reported, *(f"{m}/{name}" for m in BY_CLASS for name in names))

    def measure(self, results: Results) -> Mapping[str, Callable[[], float]]:
        predictions, labels, names = results.predictions, results.labels, self.class_names
        assert labels is not None
        assert names is not None
        table = metrics.precision_recall_f1(predictions, labels, len(names))  # [C, 3]
        by_class = {
            f"{m}/{n}": partial(float, table[c, i]) for i, m in enumerate(BY_CLASS) for c, n in enumerate(names)
        }
        average = partial(_average_precision, results.probabilities, labels)
        return {**super().measure(results), "average_precision": average, **by_class}

    def as_labels(self, predictions: np.ndarray) -> list[Any]:
        if self.options.written == "names":
            return [self.options.classes[int(value)] for value in predictions]
        return super().as_labels(predictions)


def _average_precision(probabilities: np.ndarray | None, labels: np.ndarray) -> float:
    """The mean over the classes that occur; of two exclusive classes, that of the second one.

    nan for a head without probabilities.
    """
    if probabilities is None:
        return float("nan")
    if labels.ndim == 2:
        return metrics.average_precision(probabilities, labels)
    if probabilities.shape[1] == 2:
        return metrics.average_precision(probabilities[:, 1], labels == 1)
    return metrics.average_precision(probabilities, labels[:, None] == np.arange(probabilities.shape[1]))
