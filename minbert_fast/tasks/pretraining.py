# SPDX-License-Identifier: Apache-2.0
"""Further pre-training on the tasks' own text: guess masked words (`mlm`), tell which sentences belong together (`nsp`).

Both need no labels: their examples are made anew at each step (`data/pretraining.py`). They train the encoder, mostly in
a stage of their own before the tasks that count; they have no dev scores and no predictions. Where a model's file holds
BERT's own pre-training heads, training goes on from those.

Shapes: n examples, M words to guess, N token rows, H hidden, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import ConfigError
from minbert_fast.data import (
    FORMATS,
    MAIN_TASKS,
    Encoder,
    Maker,
    Masking,
    Pairing,
    Tokenizer,
    TokenTable,
    all_pairs,
    all_sentences,
)
from minbert_fast.data.pretraining import IGNORED
from minbert_fast.model.config import BertConfig, Pooling
from minbert_fast.tasks.base import WORDS, Head, HeadOutput, Task, TaskInput, TaskOptions, register, require


@dataclass(frozen=True)
class TextOptions(TaskOptions):
    """`text` names the data sets whose training files it learns from; those that are not there are left out."""

    text: tuple[str, ...] = MAIN_TASKS

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.text), "text = []: expected at least one data set")
        for name in self.text:
            require(name in FORMATS, f"text: {name!r}: expected some of {', '.join(FORMATS)}")
        require(not self.balanced, "balanced: text has no classes to balance")


class TextTask(Task):
    """A task that only trains, on the text of others."""

    labelled: ClassVar[bool] = False

    @property
    def dataset(self) -> str:
        return ""

    @property
    def sources(self) -> tuple[str, ...]:
        text: tuple[str, ...] = self.options.text
        return text

    @property
    def arity(self) -> int:
        return 1

    @property
    def primary(self) -> str:
        return f"{self.name}_accuracy"

    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        return {}


# ---- Masked words ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedOptions(TextOptions):
    """BERT's own: 15 % of the words."""

    rate: float = 0.15  # share of the words that are to be guessed

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.rate <= 1, f"rate = {self.rate}: expected a share above 0, up to 1")
        require(self.pooling is None, "pooling: words are guessed one by one, from no sentence embedding")


class MaskedHead(Head):
    """Scores of every word of the vocabulary at each masked place, [M, V]: dense, GELU, LayerNorm, output embedding.

    The output embedding is the encoder's word embedding, so that both uses train one matrix (Press & Wolf 2017).
    """

    options: MaskedOptions

    def __init__(self, options: MaskedOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__()
        self.options = options
        if WORDS not in shared:
            shared[WORDS] = nn.Embedding(config.vocab_size, config.hidden_size)
        words = shared[WORDS]
        assert isinstance(words, nn.Embedding)
        self.words = words
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def forward(self, inputs: TaskInput) -> HeadOutput:
        assert inputs.labels is not None
        rows = inputs.cu_seqlens[inputs.first] + inputs.labels[:, 0]
        x = inputs.hidden.index_select(0, rows)  # [M, H]
        x = self.norm(F.gelu(self.dense(x.to(torch.promote_types(x.dtype, torch.float32)))))
        return HeadOutput(F.linear(x, self.words.weight, self.bias))

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        """Mean over the words to guess, as transformers' BertForMaskedLM has it; 0 where there is none."""
        assert labels is not None
        words = labels[:, 1]
        total = F.cross_entropy(output.scores, words, ignore_index=IGNORED, reduction="sum")
        return total / (words != IGNORED).sum().clamp(min=1)

    def predict(self, output: HeadOutput) -> Tensor:
        """The likeliest word at each place [M]."""
        return output.scores.argmax(-1)

    def published(self) -> dict[str, Tensor]:
        return {
            "cls.predictions.transform.dense.weight": self.dense.weight,
            "cls.predictions.transform.dense.bias": self.dense.bias,
            "cls.predictions.transform.LayerNorm.weight": self.norm.weight,
            "cls.predictions.transform.LayerNorm.bias": self.norm.bias,
            "cls.predictions.bias": self.bias,
        }


@register("mlm")
@dataclass(frozen=True)
class MaskedTask(TextTask):
    options: MaskedOptions

    Options: ClassVar[type] = MaskedOptions

    @property
    def pooling(self) -> Pooling:
        return "cls"  # the cheapest, and no pooler takes part: nothing looks at it

    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> MaskedHead:
        return MaskedHead(self.options, config, shared)

    def table(self, tables: Sequence[TokenTable]) -> TokenTable:
        return all_sentences(self.name, tables)

    def maker(self, tokenizer: Tokenizer, seed: int) -> Maker:
        try:
            return Masking(tokenizer, self.options.rate, seed, self.name)
        except ValueError as error:
            raise ConfigError(f"tasks.{self.name}: {error}") from None


# ---- Next sentences -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextSentenceOptions(TextOptions):
    """BERT's own: the pair as one sequence, a linear layer on the pooler's output."""

    text: tuple[str, ...] = ("paraphrase", "similarity")
    pooling: Pooling | None = "pooler"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.text:
            require(FORMATS[name].arity >= 2, f"text: {name!r} has no pairs of sentences")


class NextSentenceHead(Head):
    """Scores [n, 2]: the second sentence belongs to the first, it comes from somewhere else."""

    options: NextSentenceOptions

    def __init__(self, options: NextSentenceOptions, config: BertConfig) -> None:
        super().__init__()
        self.options = options
        self.output = nn.Linear(config.hidden_size, 2)
        nn.init.normal_(self.output.weight, std=config.initializer_range)
        nn.init.zeros_(self.output.bias)

    def forward(self, inputs: TaskInput) -> HeadOutput:
        (x,) = inputs.embeddings
        return HeadOutput(self.output(x))

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return F.cross_entropy(output.scores, labels)

    def predict(self, output: HeadOutput) -> Tensor:
        return output.scores.argmax(-1)

    def published(self) -> dict[str, Tensor]:
        return {"cls.seq_relationship.weight": self.output.weight, "cls.seq_relationship.bias": self.output.bias}


@register("nsp")
@dataclass(frozen=True)
class NextSentenceTask(TextTask):
    options: NextSentenceOptions

    Options: ClassVar[type] = NextSentenceOptions

    @property
    def encoder(self) -> Encoder:
        return "cross"

    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> NextSentenceHead:
        return NextSentenceHead(self.options, config)

    def table(self, tables: Sequence[TokenTable]) -> TokenTable:
        return all_pairs(self.name, tables)

    def maker(self, tokenizer: Tokenizer, seed: int) -> Maker:
        return Pairing(seed, self.name)
