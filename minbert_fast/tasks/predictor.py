# SPDX-License-Identifier: Apache-2.0
"""Uses a trained model: sentence vectors, predictions of its heads, search.

    from minbert_fast import Predictor

    model = Predictor.from_pretrained("runs/first/best")
    model.sentiment(["A gripping film."]), model.similarity([("A man sings.", "Someone is singing.")])
    model.predict("sentiment", frame, text="review")  # a pandas DataFrame in, a DataFrame out

Shapes: n sentences or pairs, H hidden, C classes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, overload

import numpy as np
import torch
from torch.nn import functional as F

from minbert_fast.common.device import DTYPES, Precision, choose_device, choose_precision
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.columns import usual_names
from minbert_fast.data.files import Table
from minbert_fast.data.tokenizer import Tokenizer, check_sentences
from minbert_fast.model import sentence_modules, weights
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import Pooling
from minbert_fast.model.sentence_modules import SentenceModules
from minbert_fast.model.snapshot import Snapshot
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel, Task, evaluation, sentence_vectors

Pair = tuple[str, str] | Sequence[str]
# A function that gets the number of sentences or examples of each batch, or True for a progress bar (also in notebooks).
Progress = Callable[[int], object] | bool


class DataFrame(Protocol):
    """The attributes of a pandas DataFrame that this package reads. It does not import pandas."""

    columns: Any
    index: Any
    iloc: Any

    def __getitem__(self, column: Any, /) -> Any: ...


class Hit(NamedTuple):
    """A search result."""

    row: int  # in the corpus, from 0
    score: float  # cosine
    text: str


class Predictions(NamedTuple):
    """A head's predictions for n examples."""

    values: np.ndarray  # [n] on the scale of the task's labels
    probabilities: np.ndarray | None  # [n, C]; None for a regression


