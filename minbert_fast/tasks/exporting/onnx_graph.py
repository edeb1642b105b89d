# SPDX-License-Identifier: Apache-2.0
"""A model as an ONNX graph: the encoder with its pooling, or a head of any kind on top of it.

The graph is traced from the plain modules on rectangles, and compared in onnxruntime with the model. `onnx_model.py` names
its inputs and runs it. Its outputs:

    encoder   last_hidden_state [n, S, H], sentence_embedding [n, width]
    head      prediction [n], of several labels [n, C]; with classes probabilities [n, C]; logits [n, C] where transformers
              has the same form

Shapes: n examples, S positions, H hidden, C classes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.errors import RunError, first_line
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import Pooling
from minbert_fast.model.rows import extended_mask
from minbert_fast.tasks.base import Head, HeadOutput, Task
from minbert_fast.tasks.exporting.classifier import Problem, logits_of, problem_of
from minbert_fast.tasks.exporting.onnx_model import GRAPH, INPUTS, KEY, VECTORS, Contents, OnnxModel, optional_library
from minbert_fast.tasks.inference.predictor import Predictor
from minbert_fast.tasks.kinds.single import TokenLayers
from minbert_fast.tasks.model import MultitaskModel, pool_padded

OPSET = 20  # the first one with Gelu
TOLERANCE = 1e-4  # of the comparison with the model, relative to the largest number
# The sentences of the comparison have many lengths; one is longer than any model reads.
SAMPLES = ["a film", "the girl eats an apple in the park", "", "is it? it is - " * 3, "a very good film, " * 200, "no"]


@dataclasses.dataclass(frozen=True)
class Written:
    """The result of `write`."""

    contents: Contents
    problem: Problem | None  # by which transformers could read the logits; None: an encoder, or another form
    difference: float  # the largest one between onnxruntime's numbers and the model's in fp32
    largest: float  # of the model's numbers


def write(folder: Path, model: Predictor, task: str | None, *, int8: bool = False) -> Written:
    """Writes `model.onnx` to `folder`, which has the tokenizer already: the encoder (`task` None) or a head of `model`.

    `model` must be in fp32 and on the CPU. `int8` stores weights and word vectors as 8-bit numbers; products then quantise
    their activations, so that results differ by what `Written` says. Raises ConfigError for a missing library, RunError for
    a head that cannot be traced or a graph that gives other numbers.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        optional_library(library)
    contents = _contents(model, task)
    # Three tensors: the same tensor in two places would be traced as one input.
    example = tuple(torch.ones(2 * contents.sequences, 3, dtype=torch.long) for _ in INPUTS)
    graph = EncoderGraph(model) if task is None else HeadGraph(model.multitask(), task, example)
    path = folder / GRAPH
    _trace(graph, example, contents, path)
    difference, largest = _compare(folder, model, task)
    if not difference <= TOLERANCE * largest:
        raise RunError(f"{path}: onnxruntime gives other numbers than the model (up to {difference:.1e} apart)")
    if int8:
        contents = dataclasses.replace(contents, int8=True)
        _quantise(path, contents)
        difference, largest = _compare(folder, model, task)
    return Written(contents, graph.problem, difference, largest)


def _contents(model: Predictor, task: str | None) -> Contents:
    if task is None:
        return Contents(model.width, model.max_length, model.pooling, model.normalize, model.prompt)
    found, heads = model.tasks[task], model.multitask()
    return Contents(
        width=model.encoder.config.hidden_size,
        max_length=model.max_length,
        pooling=found.pooling or heads.pooling,
        task=task,
        encoder=found.encoder,
        sentences=found.num_texts,
        classes=found.class_names or (),
    )


# ---- What is traced ---------------------------------------------------------------------------------------------------


class EncoderGraph(nn.Module):
    """Word ids to the last hidden state and one vector per sentence, as `Predictor.encode` computes it."""

    sequences = 1
    outputs: Sequence[str] = ("last_hidden_state", VECTORS)
    problem: Problem | None = None

    def __init__(self, model: Predictor) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.pooling: Pooling = model.pooling
        self.normalize, self.width = model.normalize, model.width

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, ...]:
        """ids, mask, types [n, S] -> hidden [n, S, H], vectors [n, width]."""
        hidden = self.encoder.stock(ids, mask, types)
        vectors = pool_padded(hidden, mask, self.pooling, self.encoder)
        if self.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return hidden, vectors[:, : self.width]


class HeadGraph(nn.Module):
    """Word ids of the sequences of each example to the predictions of one head.

    Evaluates the head on `example`, inputs of `forward`, to find the outputs that it has and the problem type of its logits.
    """

    def __init__(self, model: MultitaskModel, name: str, example: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.task: Task = model.tasks[name]
        self.sequences = self.task.arity
        self.pooling: Pooling = self.task.pooling or model.pooling
        self.head: Head = copy.deepcopy(model.head(name))
        for place, module in list(self.head.named_modules()):
            if isinstance(module, TokenLayers):
                self.head.set_submodule(place, _PaddedLayers(module.layers, self.encoder))
        with torch.inference_mode():
            output = self._head_output(*example)
            self.problem = problem_of(self.head, self.task, output)
            classes = self.head.probabilities(output) is not None
        has = {"logits": self.problem is not None, "probabilities": classes, "prediction": True}
        self.outputs: Sequence[str] = [name for name, present in has.items() if present]

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, ...]:
        """ids, mask, types [sequences * n, S] -> the tensors named `outputs`."""
        output = self._head_output(ids, mask, types)
        found: dict[str, Any] = {
            "logits": logits_of(self.head, self.task, output),
            "probabilities": self.head.probabilities(output),
            "prediction": self.head.predict(output),
        }
        return tuple(found[name] for name in self.outputs)

    def _head_output(self, ids: Tensor, mask: Tensor, types: Tensor) -> HeadOutput:
        hidden = self.encoder.stock(ids, mask, types)
        vectors = pool_padded(hidden, mask, self.pooling, self.encoder).unflatten(0, (self.sequences, -1))
        output: HeadOutput = self.head(_PaddedInput(vectors.unbind(0), hidden, mask, self.pooling))
        return output


