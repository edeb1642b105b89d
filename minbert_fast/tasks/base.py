# SPDX-License-Identifier: Apache-2.0
"""The parts of a task: options from the recipe, a head (sentence embeddings to scores and a loss), metrics, files.

A task kind is one file of this package: a frozen dataclass of options, a `Head`, and a `Task` registered under the kind's
name. A head's forward and loss must not synchronise with the device, and their shapes must not depend on tensor values:
the training step is captured as a CUDA graph.

Shapes: n examples of the task in the batch, B sentences, N token rows, H hidden, C classes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import ConfigError, build, check, check_at_least
from minbert_fast.data.formats import FORMATS
from minbert_fast.data.sampling import Draw
from minbert_fast.model.config import BertConfig, Pooling
from minbert_fast.tasks import metrics

if TYPE_CHECKING:
    from minbert_fast.data.pretraining import ExampleGenerator
    from minbert_fast.data.tokenizer import Tokenizer
    from minbert_fast.data.tokens import Encoder, TokenTable
    from minbert_fast.tasks.neighbours import LabelledSentences


@dataclass(frozen=True)
class TaskInput:
    """A head's input: one task's part of the encoded batch."""

    embeddings: tuple[Tensor, ...]  # pooled, fp32; one [n, H] per sequence of an example
    hidden: Tensor  # [N, H] token rows of the whole packed batch
    cu_seqlens: Tensor  # [B + 1] first row of each sentence of the whole batch, then the end
    max_seqlen: int
    first: int  # the task's first sequence; it has n * arity of them: all first sequences, then all second ones, ...
    labels: Tensor | None = None  # the task's labels in this batch, for heads that compute only labelled positions


class HeadOutput(NamedTuple):
    """A head's output, fp32."""

    scores: Tensor  # [n] or [n, C]
    vectors: tuple[Tensor, ...] = ()  # sentence vectors [n, D], for losses that compare sentences


@dataclass(frozen=True)
class TaskOptions:
    """Options of every task kind: a table `[tasks.<name>]` of the recipe."""

    kind: str = ""  # empty: the task's own name
    pooling: Pooling | None = None  # None: the recipe's `model.pooling`
    batch_size: int | None = None  # None: the recipe's `training.batch_size`
    weight: float = 1.0  # of the task's loss
    fraction: float = 1.0  # of the training rows, drawn per epoch
    balanced: bool = False  # draw each class equally often (graded labels: each nearest whole number)
    replacement: bool = False  # draw with replacement; with balanced, a row's weight is 1 / (rows of its class)
    per_class: int = 0  # draw at most this many rows of each class per epoch; 0: no limit
    dev_fraction: float = 1.0  # share of the dev rows that evaluations use

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "weight")
        check_at_least(self, 0, "per_class")
        for name in ("fraction", "dev_fraction"):
            share = getattr(self, name)
            check(0 < share <= 1, f"{name} = {share}: expected a share above 0, up to 1")
        try:
            self.draw  # noqa: B018  (checks the combination)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def draw(self) -> Draw:
        """How the training rows are drawn."""
        return Draw(self.fraction, self.balanced, self.replacement, self.per_class)


