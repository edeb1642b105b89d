# SPDX-License-Identifier: Apache-2.0
"""The head of tasks that compare two texts; options select every published variant.

    embeddings u, v -> [dropout] -> [shared stack] -> [projection] -> cosine                        -> score
                                                                   -> features, [dropout], linear   -> score or classes

With `encoder = "cross"` the only feature is the embedding of the joint sequence. With "both" the linear head gets the joint
embedding as one more feature; the cosine head adds a linear function of it to its score, which is initially zero.

Labels are scaled to t from 0 (different) to 1 (same meaning), and the head predicts t: `pair-classification` reads it as
the probability of the second of two classes, `pair-regression` scales it back.

Shapes: n examples, H hidden, D width of a vector, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import check
from minbert_fast.data.tokens import Encoder
from minbert_fast.model.config import BertConfig
from minbert_fast.ops.cosine import cosine
from minbert_fast.ops.cross_entropy import binary_cross_entropy, cross_entropy
from minbert_fast.tasks import losses
from minbert_fast.tasks.base import HeadOutput, Task, TaskInput
from minbert_fast.tasks.kinds.graded import from_unit, to_unit
from minbert_fast.tasks.stack import StackHead, StackOptions, shared_stack

Feature = Literal["u", "v", "abs_diff", "product", "cosine"]
PairLoss = Literal["bce", "cross_entropy", "ordinal", "mse", "l1", "hinge", "cosine_embedding", "cosent", "ranking"]
FEATURES: dict[Feature, Callable[[Tensor, Tensor], Tensor]] = {
    "u": lambda u, v: u,
    "v": lambda u, v: v,
    "abs_diff": lambda u, v: (u - v).abs(),
    "product": lambda u, v: u * v,
    "cosine": lambda u, v: cosine(u, v)[:, None],
}
VECTOR_LOSSES = ("cosine_embedding", "cosent", "ranking")  # losses of the vectors instead of the score


@dataclass(frozen=True)
class PairOptions(StackOptions):
    """Options of a task on pairs, in addition to those of every task."""

    encoder: Encoder = "bi"  # encode the sentences separately, jointly ("cross"), or both
    head: Literal["linear", "cosine"] = "linear"  # on `features`, or of the two embeddings
    features: tuple[Feature, ...] = ("u", "v", "abs_diff", "product")  # input of the linear head, concatenated
    project: bool | int = False  # a linear layer on each vector first: true keeps the width, a number sets it
    dropout_at: tuple[Literal["embedding", "features"], ...] = ("embedding",)  # where the dropout acts
    loss: PairLoss = "bce"
    labels: Literal["unit", "signed", "raw"] = "unit"  # targets of mse and l1: in [0, 1], in [-1, 1], as in the file
    scale: float = 1.0  # score = scale * cosine + offset
    offset: float = 0.0  # see scale
    calibrated: bool = False  # learn scale and offset, starting from these values
    margin: float = 0.0  # of cosine_embedding
    temperature: float = 0.05  # of cosent and ranking; 1: none
    auxiliary: Mapping[str, float] = field(default_factory=dict)  # weights of cosine_embedding, cosent, ranking

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.features), "features = []: expected at least one")
        check(len(set(self.features)) == len(self.features), f"features = {list(self.features)}: one is named twice")
        wide = isinstance(self.project, bool) or 1 <= self.project < 2**20
        check(wide, f"project = {self.project}: expected true, false or a width")
        check(self.temperature > 0, f"temperature = {self.temperature}: expected above 0")
        check(-1 <= self.margin <= 1, f"margin = {self.margin}: expected a cosine, -1 to 1")
        for name, weight in self.auxiliary.items():
            check(name in VECTOR_LOSSES, f"auxiliary.{name}: expected one of {', '.join(VECTOR_LOSSES)}")
            check(weight >= 0, f"auxiliary.{name} = {weight}: expected 0 or more")
        if self.head == "cosine":
            check(self.loss != "cross_entropy", 'loss = "cross_entropy" needs head = "linear"')
            check("features" not in self.dropout_at, 'dropout_at: head = "cosine" has no "features"')
        else:
            check(self.loss not in VECTOR_LOSSES, f'loss = "{self.loss}" needs head = "cosine"')
            check(not self.calibrated, 'calibrated = true needs head = "cosine"')
        if self.encoder == "cross":
            check(self.head == "linear", 'encoder = "cross" needs head = "linear", there is no second vector')
            check(not self.auxiliary, 'auxiliary: encoder = "cross" has no two vectors to compare')

    def unused(self) -> dict[str, str]:
        chosen = {self.loss, *self.auxiliary}
        rules = {
            "features": (self.head == "linear" and self.encoder != "cross", 'head = "linear" on two vectors'),
            "labels": (not chosen.isdisjoint(("mse", "l1")), 'loss = "mse" and "l1"'),
            "scale": (self.head == "cosine", 'head = "cosine"'),
            "offset": (self.head == "cosine", 'head = "cosine"'),
            "dropout": (bool(self.dropout_at or self.shared_layers), "dropout_at"),
            "margin": ("cosine_embedding" in chosen, "cosine_embedding"),
            "temperature": (not chosen.isdisjoint(("cosent", "ranking")), "cosent and ranking"),
        }
        return super().unused() | {key: reader for key, (read, reader) in rules.items() if not read}

    def once(self) -> tuple[str, ...]:
        return (*super().once(), *(("scale", "offset") if self.calibrated else ()))  # where the learning starts


class PairHead(StackHead):
    """Compares two sentences. `levels` is the number of whole labels, the classes of the losses over classes."""

    options: PairOptions

    def __init__(self, options: PairOptions, config: BertConfig, shared: dict[str, nn.Module], levels: int) -> None:
        super().__init__()
        self.options = options
        width = config.hidden_size
        self.stack = shared_stack(options, width, shared)
        self.projection: nn.Linear | None = None
        if options.project is not False:
            wanted = width if options.project is True else options.project
            self.projection = nn.Linear(width, wanted)
            width = wanted
        self.thresholds = losses.initial_thresholds(levels) if options.loss == "ordinal" else None
        if options.head == "linear":
            inputs = sum(1 if f == "cosine" else width for f in options.features)
            inputs = {"bi": inputs, "cross": width, "both": inputs + width}[options.encoder]
            self.output = nn.Linear(inputs, levels if options.loss == "cross_entropy" else 1)
            return
        if options.calibrated:
            self.factor = nn.Parameter(torch.tensor(float(options.scale)))
            self.offset = nn.Parameter(torch.tensor(float(options.offset)))
        if options.encoder == "both":
            self.together = nn.Linear(width, 1)
            nn.init.zeros_(self.together.weight)
            nn.init.zeros_(self.together.bias)

    @property
    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """The labels that t = 0 and t = 1 stand for."""

    def forward(self, inputs: TaskInput) -> HeadOutput:
        options = self.options
        embedded = tuple(self._vector(x) for x in inputs.embeddings)  # each [n, D]
        vectors = () if options.encoder == "cross" else embedded[:2]
        joint = () if options.encoder == "bi" else embedded[-1:]
        if options.head == "cosine":
            factor, offset = (self.factor, self.offset) if options.calibrated else (options.scale, options.offset)
            score = cosine(*vectors)
            if options.calibrated or (factor, offset) != (1.0, 0.0):
                score = score * factor + offset
            for x in joint:
                score = score + self.together(x).squeeze(-1)
            return HeadOutput(score, vectors)
        features = [FEATURES[name](*vectors) for name in options.features] if vectors else []
        x = torch.cat([*features, *joint], dim=-1)
        if "features" in options.dropout_at:
            x = F.dropout(x, options.dropout, self.training)
        return HeadOutput(self.output(x).squeeze(-1), vectors)  # [n], or [n, C]

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        assert labels is not None
        t = to_unit(labels.to(output.scores.dtype), self.limits)
        total = self.main_loss(output, t)
        for name, weight in self.options.auxiliary.items():
            total = total + weight * self.loss_named(name, output, t)
        return total

    def main_loss(self, output: HeadOutput, t: Tensor) -> Tensor:
        """The mean of the loss that the options name; targets t [n]."""
        return self.loss_named(self.options.loss, output, t)

    def loss_named(self, name: str, output: HeadOutput, t: Tensor) -> Tensor:
        """The mean of loss `name`; targets t [n]."""
        s, options = output.scores, self.options
        if name == "bce":
            return binary_cross_entropy(s, t)
        if name == "cross_entropy":
            return cross_entropy(s, self.nearest_level(t))
        if name == "ordinal":
            assert self.thresholds is not None
            return losses.ordinal(s, self.thresholds, t * len(self.thresholds)).mean()
        if name == "hinge":
            return losses.hinge(s, 2 * t - 1)
        if name in ("mse", "l1"):
            if options.labels == "raw":
                t = from_unit(t, self.limits)
            target = 2 * t - 1 if options.labels == "signed" else t
            return F.mse_loss(s, target) if name == "mse" else F.l1_loss(s, target)
        u, v = output.vectors
        if name == "cosine_embedding":
            return losses.cosine_embedding(u, v, t, options.margin)
        loss = losses.cosent if name == "cosent" else losses.ranking
        return loss(u, v, t, options.temperature)

    def nearest_level(self, t: Tensor) -> Tensor:
        """The nearest whole label, counted from 0, of targets t [n]; int64."""
        low, high = self.limits
        return (t * (high - low)).round().long()

    def logits(self, output: HeadOutput) -> Tensor | None:
        if self.options.loss == "cross_entropy":
            return output.scores
        if self.options.loss == "bce":
            return torch.stack([torch.zeros_like(output.scores), output.scores], dim=-1)
        return None

    def similarity(self, output: HeadOutput, bounded: bool = True) -> Tensor:
        """The predicted t: similarity of the sentences, [n]; `bounded`: from 0 to 1."""
        scores, options = output.scores, self.options
        if options.loss == "cross_entropy":
            levels = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
            return scores.softmax(-1) @ levels / (scores.shape[-1] - 1)
        if options.loss == "ordinal":
            assert self.thresholds is not None
            return losses.ordinal_mean(scores, self.thresholds) / len(self.thresholds)
        if options.loss == "bce":
            return scores.sigmoid()
        regression = options.loss in ("mse", "l1")
        if regression and options.labels == "raw":
            scores = to_unit(scores, self.limits)
        signed = options.loss in ("hinge", "cosent", "ranking") or (regression and options.labels == "signed")
        scores = (scores + 1) / 2 if signed else scores
        return scores.clamp(0.0, 1.0) if bounded else scores

    def _vector(self, x: Tensor) -> Tensor:
        if "embedding" in self.options.dropout_at:
            x = F.dropout(x, self.options.dropout, self.training)
        if self.stack is not None:
            x = self.stack(x)
        return x if self.projection is None else self.projection(x)


class PairTask(Task):
    """A task whose examples have two texts."""

    @property
    def num_texts(self) -> int:
        return 2

    @property
    def encoder(self) -> Encoder:
        encoder: Encoder = self.options.encoder
        return encoder

    @property
    def compares_examples(self) -> bool:
        return not {"cosent", "ranking"}.isdisjoint((self.options.loss, *self.options.auxiliary))
