# SPDX-License-Identifier: Apache-2.0
"""Uses a trained model: sentence vectors, predictions of its heads, search.

    from minbert_fast import Predictor

    model = Predictor.from_pretrained("runs/first/best")
    model.sentiment(["A gripping film."]), model.similarity([("A man sings.", "Someone is singing.")])

Shapes: n sentences or pairs, H hidden, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from minbert_fast.common.device import DTYPES, Precision, choose_device, choose_precision
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.files import Table
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.model import inference, sentence_modules, weights
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import Pooling
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel, Task, evaluation

Pair = tuple[str, str] | Sequence[str]
Progress = Callable[[int], object]  # gets the number of sentences or examples of each batch


class Hit(NamedTuple):
    """A search result."""

    row: int  # in the corpus, from 0
    score: float  # cosine
    text: str


class Predictions(NamedTuple):
    """A head's predictions for n examples."""

    values: np.ndarray  # [n] on the scale of the task's labels
    probabilities: np.ndarray | None  # [n, C]; None for a regression


@dataclass(frozen=True)
class Index:
    """Sentences and their vectors, for repeated searches."""

    texts: Sequence[str]
    vectors: np.ndarray  # [n, H] fp32, of length 1

    def nearest(self, vectors: np.ndarray, top: int) -> list[list[Hit]]:
        """The `top` sentences of the highest cosine, best first, for each of `vectors` [q, H] of length 1."""
        found = []
        top = min(top, len(self.texts))
        for begin in range(0, len(vectors), 256):  # limits the memory of the scores
            scores = vectors[begin : begin + 256] @ self.vectors.T
            for row in scores:
                best = np.argpartition(-row, top - 1)[:top] if top else np.empty(0, np.int64)
                order = best[np.lexsort((best, -row[best]))]  # among equal scores, the earlier sentence first
                found.append([Hit(int(i), float(row[i]), self.texts[i]) for i in order])
        return found


