# SPDX-License-Identifier: Apache-2.0
"""Further pre-training on text: masked language modelling (`masked-lm`), next-sentence prediction (`next-sentence`).

Neither needs labels: their examples are generated at each step (`data/pretraining.py`). They train the encoder, usually in
a stage before the main tasks, and have no dev scores or predictions. If a model's file contains BERT's own pre-training
heads, training starts from those.

Shapes: n examples, M masked words, N token rows, H hidden, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import ConfigError, check
from minbert_fast.data.formats import FORMATS
from minbert_fast.data.pretraining import (
    IGNORED,
    ExampleGenerator,
    SentencePairing,
    WordMasking,
    collect_pairs,
    collect_sentences,
)
from minbert_fast.data.source import Source
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import Encoder, TokenTable
from minbert_fast.model.config import BertConfig, Pooling
from minbert_fast.ops.cross_entropy import cross_entropy
from minbert_fast.tasks.base import WORD_EMBEDDING, Head, HeadOutput, Task, TaskInput, TaskOptions, register


@dataclass(frozen=True)
class TextOptions(TaskOptions):
    """`data` are files of text, `text` names data sets whose training files provide more; missing ones are ignored."""

    text: tuple[str, ...] = ()  # data sets whose training texts to learn from

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.text or self.data), "text = []: expected at least one data set, or `data` with files of text")
        for name in self.text:
            check(name in FORMATS, f"text: {name!r}: expected some of {', '.join(FORMATS)}")
        check(not self.draw.by_class, "balanced, per_class: text has no classes")

    def unused(self) -> dict[str, str]:
        return super().unused() | dict.fromkeys(("dev_fraction", "stem", "header"), "tasks with predictions")


class TextTask(Task):
    """A task that only trains, on text without labels."""

    labelled: ClassVar[bool] = False
    predicts: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data sets that provide text; a row has the texts of its layout or of `text`, by default one."""
        return (*super().sources, *(Source(layout=name) for name in self.options.text))

    def table(self, tables: Sequence[TokenTable]) -> TokenTable:
        """Every text of every source."""
        return collect_sentences(self.name, tables)


# ---- Masked words ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedOptions(TextOptions):
    """BERT's own setting: 15 % of the words."""

    rate: float = 0.15  # share of the words that are masked

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.rate <= 1, f"rate = {self.rate}: expected a share above 0, up to 1")
        check(self.pooling is None, "pooling: masked words are predicted from token rows, without pooling")


class MaskedHead(Head):
    """Scores [M, V] of every word of the vocabulary at each masked position: dense, GELU, LayerNorm, output embedding.

    The output embedding is the encoder's word embedding, so both uses train one matrix (Press & Wolf 2017).
    """

    options: MaskedOptions

    def __init__(self, options: MaskedOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__()
        self.options = options
        if WORD_EMBEDDING not in shared:
            shared[WORD_EMBEDDING] = nn.Embedding(config.vocab_size, config.hidden_size)
        words = shared[WORD_EMBEDDING]
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
        """The mean over the masked words, as in transformers' BertForMaskedLM; 0 without masked words."""
        assert labels is not None
        words = labels[:, 1]
        total = F.cross_entropy(output.scores, words, ignore_index=IGNORED, reduction="sum")
        return total / (words != IGNORED).sum().clamp(min=1)

    def published_parameters(self) -> dict[str, Tensor]:
        return {
            "cls.predictions.transform.dense.weight": self.dense.weight,
            "cls.predictions.transform.dense.bias": self.dense.bias,
            "cls.predictions.transform.LayerNorm.weight": self.norm.weight,
            "cls.predictions.transform.LayerNorm.bias": self.norm.bias,
            "cls.predictions.bias": self.bias,
        }


@register("masked-lm")
class MaskedTask(TextTask):
    Options: ClassVar[type] = MaskedOptions
    head_class: ClassVar[type] = MaskedHead

    @property
    def pooling(self) -> Pooling:
        return "cls"  # the head ignores sentence embeddings; this is the cheapest pooling, without the pooler's weights

    def example_generator(self, tokenizer: Tokenizer, seed: int) -> ExampleGenerator:
        try:
            return WordMasking(tokenizer, self.options.rate, seed, self.name)
        except ValueError as error:
            raise ConfigError(f"tasks.{self.name}: {error}") from None


# ---- Next sentences -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextSentenceOptions(TextOptions):
    """BERT's own setting: the pair as one sequence, a linear layer on the pooler's output."""

    pooling: Pooling | None = "pooler"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.text:
            check(FORMATS[name].arity >= 2, f"text: {name!r} has no pairs of sentences")


class NextSentenceHead(Head):
    """Scores [n, 2]: the second sentence follows the first, or it comes from another row."""

    options: NextSentenceOptions

    def __init__(self, options: NextSentenceOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
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
        return cross_entropy(output.scores, labels)

    def published_parameters(self) -> dict[str, Tensor]:
        return {"cls.seq_relationship.weight": self.output.weight, "cls.seq_relationship.bias": self.output.bias}


@register("next-sentence")
class NextSentenceTask(TextTask):
    Options: ClassVar[type] = NextSentenceOptions
    head_class: ClassVar[type] = NextSentenceHead

    @property
    def encoder(self) -> Encoder:
        return "cross"

    def table(self, tables: Sequence[TokenTable]) -> TokenTable:
        """Pairs of texts: the first two of a row, or of a source with one text per row, each row and the next."""
        return collect_pairs(self.name, tables)

    def example_generator(self, tokenizer: Tokenizer, seed: int) -> ExampleGenerator:
        return SentencePairing(seed, self.name)
