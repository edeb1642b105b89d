# SPDX-License-Identifier: Apache-2.0
"""The parts of a task: options from the recipe, a head (sentence embeddings to scores and a loss), metrics, files.

A kind is one file of this package: a frozen dataclass of options, a `Head`, and a `Task` registered under the kind's name.
A preset (`presets.toml`) is a kind with some options set. A head's forward and loss must not synchronise with the device,
and their shapes must not depend on tensor values: the training step is captured as a CUDA graph.

Shapes: n examples of the task in the batch, B sentences, N token rows, H hidden, C classes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from torch import Tensor, nn

from minbert_fast.common.schema import ConfigError, build, check, check_at_least
from minbert_fast.data.label_summary import LabelSummary
from minbert_fast.data.labels import Rule
from minbert_fast.data.pretraining import ExampleGenerator
from minbert_fast.data.sampling import Draw
from minbert_fast.data.source import Source, sources_of
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import Encoder, TokenTable, chain, sequences_of
from minbert_fast.model.config import BertConfig, Pooling
from minbert_fast.tasks.metrics import OF_PREDICTIONS
from minbert_fast.tasks.neighbours import LabelledSentences
from minbert_fast.tasks.presets import PRESETS

WORD_EMBEDDING = "encoder.word_embedding"  # key of the encoder's own embedding among the `shared` modules of heads


@dataclass(frozen=True)
class TaskInput:
    """A head's input: one task's part of the encoded batch."""

    embeddings: tuple[Tensor, ...]  # pooled, fp32; one [n, H] per sequence of an example
    hidden: Tensor  # [N, H] token rows of the whole packed batch
    cu_seqlens: Tensor  # [B + 1] first row of each sentence of the whole batch, then the end
    max_seqlen: int
    first: int  # the task's first sequence; it has n * arity of them: all first sequences, then all second ones, ...
    labels: Tensor | None = None  # the task's labels in this batch, for heads that compute only labelled positions
    pooling: Pooling = "mean"  # of the embeddings, for heads that pool rows of their own


class HeadOutput(NamedTuple):
    """A head's output, fp32."""

    scores: Tensor  # [n] or [n, C]
    vectors: tuple[Tensor, ...] = ()  # sentence vectors [n, D], for losses that compare sentences


@dataclass(frozen=True)
class Results:
    """The results of a task's head for n rows, from which metrics are computed."""

    predictions: np.ndarray  # [n], or [n, C]
    labels: np.ndarray | None  # [n], or [n, C]; None for a task without labels
    probabilities: np.ndarray | None = None  # [n, C]
    vectors: tuple[np.ndarray, ...] = ()  # [n, D] per text, for tasks with `Head.compares_rows`
    table: TokenTable | None = None  # the rows themselves


@dataclass(frozen=True)
class TaskOptions:
    """Options of every task kind: a table `[tasks.<name>]` of the recipe."""

    kind: str = ""  # of task, or a preset; empty: the task's own name
    data: Any = ""  # its data sets: files, data sets of the hub, named layouts (docs/data.md)
    pooling: Pooling | None = None  # unset: the recipe's `model.pooling`
    batch_size: int | None = None  # unset: the recipe's `training.batch_size`
    weight: float = 1.0  # of the task's loss
    fraction: float = 1.0  # of the training rows, drawn per epoch
    balanced: bool = False  # draw each class equally often (graded labels: each nearest whole number)
    replacement: bool = False  # draw with replacement; with balanced, a row's weight is 1 / (rows of its class)
    per_class: int = 0  # draw at most this many rows of each class per epoch; 0: no limit
    dev_fraction: float = 1.0  # share of the dev rows that evaluations use
    metric: str = ""  # the metric that judges the task; empty: that of its kind
    metrics: tuple[str, ...] = ()  # the reported metrics; empty: those of its kind
    stem: str = ""  # prediction files are called {stem}-{split}-output.csv; empty: the task's name
    header: str = ""  # second column of prediction files; empty: Predicted_{name}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "weight", "per_class")
        for name in ("fraction", "dev_fraction"):
            share = getattr(self, name)
            check(0 < share <= 1, f"{name} = {share}: expected a share above 0, up to 1")
        try:
            self.draw  # noqa: B018  (checks the combination)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def unused(self) -> dict[str, str]:
        """Maps each key that has no effect, the other values being as they are, to what it belongs to."""
        return {}

    def once(self) -> tuple[str, ...]:
        """Keys whose values a run has once, so that a stage cannot replace them."""
        return ("metric", "metrics", "dev_fraction", "stem", "header")

    @property
    def draw(self) -> Draw:
        """How the training rows are drawn."""
        return Draw(self.fraction, self.balanced, self.replacement, self.per_class)


