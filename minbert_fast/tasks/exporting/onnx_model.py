# SPDX-License-Identifier: Apache-2.0
"""Runs an ONNX directory in onnxruntime: sentence vectors, or the predictions of a head.

`python -m minbert_fast.export --format onnx` writes such a directory: `model.onnx`, whose metadata say what it computes
(`Contents`), and the tokenizer. Graphs read rectangles: sequences are sorted by length, so that little of one is padding.

Shapes: n sentences or examples, S positions of the longest sequence of a batch, C classes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from minbert_fast.common.errors import first_line
from minbert_fast.common.schema import ConfigError, build
from minbert_fast.common.storage import regular
from minbert_fast.data.collate import by_length
from minbert_fast.data.sentences import Tokens, join_pair, truncate
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import Encoder, sequences_of
from minbert_fast.model.config import Pooling
from minbert_fast.tasks.inference.sentence_vectors import CHUNK, TOKEN_BUDGET

GRAPH = "model.onnx"
KEY = "minbert_fast"  # of the graph's metadata; the value is a Contents as JSON
# Each int64 [sequences * n, S]: all first sequences of the n examples, then all second ones, ... (a joint one comes last).
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
VECTORS = "sentence_embedding"  # the output of an encoder
INSTALL = "pip install 'minbert-fast[onnx]'"


@dataclass(frozen=True)
class Contents:
    """The outputs of a graph, and the form of its inputs."""

    width: int  # of a vector
    max_length: int  # tokens of a sequence, [CLS] and [SEP] included
    pooling: Pooling
    normalize: bool = False
    prompt: str = ""  # put before every text
    task: str = ""  # empty: an encoder
    encoder: Encoder = "bi"  # how the sentences of an example become sequences
    sentences: int = 1  # per example
    classes: tuple[str, ...] = ()  # none for a number
    int8: bool = False

    @property
    def sequences(self) -> int:
        """Sequences per example."""
        return sequences_of(self.encoder, self.sentences)


class OnnxModel:
    """An ONNX graph with its tokenizer, ready to run."""

    def __init__(self, session: Any, tokenizer: Tokenizer, contents: Contents) -> None:
        self.session = session  # onnxruntime.InferenceSession
        self.tokenizer = tokenizer
        self.contents = contents
        self.width = contents.width
        self.max_length = contents.max_length
        self.truncated = 0  # sentences so far that were cut to max_length

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: str = "auto") -> OnnxModel:
        """Reads a directory that `export --format onnx` wrote. Raises ConfigError, DataError or OSError."""
        path = Path(directory) / GRAPH
        runtime = optional_library("onnxruntime")
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; export --format onnx writes it")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = runtime.InferenceSession(str(regular(path)), options, providers=_providers(runtime, device))
        except Exception as error:  # onnxruntime's errors have no public base class
            raise ConfigError(f"{path}: onnxruntime cannot load it ({first_line(error)})") from None
        text = session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise ConfigError(
                f"{path}: its metadata do not describe it; expected a graph that export --format onnx wrote"
            )
        return cls(session, Tokenizer.from_pretrained(directory), build(Contents, json.loads(text), str(path)))

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """One vector per sentence, fp32 [n, width] ([width] for a single string), as `Predictor.encode` gives it.

        Raises ConfigError for a head, or for a `pooling` or `normalize` that the graph cannot give.
        """
        if isinstance(sentences, str):
            row: np.ndarray = self.encode([sentences], pooling=pooling, normalize=normalize, progress=progress)[0]
            return row
        contents = self.contents
        if contents.task:
            raise ConfigError(f"this graph computes task {contents.task}, not vectors: export the model without --task")
        if pooling not in (None, contents.pooling):
            raise ConfigError(f"pooling {pooling}: the graph pools with {contents.pooling}, which is fixed at export")
        if normalize is False and contents.normalize:
            raise ConfigError("normalize: the graph scales vectors to length 1; export it with --no-normalize")
        out = np.empty((len(sentences), self.width), np.float32)
        for begin in range(0, len(sentences), CHUNK):
            texts = [contents.prompt + text for text in sentences[begin : begin + CHUNK]]
            for rows, (vectors,) in self._run([texts], [VECTORS], progress):
                out[begin + rows] = vectors
        if normalize:  # also what the graph scaled before it cut the vectors
            out = F.normalize(torch.from_numpy(out)).numpy()
        return out

    def predict(self, *sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """A head's predictions [n] on the scale of the labels, and probabilities [n, C] (None for a number).

        The arguments are one list [n] of texts per sentence of an example. Raises ConfigError for an encoder, ValueError
        for a wrong number of lists or lists of different lengths.
        """
        contents = self.contents
        if not contents.task:
            raise ConfigError("this graph computes vectors, not predictions: export the model with --task NAME")
        strings = any(isinstance(column, str) for column in sentences)
        if strings or len(sentences) != contents.sentences or len({len(column) for column in sentences}) > 1:
            raise ValueError(f"{contents.task} takes {contents.sentences} lists of sentences, equally long")
        if not sentences[0]:  # the shapes and types of one example's
            values, shares = self.predict(*([""] for _ in sentences))
            return values[:0], None if shares is None else shares[:0]
        available = [output.name for output in self.session.get_outputs()]
        names = [name for name in ("prediction", "probabilities") if name in available]
        found: list[Any] = [None, None]
        for rows, results in self._run(sentences, names, None):
            for place, values in enumerate(results):
                if found[place] is None:
                    found[place] = np.empty((len(sentences[0]), *values.shape[1:]), values.dtype)
                found[place][rows] = values
        return found[0], found[1]

    def _run(
        self, columns: Sequence[Sequence[str]], outputs: Sequence[str], progress: Callable[[int], object] | None
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Runs the graph over all examples in batches of similar length: yields their rows and outputs."""
        sequences = self._sequences([self.tokenizer.encode(column) for column in columns])
        lengths = np.array([[len(ids) for ids, _ in column] for column in sequences])  # [sequences, n]
        for rows in by_length(lengths.sum(axis=0), TOKEN_BUDGET["cpu"]) if lengths.size else ():
            feed = self._rectangle([column[row] for column in sequences for row in rows])
            yield rows, self.session.run(list(outputs), feed)
            if progress is not None:
                progress(len(rows))

    def _sequences(self, columns: list[Tokens]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """The word ids and token types of each sequence of each example, cut to the maximum length."""
        limit, encoder = self.contents.max_length, self.contents.encoder
        self.truncated += sum(len(ids) > limit for column in columns for ids in column)
        cut = [[truncate(ids, limit) for ids in column] for column in columns]
        separate = [[(ids, np.zeros_like(ids)) for ids in column] for column in cut]
        if encoder == "bi":
            return separate
        joint = [join_pair(first, second, limit) for first, second in zip(*columns, strict=True)]
        return [joint] if encoder == "cross" else [*separate, joint]

    def _rectangle(self, sequences: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """The graph's inputs."""
        lengths = np.array([len(ids) for ids, _ in sequences])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids, types = np.full(mask.shape, self.tokenizer.pad_id), np.zeros(mask.shape, np.int64)
        ids[mask], types[mask] = map(np.concatenate, zip(*sequences, strict=True))
        return dict(zip(INPUTS, (ids, mask.astype(np.int64), types), strict=True))


def optional_library(name: str) -> Any:
    """A library of the extra `onnx`. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"ONNX needs {error.name or name}: {INSTALL}") from None


def _providers(runtime: Any, device: str) -> list[str]:
    """onnxruntime's providers for a --device. Raises ConfigError for one that the installed build does not have."""
    available = runtime.get_available_providers()
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected auto, cpu or cuda")
    if device == "cuda" and "CUDAExecutionProvider" not in available:
        raise ConfigError("--device cuda: this build of onnxruntime has no CUDA provider (pip install onnxruntime-gpu)")
    wanted = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return [name for name in wanted if name in available]