class Head(nn.Module, ABC):
    """The layers of one task on top of the shared encoder; all its arithmetic is fp32.

    A stage of a recipe may replace `options` (losses, dropout) if the parameters keep their shapes.
    """

    options: Any

    @abstractmethod
    def forward(self, inputs: TaskInput) -> HeadOutput:
        """Scores of the n examples."""

    @abstractmethod
    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        """The mean loss over the n >= 1 examples, a scalar; labels [n] are as in the data file."""

    def predict(self, output: HeadOutput) -> Tensor:
        """Predictions [n] on the scale of the labels, as in the prediction files; by default the most likely class."""
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

    Options: ClassVar[type]
    head_class: ClassVar[type]  # a Head that is built from options, config and shared modules (`build_head`)
    labelled: ClassVar[bool] = True
    stem: ClassVar[str] = ""  # start of the prediction file's name, if the task has its kind's name
    header: ClassVar[str] = ""  # second column of the prediction file
    metric: ClassVar[str] = "accuracy"  # the metric that judges the task

    @property
    def kind(self) -> str:
        return str(self.options.kind)

    @property
    def dataset(self) -> str:
        """The task's data files (a key of `minbert_fast.data.formats.FORMATS`); empty for a task without own files."""
        return str(self.options.data)

    @property
    def predicts(self) -> bool:
        """Whether the task has dev scores and predictions. Otherwise it only trains, on the files of `sources`."""
        return bool(self.dataset)

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets whose training files the task uses (keys of FORMATS)."""
        return (self.dataset,)

    def table(self, tables: Sequence[TokenTable]) -> TokenTable:
        """The task's rows, from the tables of those of its sources that exist (one or more)."""
        (table,) = tables
        return table

    def example_generator(self, tokenizer: Tokenizer, seed: int) -> ExampleGenerator | None:
        """Generates the task's examples from its rows at each step; None if the rows are the examples."""
        return None

    @property
    def arity(self) -> int:
        """Sequences per example in the packed batch."""
        sentences = FORMATS[self.dataset].arity
        return {"bi": sentences, "cross": 1, "both": sentences + 1}[self.encoder]

    @property
    def encoder(self) -> Encoder:
        """How a pair is encoded: as two sequences, as one sequence [CLS] a [SEP] b [SEP], or both."""
        return "bi"

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes 0 to C - 1; None for a regression."""
        return None

    @property
    def pooling(self) -> Pooling | None:
        """Pooling of the task's sentences; None: the recipe's."""
        pooling: Pooling | None = self.options.pooling
        return pooling

    @property
    def weight(self) -> float:
        """Factor on the task's loss."""
        return float(self.options.weight)

    @property
    def primary(self) -> str:
        """The full name of the metric that judges the task."""
        return f"{self.name}_{self.metric}"

    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> Head:
        """A new head. `shared` holds the modules that heads of one model share, by name."""
        head: Head = self.head_class(self.options, config, shared)
        return head

    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        """The task's metrics; each name starts with the task's. The default is that of a task with classes."""
        assert labels is not None
        return {
            self.primary: metrics.accuracy(predictions, labels),
            f"{self.name}_macro_f1": metrics.macro_f1(predictions, labels),
        }

    def prediction_file(self, split: str) -> str:
        """Name of the prediction file; the three course tasks have the course's names."""
        stem = self.stem if self.name == self.kind else self.name
        return f"{stem}-{split}-output.csv"


# ---- Registry ------------------------------------------------------------------------------------------------------

KINDS: dict[str, type[Task]] = {}

K = TypeVar("K", bound=type[Task])


def register(kind: str) -> Callable[[K], K]:
    """Class decorator: registers a Task as `kind`, its name in recipes."""

    def add(cls: K) -> K:
        assert kind not in KINDS, f"two tasks of kind {kind!r}"
        KINDS[kind] = cls
        return cls

    return add


def build_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task that table `[tasks.<name>]` describes; its kind defaults to its name.

    Raises ConfigError naming the key, the value and what was expected.
    """
    values = dict(options or {})
    where = f"tasks.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{where}: expected a name of letters, digits, '-' and '_'")
    kind = values.setdefault("kind", name)
    if kind not in KINDS:
        raise ConfigError(f"{where}.kind = {kind!r}: expected one of {', '.join(KINDS)}")
    cls = KINDS[kind]
    return cls(name, build(cls.Options, values, where, "."))


# ---- Shared by several heads ---------------------------------------------------------------------------------------

WORD_EMBEDDING = "encoder.word_embedding"  # key of the encoder's own embedding among the `shared` modules of heads


class Stack(nn.Module):
    """`depth` times linear, ReLU, dropout at constant width; x [n, H] -> [n, H]."""

    def __init__(self, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(F.relu(layer(x)), self.dropout, self.training)
        return x


def shared_stack(options: Any, width: int, shared: dict[str, nn.Module]) -> Stack | None:
    """The stack that all heads with the same `options.shared_layers` share; None if that name is empty.

    Raises ConfigError if the name is taken or another head has set a different depth or dropout.
    """
    name, depth, dropout = options.shared_layers, options.shared_depth, options.dropout
    if not name:
        return None
    stack = shared.setdefault(name, Stack(width, depth, dropout))
    if not isinstance(stack, Stack):
        raise ConfigError(f"shared_layers = {name!r}: expected another name, this one is taken")
    if len(stack.layers) != depth or stack.dropout != dropout:
        raise ConfigError(
            f"shared_layers = {name!r}: {depth} layers with dropout {dropout} here, "
            f"{len(stack.layers)} layers with dropout {stack.dropout} in another task"
        )
    return stack


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """Cosine similarity of rows, [n, D] x [n, D] -> [n]; a zero row gives 0 and a finite gradient."""
    return F.cosine_similarity(u, v, dim=-1, eps=1e-8)


def normalize(x: Tensor) -> Tensor:
    """Rows [n, D] scaled to length 1; a zero row stays zero."""
    return F.normalize(x, dim=-1, eps=1e-8)