@dataclass(frozen=True, repr=False)
class Index:
    """Sentences and their vectors, for repeated searches."""

    texts: Sequence[str]
    vectors: np.ndarray  # [n, H] fp32, of length 1

    def __repr__(self) -> str:
        return f"Index({len(self.texts):,} sentences, vectors of {self.vectors.shape[1]})"

    def nearest(self, vectors: np.ndarray, top: int) -> list[list[Hit]]:
        """The `top` sentences of the highest cosine, best first, for each of `vectors` [q, H] of length 1.

        Fewer if there are no more. Raises ValueError for a `top` that is no whole number from 0.
        """
        if not isinstance(top, int | np.integer) or top < 0:
            raise ValueError(f"top is {top!r}, expected a whole number, 0 or more")
        top = min(int(top), len(self.texts))
        if not top:
            return [[] for _ in vectors]
        found = []
        for begin in range(0, len(vectors), 256):  # limits the memory of the scores
            for scores in vectors[begin : begin + 256] @ self.vectors.T:
                best = np.flatnonzero(-scores <= np.partition(-scores, top - 1)[top - 1])  # more than `top` if equal
                best = best[np.argsort(-scores[best], kind="stable")][:top]  # of equal scores, the earlier sentence
                found.append([Hit(i, float(scores[i]), self.texts[i]) for i in best.tolist()])
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
        self.max_length = positions if max_length is None else min(max_length, positions)
        if self.max_length < 2:
            raise ValueError(f"max_length is {max_length}, expected at least 2 ([CLS] and [SEP])")
        self.prompt = prompt
        self.width = min(truncate_dim or hidden, hidden)  # of a vector
        self.precision = precision
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
        texts = _sentences("encode", sentences)
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
            )
        if self.width < vectors.shape[1]:
            vectors = np.ascontiguousarray(vectors[:, : self.width])
            if normalize:
                vectors = F.normalize(torch.from_numpy(vectors)).numpy()
        return vectors

    def index(self, corpus: Iterable[str], progress: Progress | None = None) -> Index:
        """Encodes a corpus for `search`. Raises ValueError as `encode` does, and for a single string."""
        texts = _sentences("index", corpus)
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

    def paraphrase(self, pairs: Sequence[Pair]) -> np.ndarray:
        """1.0 if the sentences of a pair have the same meaning, else 0.0, [n]. Raises ConfigError without such a head."""
        return self._values("paraphrase", pairs)

    def similarity(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Similarity of the sentences of a pair, 0 to 5, [n]. Raises ConfigError without such a head."""
        return self._values("similarity", pairs)

    def _values(self, kind: str, examples: Any) -> np.ndarray:
        task = self.task_of(kind)
        if _is_frame(examples):
            raise ValueError(f"{kind} takes lists: for a DataFrame call predict({task!r}, frame, text=...)")
        found: Predictions = self.predict(task, examples)
        return found.values

    @overload
    def predict(
        self, task: str, frame: DataFrame, /, *, text: str | Sequence[str] | None = None, probabilities: bool = False,
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
        frame = next(filter(_is_frame, examples), None)
        if frame is None and text is not None:
            raise ValueError("text names columns of a DataFrame, and the examples are none")
        if frame is not None and len(examples) > 1:
            raise ValueError(f"{task} takes one DataFrame, or lists")
        texts = _columns(task, found.num_texts, examples) if frame is None else _frame_columns(found, frame, text)
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
        with _reporting(progress, len(rows), " examples") as report:
            found = evaluation.predict(model, task, rows, self._snapshot, max_length=self.max_length, progress=report)
        return Predictions(*found)

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


# ---- Forms of examples and of progress -----------------------------------------------------------------------------------


def _sentences(caller: str, values: Iterable[str]) -> list[str]:
    """The values as a list. Raises ValueError for a string or a DataFrame, whose items are not its sentences, or no list."""
    if _is_frame(values):
        raise ValueError(f"{caller} takes sentences, not a DataFrame: pass one of its columns")
    _check_list(values, f"{caller} takes sentences")
    return list(values)


def _columns(task: str, count: int, examples: Sequence[Any]) -> tuple[list[str], ...]:
    """One list per sentence of an example, from such lists or from one list of tuples. Raises ValueError."""
    for each in examples:
        _check_list(each, f"{task} takes lists of sentences")
    columns = [list(each) for each in examples]
    if count > 1 and len(columns) == 1:
        noun, number = {2: ("pair", "two"), 3: ("triple", "three")}.get(count, ("example", str(count)))
        for row, example in enumerate(columns[0]):
            if isinstance(example, str) or not isinstance(example, Sequence) or len(example) != count:
                raise ValueError(f"{noun} {row} is {example!r:.60}, expected {number} sentences")
        columns = [[example[place] for example in columns[0]] for place in range(count)]
    if len(columns) != count or len({len(column) for column in columns}) > 1:
        several = f"{count} lists of sentences, equally long, or a list of tuples"
        raise ValueError(f"{task} takes {'one list of sentences' if count == 1 else several}")
    return tuple(columns)


def _check_list(value: object, expected: str) -> None:
    """Raises ValueError, which begins with `expected`, for a string, bytes, or a value without items."""
    if isinstance(value, str | bytes) or not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
        raise ValueError(f"{expected}, not {'a string' if isinstance(value, str) else f'{value!r:.60}'}")


def _is_frame(value: object) -> bool:
    """Whether `value` is a pandas DataFrame. Does not import pandas: without it in memory, no value is one."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _frame_columns(task: Task, frame: Any, text: str | Sequence[str] | None) -> tuple[list[str], ...]:
    """The sentences in the columns `text` of a DataFrame. Raises ValueError."""
    known = list(frame.columns)
    if text is None:
        usual = [source.texts for source in task.sources]  # the columns that the task was trained on
        usual += usual_names(task.num_texts)  # those that are looked for in files
        fitting = (names for names in usual if len(names) == task.num_texts and all(name in known for name in names))
        named = next(fitting, None)
        if named is None:
            columns = ", ".join(map(str, known))
            raise ValueError(f"{task.name} takes {task.num_texts} columns: name them as text=... (there are {columns})")
    else:
        named = (text,) if isinstance(text, str) else tuple(text)
    for name in named:
        if name not in known:
            raise ValueError(f"the DataFrame has no column {name!r} (it has {', '.join(map(str, known))})")
    if len(named) != task.num_texts:
        raise ValueError(f"{task.name} takes {task.num_texts} columns, text names {len(named)}")
    return tuple(frame[name].tolist() for name in named)


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