class _PaddedInput:
    """A TaskInput of a rectangle: padded [B, S, H], mask [B, S]. Packed rows are computed if a head reads them."""

    labels = None
    first = 0

    def __init__(self, embeddings: tuple[Tensor, ...], padded: Tensor, mask: Tensor, pooling: Pooling) -> None:
        self.embeddings, self.padded, self.mask, self.pooling = embeddings, padded, mask, pooling

    @property
    def hidden(self) -> Tensor:
        return self.padded[self.mask.bool()]

    @property
    def cu_seqlens(self) -> Tensor:
        return F.pad(self.mask.sum(1).cumsum(0), (1, 0)).int()

    @property
    def max_seqlen(self) -> int:
        return self.mask.shape[1]


class _PaddedLayers(nn.Module):
    """`TokenLayers` as plain modules on a rectangle: its own forward is packed and fused, which cannot be traced."""

    def __init__(self, layers: nn.ModuleList, encoder: BertModel) -> None:
        super().__init__()
        self.layers = layers
        self.encoder = encoder

    def forward(self, inputs: _PaddedInput) -> Tensor:
        hidden, mask = inputs.padded, inputs.mask  # of one sequence per example
        for layer in self.layers:
            hidden = layer(hidden, extended_mask(mask, hidden.dtype))
        return pool_padded(hidden, mask, inputs.pooling, self.encoder)


# ---- Tracing, quantising, comparing -------------------------------------------------------------------------------------


def _trace(graph: EncoderGraph | HeadGraph, example: tuple[Tensor, ...], contents: Contents, path: Path) -> None:
    """Writes the graph of any number of examples and any length up to the encoder's positions. Raises RunError."""
    rows = graph.sequences * torch.export.Dim("n")
    length = torch.export.Dim("length", max=graph.encoder.config.max_position_embeddings)
    try:
        with _quiet(), torch.no_grad():
            traced = torch.export.export(graph.eval(), example, dynamic_shapes=({0: rows, 1: length},) * 3)
            _drop_idle_squeezes(traced)
            program = torch.onnx.export(
                traced, dynamo=True, opset_version=OPSET, verbose=False,
                input_names=INPUTS, output_names=graph.outputs,
            )  # fmt: skip
            assert program is not None
            program.save(path, external_data=False)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        words = f"task {contents.task}: its head cannot be traced as an ONNX graph ({first_line(error)})"
        raise RunError(words) from error
    _describe(path, contents)


def _drop_idle_squeezes(traced: torch.export.ExportedProgram) -> None:
    """Removes `squeeze(dim)` of a dimension that is not 1: PyTorch ignores it, ONNX refuses it."""
    for node in list(traced.graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim and node.meta["val"].dim() == node.args[0].meta["val"].dim():
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _describe(path: Path, contents: Contents) -> None:
    """Adds the description to the graph's metadata."""
    onnx = optional_library("onnx")
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {KEY: json.dumps(dataclasses.asdict(contents))})
    rows, length = (dim.dim_param for dim in graph.graph.input[0].type.tensor_type.shape.dim)
    count = rows.removeprefix(f"{contents.sequences}*")
    for value in (*graph.graph.input, *graph.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = dim.dim_param.replace(count, "n").replace(length, "length") if dim.dim_param else ""
    onnx.save(graph, path)


def _quantise(path: Path, contents: Contents) -> None:
    """Replaces a graph by one whose encoder has 8-bit weights, a scale per output channel; the head keeps its weights.

    This is onnxruntime's dynamic quantisation. 7 of the 8 bits are used: on processors without 8-bit dot products, sums of
    two products of 8 bits overflow.
    """
    quantization = optional_library("onnxruntime.quantization")
    whole = path.with_suffix(".fp32")
    path.rename(whole)
    nodes = optional_library("onnx").load(whole).graph.node
    with _quiet():
        quantization.quantize_dynamic(
            whole, path, op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True, reduce_range=True,
            weight_type=quantization.QuantType.QInt8, nodes_to_exclude=[n.name for n in nodes if not _of_encoder(n)],
        )  # fmt: skip
    whole.unlink()
    _describe(path, contents)


def _of_encoder(node: Any) -> bool:
    """Whether an ONNX node was traced from a module of the encoder."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
    return "'encoder." in scopes


def _compare(folder: Path, model: Predictor, task: str | None) -> tuple[float, float]:
    """The largest difference between the numbers of the graph and of the model for SAMPLES, and the largest number."""
    graph = OnnxModel.from_pretrained(folder, device="cpu")
    theirs: Any
    ours: Any
    if task is None:
        theirs, ours = graph.encode(SAMPLES), model.encode(SAMPLES)
    else:
        columns = [SAMPLES[shift:] + SAMPLES[:shift] for shift in range(graph.contents.sentences)]
        (values, shares), expected = graph.predict(*columns), model.predict(task, *columns)
        theirs, ours = (values, expected.values) if shares is None else (shares, expected.probabilities)
    return float(np.abs(theirs - ours).max()), float(np.abs(ours).max())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the notes that the exporter and the quantiser print about their own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