class Predictor:
    """A trained model on one device, in evaluation mode. It keeps the weights that the model has at construction."""

    def __init__(
        self,
        encoder: BertModel,
        tokenizer: Tokenizer,
        *,
        heads: MultitaskModel | None = None,
        pooling: Pooling = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        prompt: str = "",
        truncate_dim: int | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.encoder = encoder.eval()
        self.tokenizer = tokenizer
        self.heads = None if heads is None else heads.eval()
        self.pooling: Pooling = pooling
        self.normalize = normalize
        positions, hidden = encoder.config.max_position_embeddings, encoder.config.hidden_size
        self.max_length = min(max_length or positions, positions)
        self.prompt = prompt
        self.width = min(truncate_dim or hidden, hidden)  # of a vector
        self.precision = precision
        self._snapshot = inference.Snapshot(self.encoder, DTYPES[precision])

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "auto",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        local_files_only: bool = False,
    ) -> Predictor:
        """Reads a trained model (`best/`, `last/`), a sentence-transformers or Hugging Face directory, or a hub name.

        Heads are read if the model has any. The pooling is that of `modules.json`, else that of training, else the mean.
        `auto` precision is bf16 if the hardware multiplies it natively, else fp32. Raises ConfigError, WeightsError or
        DataError, one line each.
        """
        target = choose_device(device)
        directory = weights.resolve(str(name_or_path), local_files_only=local_files_only)
        if not directory.is_dir():
            raise ConfigError(f"{directory}: expected the directory of a model")
        modules = sentence_modules.read(directory)
        source = directory if modules is None else modules.encoder
        recipe, heads = None, None
        with warnings.catch_warnings():
            # Many published encoders lack the pooler; models that pool with it always have one.
            warnings.filterwarnings("ignore", message=".* has no pooler")
            if (directory / "heads.safetensors").is_file():
                recipe = Recipe.load(str(directory / "recipe.toml"))
                heads = MultitaskModel.load(directory).to(target)
            encoder = BertModel.from_pretrained(source, local_files_only=True) if heads is None else heads.encoder
        tokenizer = Tokenizer.from_pretrained(source)
        if tokenizer.vocab_size > encoder.config.vocab_size:
            words = f"{tokenizer.vocab_size} words for an encoder of {encoder.config.vocab_size}"
            raise ConfigError(f"{source}: the tokenizer has {words}")
        pooling, normalize, prompt = recipe.model.pooling if recipe else "mean", False, ""
        max_length = recipe.data.max_length if recipe else tokenizer.model_max_length
        truncate_dim = None
        if modules is not None:
            pooling, normalize, prompt = modules.pooling, modules.normalize, modules.prompt
            max_length, truncate_dim = modules.max_length or max_length, modules.truncate_dim
            if modules.lowercase and not tokenizer.vocabulary.lowercase:
                # A tokenizer without lower-casing keeps accents by default, so this one keeps them too.
                kept = tokenizer.vocabulary
                lowered = replace(kept, lowercase=True, strip_accents=bool(kept.strip_accents))
                tokenizer = Tokenizer(lowered, tokenizer.model_max_length)
            if modules.pooler is not None:
                encoder.pooler_dense.load_state_dict(modules.pooler)
        return cls(
            encoder.to(target),
            tokenizer,
            heads=heads,
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            prompt=prompt,
            truncate_dim=truncate_dim,
            precision=choose_precision(precision, target),
        )

    # ---- Vectors ---------------------------------------------------------------------------------------------------

    def encode(
        self,
        sentences: Sequence[str],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """One vector per sentence, fp32 [n, width]; `pooling` and `normalize` replace the model's own settings.

        Vectors are scaled before they are truncated (`truncate_dim`), as in sentence-transformers. `normalize=True` scales
        truncated vectors to length 1 again. Raises ValueError for a single string.
        """
        if isinstance(sentences, str):
            raise ValueError("encode expects a list of sentences, not a string")
        texts = [self.prompt + sentence for sentence in sentences] if self.prompt else sentences
        vectors = inference.encode(
            self._snapshot,
            texts,
            self.tokenizer,
            pooling=pooling or self.pooling,
            normalize=self.normalize if normalize is None else normalize,
            max_length=self.max_length,
            progress=progress,
        )
        if self.width < vectors.shape[1]:
            vectors = np.ascontiguousarray(vectors[:, : self.width])
            if normalize:
                vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def index(self, corpus: Sequence[str], progress: Progress | None = None) -> Index:
        """Encodes a corpus for `search`."""
        return Index(corpus, self.encode(corpus, normalize=True, progress=progress))

    def search(self, query: str, corpus: Sequence[str] | Index, top: int = 10) -> list[Hit]:
        """The `top` sentences of the corpus whose vectors have the highest cosine with that of `query`, best first.

        For several queries, call `index` first; otherwise each call encodes the corpus.
        """
        ready = corpus if isinstance(corpus, Index) else self.index(corpus)
        return ready.nearest(self.encode([query], normalize=True), top)[0]

    # ---- Heads -----------------------------------------------------------------------------------------------------

    def sentiment(self, sentences: Sequence[str]) -> np.ndarray:
        """Sentiment classes [n], 0 (most negative) to 4. Raises ConfigError for a model without such a head."""
        return self.predict(self.task_of("sentiment"), sentences).values

    def paraphrase(self, pairs: Sequence[Pair]) -> np.ndarray:
        """1.0 if the sentences of a pair have the same meaning, else 0.0, [n]. Raises ConfigError without such a head."""
        return self.predict(self.task_of("paraphrase"), *columns(pairs)).values

    def similarity(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Similarity of the sentences of a pair, 0 to 5, [n]. Raises ConfigError without such a head."""
        return self.predict(self.task_of("similarity"), *columns(pairs)).values

    def predict(self, task: str, *sentences: Sequence[str], progress: Progress | None = None) -> Predictions:
        """Predictions of the head of `task`. The arguments are one list [n] of texts per sentence of an example.

        Raises ConfigError for an unknown task, ValueError for a wrong number of lists or lists of different lengths.
        """
        if task not in self.tasks:
            raise ConfigError(f"this model has no {task} head (it has {', '.join(self.tasks)})")
        texts = self.tasks[task].num_texts
        if len(sentences) != texts or len({len(column) for column in sentences}) > 1:
            raise ValueError(f"{task} takes {texts} lists of sentences, equally long")
        if any(isinstance(column, str) for column in sentences):
            raise ValueError(f"{task} takes lists of sentences, not a string")
        count = len(sentences[0])
        table = Table(task, Path(), tuple(map(list, sentences)), None, [""] * count, np.arange(count))
        return self.predict_table(task, table, progress)

    def predict_table(self, task: str, table: Table, progress: Progress | None = None) -> Predictions:
        """Predictions of the head of `task` for the rows of a data file."""
        model, rows = self._model(), tokenize_table(table, self.tokenizer)
        found = evaluation.predict(model, task, rows, self._snapshot, max_length=self.max_length, progress=progress)
        return Predictions(*found)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks that the model can predict, by name. Raises ConfigError for a model without heads."""
        return {name: task for name, task in self._model().tasks.items() if task.predicts}

    def task_of(self, kind: str) -> str:
        """The name of the model's task of this kind: `kind` itself, else the first. Raises ConfigError if there is none."""
        if kind in self.tasks:
            return kind
        names = [name for name, task in self.tasks.items() if kind in (task.preset, task.kind)]
        if not names:
            raise ConfigError(f"this model has no {kind} head (it has {', '.join(self.tasks)})")
        return names[0]

    def _model(self) -> MultitaskModel:
        if self.heads is None:
            raise ConfigError("this model has no heads: it is an encoder alone, and only encode and search work")
        return self.heads


def columns(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """The first sentences and the second sentences of pairs. Raises ValueError that names the first invalid pair."""
    for number, pair in enumerate(pairs):
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"pair {number} is {pair!r:.60}, expected two sentences")
    return [first for first, _ in pairs], [second for _, second in pairs]


__all__ = ["Hit", "Index", "Predictions", "Predictor"]