class Head(nn.Module, ABC):
    """The layers of one task on top of the shared encoder; all its arithmetic is fp32.

    A stage of a recipe may replace `options` (losses, dropout) if the parameters keep their shapes.
    """

    options: Any
    compares_rows: ClassVar[bool] = False  # the task's metrics need the vectors of all rows

    def configure(self, options: Any) -> None:
        """Replaces the options."""
        self.options = options

    @abstractmethod
    def forward(self, inputs: TaskInput) -> HeadOutput:
        """Scores of the n examples."""

    @abstractmethod
    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        """The mean loss over the n >= 1 examples, a scalar; labels [n] or [n, C] are as the task's rule parses them."""

    def predict(self, output: HeadOutput) -> Tensor:
        """Predictions, shaped and scaled like the labels; by default the most likely class [n]."""
        return output.scores.argmax(-1)

    def probabilities(self, output: HeadOutput) -> Tensor | None:
        """Class probabilities [n, C]; None for a task without classes."""
        return None

    def logits(self, output: HeadOutput) -> Tensor | None:
        """Unnormalised log-probabilities [n, C] of the classes in the loss; None for a loss without classes."""
        return None

    def published_parameters(self) -> dict[str, Tensor]:
        """Parameters by their names in published BERT files, for heads that BERT was pre-trained with."""
        return {}

    def labelled_sentences(self) -> LabelledSentences | None:
        """The labelled training sentences that must be embedded before the head's stage begins, if it uses any."""
        return None


