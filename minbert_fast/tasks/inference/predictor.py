# SPDX-License-Identifier: Apache-2.0
"""Uses a trained model: sentence vectors, predictions of its heads, search.

    from minbert_fast import Predictor

    model = Predictor.from_pretrained("runs/first/best")
    model.sentiment(["A gripping film."]), model.similarity([("A man sings.", "Someone is singing.")])
    model.predict("sentiment", frame, text="review")  # a pandas DataFrame in, a DataFrame out

Shapes: n sentences or pairs, H hidden, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch.nn import functional as F

from minbert_fast.common.device import DTYPES, Precision, choose_device, choose_precision
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.files import Table
from minbert_fast.data.tokenizer import Tokenizer, check_sentences
from minbert_fast.model import sentence_modules, weights
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import Pooling
from minbert_fast.model.sentence_modules import SentenceModules
from minbert_fast.model.snapshot import Snapshot
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel, Task
from minbert_fast.tasks.inference import evaluation, forms, sentence_vectors
from minbert_fast.tasks.inference.index import Hit, Index

# A function that gets the number of sentences or examples of each batch, or True for a progress bar (also in notebooks).
Progress = Callable[[int], object] | bool


class Predictions(NamedTuple):
    """A head's predictions for n examples."""

    values: np.ndarray  # [n] on the scale of the task's labels
    probabilities: np.ndarray | None  # [n, C]; None for a regression


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
        self.max_length = positions if max_length is None else min(max_length, positions)
        if self.max_length < 2:
            raise ValueError(f"max_length is {max_length}, expected at least 2 ([CLS] and [SEP])")
        self.prompt = prompt
        self.width = min(truncate_dim or hidden, hidden)  # of a vector
        self.precision = precision
        self.truncated = 0  # sentences and examples so far that were cut to max_length
        self._snapshot = Snapshot(self.encoder, DTYPES[precision])

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
        recipe = Recipe.load(str(directory / "recipe.toml")) if (directory / "heads.safetensors").is_file() else None
        modules = sentence_modules.read(directory)
        if modules is None:
            modules = SentenceModules(directory, recipe.model.pooling if recipe else "mean")
        with warnings.catch_warnings():
            # Many published encoders lack the pooler; models that pool with it always have one.
            warnings.filterwarnings("ignore", message=".* has no pooler")
            heads = MultitaskModel.load(directory) if recipe else None
            encoder = heads.encoder if heads else BertModel.from_pretrained(modules.encoder, local_files_only=True)
        tokenizer = Tokenizer.from_pretrained(modules.encoder)
        if tokenizer.vocab_size > encoder.config.vocab_size:
            words = f"{tokenizer.vocab_size} words for an encoder of {encoder.config.vocab_size}"
            raise ConfigError(f"{modules.encoder}: the tokenizer has {words}")
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
            heads=None if heads is None else heads.to(target),
            pooling=modules.pooling,
            normalize=modules.normalize,
            max_length=modules.max_length or (recipe.data.max_length if recipe else tokenizer.model_max_length),
            prompt=modules.prompt,
            truncate_dim=modules.truncate_dim,
            precision=choose_precision(precision, target),
        )

    def __repr__(self) -> str:
        config = self.encoder.config
        shape = f"BERT of {config.num_hidden_layers} layers, {config.hidden_size} wide, {config.vocab_size:,} words"
        tasks = "no heads" if self.heads is None else f"tasks {', '.join(self.tasks)}"
        vectors = f"{self.pooling} pooling{', normalized' if self.normalize else ''}"
        device = next(self.encoder.parameters()).device.type
        return f"Predictor({shape}; {tasks}; {vectors}; {device}, {self.precision})"

    # ---- Vectors ---------------------------------------------------------------------------------------------------

    def encode(
        self,
        sentences: str | Iterable[str],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """One vector per sentence, fp32 [n, width]; [width] for a single string.

        `pooling` and `normalize` replace the model's own settings. Vectors are scaled before they are truncated
        (`truncate_dim`), as in sentence-transformers. `normalize=True` scales truncated vectors to length 1 again.
        Raises ValueError for a DataFrame, or for a sentence that is not a string or cannot be UTF-8.
        """
        if isinstance(sentences, str):
            row: np.ndarray = self.encode([sentences], pooling=pooling, normalize=normalize, progress=progress)[0]
            return row
        texts = forms.sentences("encode", sentences)
        check_sentences(texts)
        with _reporting(progress, len(texts), " sentences") as report:
            vectors = sentence_vectors.encode(
                self._snapshot,
                [self.prompt + text for text in texts] if self.prompt else texts,
                self.tokenizer,
                pooling=pooling or self.pooling,
                normalize=self.normalize if normalize is None else normalize,
                max_length=self.max_length,
                progress=report,
                report_cut=self._add_truncated,
            )
        if self.width < vectors.shape[1]:
            vectors = np.ascontiguousarray(vectors[:, : self.width])
            if normalize:
                vectors = F.normalize(torch.from_numpy(vectors)).numpy()
        return vectors

    def index(self, corpus: Iterable[str], progress: Progress | None = None) -> Index:
        """Encodes a corpus for `search`. Raises ValueError as `encode` does, and for a single string."""
        texts = forms.sentences("index", corpus)
        return Index(texts, self.encode(texts, normalize=True, progress=progress))

    def search(self, query: str, corpus: Sequence[str] | Index, top: int = 10) -> list[Hit]:
        """The `top` sentences of the corpus whose vectors have the highest cosine with that of `query`, best first.

        For several queries, call `index` first; otherwise each call encodes the corpus. Raises ValueError as `encode` does,
        and for a `top` that is no whole number from 0.
        """
        ready = corpus if isinstance(corpus, Index) else self.index(corpus)
        return ready.nearest(self.encode([query], normalize=True), top)[0]

    # ---- Heads -----------------------------------------------------------------------------------------------------

    def sentiment(self, sentences: Sequence[str]) -> np.ndarray:
        """Sentiment classes [n], 0 (most negative) to 4. Raises ConfigError for a model without such a head."""
        return self._values("sentiment", sentences)

    def paraphrase(self, pairs: Sequence[forms.Pair]) -> np.ndarray:
        """1.0 if the sentences of a pair have the same meaning, else 0.0, [n]. Raises ConfigError without such a head."""
        return self._values("paraphrase", pairs)

    def similarity(self, pairs: Sequence[forms.Pair]) -> np.ndarray:
        """Similarity of the sentences of a pair, 0 to 5, [n]. Raises ConfigError without such a head."""
        return self._values("similarity", pairs)

    def _values(self, kind: str, examples: Any) -> np.ndarray:
        task = self.task_of(kind)
        if forms.is_frame(examples):
            raise ValueError(f"{kind} takes lists: for a DataFrame call predict({task!r}, frame, text=...)")
        found: Predictions = self.predict(task, examples)
        return found.values

    @overload
    def predict(
        self, task: str, frame: forms.DataFrame, /, *, text: str | Sequence[str] | None = None, probabilities: bool = False,
        progress: Progress | None = None,
    ) -> Any: ...  # fmt: skip

    @overload
    def predict(
        self, task: str, /, *examples: Sequence[Any], probabilities: Literal[False] = False,
        progress: Progress | None = None,
    ) -> Predictions: ...  # fmt: skip

    @overload
    def predict(
        self, task: str, /, *examples: Sequence[Any], probabilities: Literal[True], progress: Progress | None = None
    ) -> np.ndarray: ...

    def predict(
        self,
        task: str,
        /,
        *examples: Any,
        text: str | Sequence[str] | None = None,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Predictions of the head of `task` for n examples.

        The examples are a list of sentences, a list of pairs, one list [n] per sentence of an example, or a pandas
        DataFrame whose columns `text` hold the sentences (default: those of the training file, or the usual names of files).
        Returns `Predictions`; with `probabilities=True` those alone, [n, C]. A DataFrame gives a DataFrame with the same
        index: `prediction` as data files write labels, and `probability_<class>` for each class.
        Raises ConfigError for an unknown task; ValueError for examples of another form, or for probabilities of a task
        without classes.
        """
        if task not in self.tasks:
            raise ConfigError(f"this model has no {task} head (it has {', '.join(self.tasks)})")
        found = self.tasks[task]
        names = found.class_names
        if probabilities and names is None:
            raise ValueError(f"{task} predicts no classes, so it has no probabilities")
        frame = next(filter(forms.is_frame, examples), None)
        if frame is None and text is not None:
            raise ValueError("text names columns of a DataFrame, and the examples are none")
        if frame is not None and len(examples) > 1:
            raise ValueError(f"{task} takes one DataFrame, or lists")
        texts = (
            forms.columns(task, found.num_texts, examples) if frame is None else forms.frame_columns(found, frame, text)
        )
        count = len(texts[0])
        if count:
            table = Table(task, Path(), texts, None, [""] * count, np.arange(count))
            result = self.predict_table(task, table, progress)
        else:  # the shapes and types of one's predictions
            table = Table(task, Path(), ([""],) * len(texts), None, [""], np.arange(1))
            values, shares = self.predict_table(task, table)
            result = Predictions(values[:0], None if shares is None else shares[:0])
        if frame is None:
            return result.probabilities if probabilities else result
        columns = {} if probabilities else {"prediction": found.as_labels(result.values)}
        if result.probabilities is not None:
            columns |= {f"probability_{n}": share for n, share in zip(names or (), result.probabilities.T, strict=True)}
        return type(frame)(columns, frame.index)

    def predict_table(self, task: str, table: Table, progress: Progress | None = None) -> Predictions:
        """Predictions of the head of `task` for the rows of a data file."""
        model, rows = self.multitask(), tokenize_table(table, self.tokenizer)
        self._add_truncated(rows.count_truncated(self.max_length, model.tasks[task].encoder))
        with _reporting(progress, len(rows), " examples") as report:
            found = evaluation.predict(model, task, rows, self._snapshot, max_length=self.max_length, progress=report)
        return Predictions(*found)

    def _add_truncated(self, count: int) -> None:
        self.truncated += count

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks that the model can predict, by name. Raises ConfigError for a model without heads."""
        return {name: task for name, task in self.multitask().tasks.items() if task.predicts}

    def task_of(self, kind: str) -> str:
        """The name of the model's task of this kind: `kind` itself, else the first. Raises ConfigError if there is none."""
        if kind in self.tasks:
            return kind
        names = [name for name, task in self.tasks.items() if kind in (task.preset, task.kind)]
        if not names:
            raise ConfigError(f"this model has no {kind} head (it has {', '.join(self.tasks)})")
        return names[0]

    def multitask(self) -> MultitaskModel:
        """The encoder with its heads. Raises ConfigError for a model without heads."""
        if self.heads is None:
            raise ConfigError("this model has no heads: it is an encoder alone, and only encode and search work")
        return self.heads


@contextmanager
def _reporting(progress: Progress | None, total: int, unit: str) -> Iterator[Callable[[int], object] | None]:
    """The function that gets the size of each batch: the caller's, that of a progress bar, or None."""
    if progress is not True:
        yield progress or None
        return
    from tqdm.auto import tqdm  # looks for a notebook when it is imported

    with tqdm(total=total, unit=unit) as bar:
        yield bar.update


__all__ = ["Hit", "Index", "Predictions", "Predictor"]
