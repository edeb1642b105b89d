# SPDX-License-Identifier: Apache-2.0
"""What a task is: options from the recipe, a head from sentence embeddings to scores and a loss, metrics, files.

A task kind is one file of this package: a frozen dataclass of options, a `Head`, and a `Task` registered under the
kind's name. Nothing in a head's forward or loss may wait for the device or depend on values in shapes: the whole
training step is captured as a CUDA graph.

Shapes: n examples of the task in the batch, B sentences, N token rows, H hidden, C classes.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import ConfigError, build
from minbert_fast.model.config import BertConfig, Pooling
from minbert_fast.tasks import predictions

if TYPE_CHECKING:
    from minbert_fast.data import Encoder, Maker, Tokenizer, TokenTable
    from minbert_fast.tasks.neighbours import LabelledSentences


@dataclass(frozen=True)
class TaskInput:
    """What a head sees: one task's part of the encoded batch."""

    embeddings: tuple[Tensor, ...]  # one [n, H] per sequence of an example, pooled, fp32
    hidden: Tensor  # [N, H] token rows of the whole packed batch
    cu_seqlens: Tensor  # [B + 1] where the sentences of the whole batch lie in hidden
    max_seqlen: int
    first: int  # this task's first sequence; it has n * arity: all first ones of the examples, then all second ones
    labels: Tensor | None = None  # the batch's own for this task, for heads that look only where there is an answer


class HeadOutput(NamedTuple):
    """What a head makes of its input, fp32."""

    scores: Tensor  # [n] or [n, C]
    vectors: tuple[Tensor, ...] = ()  # the sentences' vectors [n, D], for losses that compare across the batch


@dataclass(frozen=True)
class TaskOptions:
    """Options that each kind of task has, a table `[tasks.<name>]` of the recipe."""

    kind: str = ""  # empty: the task's own name
    pooling: Pooling | None = None  # None: the recipe's `model.pooling`
    batch_size: int | None = None  # None: the recipe's `training.batch_size`
    weight: float = 1.0  # of the task's loss
    fraction: float = 1.0  # share of the training file drawn an epoch
    balanced: bool = False  # draw each class equally often

    def __post_init__(self) -> None:
        require(self.batch_size is None or self.batch_size >= 1, f"batch_size = {self.batch_size}: expected 1 or more")
        require(math.isfinite(self.weight) and self.weight >= 0, f"weight = {self.weight}: expected 0 or more")
        require(0 < self.fraction <= 1, f"fraction = {self.fraction}: expected a share above 0, up to 1")


class Head(nn.Module, ABC):
    """The layers of one task on top of the shared encoder; all its arithmetic is fp32.

    `options` may be exchanged between the stages of a recipe (losses, dropout) as long as the parameters still fit.
    """

    options: Any

    @abstractmethod
    def forward(self, inputs: TaskInput) -> HeadOutput:
        """Scores of the n examples."""

    @abstractmethod
    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        """Mean loss over the n examples (n >= 1), a scalar; labels [n] as in the data file."""

    @abstractmethod
    def predict(self, output: HeadOutput) -> Tensor:
        """Predictions [n] on the scale of the labels, as the course's files have them."""

    def probabilities(self, output: HeadOutput) -> Tensor | None:
        """Class probabilities [n, C], or None for a task without classes."""
        return None

    def logits(self, output: HeadOutput) -> Tensor | None:
        """Unnormalised log-probabilities [n, C] of the classes that the loss knows; None where it knows scores alone."""
        return None

    def published(self) -> dict[str, Tensor]:
        """Its parameters by their names in published BERT files, for a head that BERT itself was trained with."""
        return {}

    def memory(self) -> LabelledSentences | None:
        """Labelled training sentences that are to be embedded before the head's stage begins, if it has any."""
        return None