@dataclass(frozen=True)
class Task(ABC):
    """One task of a recipe: its name, its checked options, and everything that differs between kinds."""

    name: str
    options: Any
    preset: str = ""  # the preset that it was built from; empty: none

    Options: ClassVar[type]
    head_class: ClassVar[type]  # a Head that is built from options, config and shared modules (`build_head`)
    labelled: ClassVar[bool] = True
    predicts: ClassVar[bool] = True  # False: the task only trains, without dev scores and predictions
    metric: ClassVar[str] = "accuracy"  # judges the task, unless the options name another one
    reported: ClassVar[tuple[str, ...]] = ()  # metrics of the kind, unless the options name some

    def __post_init__(self) -> None:
        _ = self.sources  # raises ConfigError
        for metric in (self.options.metric, *self.options.metrics):
            if metric and metric not in self.known_metrics:
                known = ", ".join(self.known_metrics) or "none, it only trains"
                raise ConfigError(f"tasks.{self.name}: metric {metric!r}: expected one of this kind: {known}")

    @property
    def kind(self) -> str:
        return str(self.options.kind)

    # ---- Data ------------------------------------------------------------------------------------------------------

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data sets that the task is trained and evaluated on."""
        return sources_of(self.options.data, f"tasks.{self.name}.data")

    @property
    def layout(self) -> str:
        """The layout whose files in the data directory are the task's only data set; empty if `data` names files."""
        sources = self.sources
        return sources[0].layout if len(sources) == 1 and not (sources[0].train or sources[0].hub) else ""

    @property
    def num_texts(self) -> int:
        """Texts of an example."""
        return 1

    @property
    def rule(self) -> Rule | None:
        """How a label becomes numbers; None for unlabelled data."""
        return None

    @property
    def resolved(self) -> bool:
        """Whether the options are complete. Otherwise `resolve` finds the missing ones in the training labels."""
        return True

    def resolve(self, summary: LabelSummary) -> dict[str, Any]:
        """The missing options, from the labels of the training set; a recipe stores them under the task's name.

        Raises ConfigError if such labels do not suit the kind.
        """
        return {}

    def table(self, tables: Sequence[TokenTable]) -> TokenTable:
        """The task's rows, from the tables of those of its sources that exist (one or more)."""
        return tables[0] if len(tables) == 1 else chain(self.name, tables)

    def example_generator(self, tokenizer: Tokenizer, seed: int) -> ExampleGenerator | None:
        """Generates the task's examples from its rows at each step; None if the rows are the examples."""
        return None

    @property
    def encoder(self) -> Encoder:
        """How a pair is encoded: as two sequences, as one sequence [CLS] a [SEP] b [SEP], or both."""
        return "bi"

    @property
    def arity(self) -> int:
        """Sequences per example in the packed batch."""
        return sequences_of(self.encoder, self.num_texts)

    # ---- Model -----------------------------------------------------------------------------------------------------

    @property
    def compares_examples(self) -> bool:
        """Whether the loss of an example depends on the others of its batch, of which a process sees its own only."""
        return False

    @property
    def pooling(self) -> Pooling | None:
        """Pooling of the task's sentences; None: the recipe's."""
        pooling: Pooling | None = self.options.pooling
        return pooling

    @property
    def weight(self) -> float:
        """Factor on the task's loss."""
        return float(self.options.weight)

    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> Head:
        """A new head. `shared` holds the modules that heads of one model share, by name."""
        head: Head = self.head_class(self.options, config, shared)
        return head

    # ---- Metrics and predictions -------------------------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes 0 to C - 1; None for a regression."""
        return None

    @property
    def known_metrics(self) -> tuple[str, ...]:
        """All metrics that the options may name."""
        return self.reported

    @property
    def metrics(self) -> tuple[str, ...]:
        """The reported metrics, with the one that judges the task."""
        judge = self.options.metric or self.metric
        return tuple(dict.fromkeys((*(self.options.metrics or self.reported or (judge,)), judge)))

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The full names of the reported metrics, the keys of `evaluate`."""
        return tuple(f"{self.name}_{metric}" for metric in self.metrics) if self.predicts else ()

    @property
    def primary(self) -> str:
        """The full name of the metric that judges the task."""
        return f"{self.name}_{self.options.metric or self.metric}"

    def measure(self, results: Results) -> Mapping[str, Callable[[], float]]:
        """A function for each metric that the options may name; by default those of predictions and labels alone."""
        predictions, labels = results.predictions, results.labels
        return {} if labels is None else {n: partial(of, predictions, labels) for n, of in OF_PREDICTIONS.items()}

    def evaluate(self, results: Results) -> dict[str, float]:
        """The reported metrics of n >= 1 rows by full name."""
        functions = self.measure(results)
        return {f"{self.name}_{metric}": functions[metric]() for metric in self.metrics} if self.predicts else {}

    @property
    def header(self) -> str:
        """Second column of the prediction files."""
        return self.options.header or f"Predicted_{self.name}"

    def prediction_file(self, split: str) -> str:
        """Name of the prediction file; the three course tasks have the course's names."""
        return f"{self.options.stem or self.name}-{split}-output.csv"

    def as_labels(self, predictions: np.ndarray) -> list[Any]:
        """Predictions [n] as a data file writes labels: numbers, or names of classes."""
        values: list[Any] = predictions.tolist()
        return values


# ---- Registry ------------------------------------------------------------------------------------------------------

KINDS: dict[str, type[Task]] = {}

K = TypeVar("K", bound=type[Task])


def register(kind: str) -> Callable[[K], K]:
    """Class decorator: registers a Task as `kind`, its name in recipes."""

    def add(cls: K) -> K:
        assert kind not in KINDS.keys() | PRESETS.keys(), f"two tasks of kind {kind!r}"
        KINDS[kind] = cls
        return cls

    return add


def is_kind(name: str) -> bool:
    """Whether a task may have `name` as its kind: a kind or a preset."""
    return name in KINDS or name in PRESETS


def build_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task that table `[tasks.<name>]` describes; its kind defaults to its name.

    Raises ConfigError naming the key, the value and what was expected.
    """
    values = dict(options or {})
    where = f"tasks.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{where}: expected a name of letters, digits, '-' and '_'")
    kind = values["kind"] = values.get("kind") or name
    preset = kind if isinstance(kind, str) and kind in PRESETS else ""
    if preset:
        values = PRESETS[preset] | values | {"kind": PRESETS[preset]["kind"]}
        if name != preset and "stem" not in (options or {}):
            values.pop("stem", None)
        owners = [each for each, its in PRESETS.items() if its.get("data") == values.get("data")]
        if owners and preset not in owners:
            raise ConfigError(
                f"{where}: data = {values['data']!r} is of kind {owners[0]!r}, not {preset!r}: write that kind"
            )
    elif not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{where}.kind = {kind!r}: expected one of {', '.join([*KINDS, *PRESETS])}")
    cls = KINDS[values["kind"]]
    return cls(name, build(cls.Options, values, where, "."), preset)