@dataclass(frozen=True)
class Task(ABC):
    """One task of a recipe: its name, its checked options, and everything that differs between kinds."""

    name: str
    options: Any

    Options: ClassVar[type]
    labelled: ClassVar[bool] = True
    stem: ClassVar[str] = ""  # of the course's prediction file, for the task that bears its kind's name
    header: ClassVar[str] = ""  # second column of the prediction file

    @property
    def kind(self) -> str:
        return str(self.options.kind)

    @property
    @abstractmethod
    def dataset(self) -> str:
        """Which data file belongs to it (key of `minbert_fast.data.FORMATS`); empty for a task that has none of its own."""

    @property
    def predicts(self) -> bool:
        """Whether it has dev scores and predictions; else it only trains, on what others have (`sources`)."""
        return bool(self.dataset)

    @property
    def sources(self) -> tuple[str, ...]:
        """Whose training files it learns from (keys of `minbert_fast.data.FORMATS`)."""
        return (self.dataset,)

    def table(self, tables: Sequence[TokenTable]) -> TokenTable:
        """Its rows, of those of its sources that are there (one or more)."""
        (table,) = tables
        return table

    def maker(self, tokenizer: Tokenizer, seed: int) -> Maker | None:
        """What makes its examples of its rows, step by step; None where the rows are the examples."""
        return None

    @property
    @abstractmethod
    def arity(self) -> int:
        """Sequences an example has in the packed batch."""

    @property
    def encoder(self) -> Encoder:
        """Whether sentences of a pair are encoded apart, as one sequence [CLS] a [SEP] b [SEP], or both."""
        return "bi"

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes 0 to C - 1, or None for a regression."""
        return None

    @property
    def pooling(self) -> Pooling | None:
        """How this task's sentences are pooled; None: as the recipe says for all."""
        pooling: Pooling | None = self.options.pooling
        return pooling

    @property
    def weight(self) -> float:
        """Factor on the task's loss."""
        return float(self.options.weight)

    @property
    @abstractmethod
    def primary(self) -> str:
        """The metric by which the task is judged."""

    @abstractmethod
    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> Head:
        """A new head; `shared` holds the tied modules of all heads of one model, by name."""

    @abstractmethod
    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        """The task's metrics, each name starting with the task's."""

    def prediction_file(self, split: str = "dev") -> str:
        """Name of the prediction file, the course's own for the three course tasks."""
        stem = self.stem if self.name == self.kind else self.name
        return f"{stem}-{split}-output.csv"

    def write_predictions(self, path: Path, ids: Sequence[str], values: np.ndarray) -> None:
        """Writes `values` [n] in the course's format, atomically. Raises ValueError where there is no id a value."""
        predictions.write(path, self.header, ids, values)


# ---- Registry ------------------------------------------------------------------------------------------------------

KINDS: dict[str, type[Task]] = {}

K = TypeVar("K", bound=type[Task])


def register(kind: str) -> Callable[[K], K]:
    """Class decorator: makes a Task known as `kind` in recipes."""

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


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds (for the options' own checks)."""
    if not condition:
        raise ConfigError(message)


# ---- Pieces that several heads use ---------------------------------------------------------------------------------

WORDS = "encoder.word_embedding"  # under which the tied modules of a model's heads hold the encoder's own


def check_dropout(p: float) -> None:
    """Raises ConfigError unless p is a probability below 1."""
    require(0 <= p < 1, f"dropout = {p}: expected 0 <= p < 1")


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


def shared_stack(name: str, width: int, depth: int, dropout: float, shared: dict[str, nn.Module]) -> Stack:
    """The stack that all heads of a model know as `name`, made by the first of them. Raises ConfigError on a misfit."""
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
    """Cosine of the angle between rows, [n, D] x [n, D] -> [n]; 0 for a zero row, with a finite gradient."""
    return F.cosine_similarity(u, v, dim=-1, eps=1e-8)


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, [n, D]; a zero row stays zero."""
    return F.normalize(x, dim=-1, eps=1e-8)


def as_numpy(x: Tensor) -> np.ndarray:
    """A tensor's values on the host, in NumPy's dtype of the same kind."""
    array: np.ndarray = x.detach().to("cpu", torch.float32 if x.is_floating_point() else x.dtype).numpy()
    return array
