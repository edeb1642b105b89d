# SPDX-License-Identifier: Apache-2.0
"""A head as a stock classifier of transformers: AutoModelForSequenceClassification and pipelines load the directory.

These classifiers read one sequence and apply one linear layer to a vector of its first token. A head has this form if it

- reads one sequence per example: a sentence, or a pair encoded jointly ("cross");
- pools with "pooler" (BertForSequenceClassification), or with "cls" (DebertaV2ForSequenceClassification, which is BERT
  without relative attention and with a linear activation in its pooler);
- computes scores that are linear in the pooled vector: classes are their softmax, label sets their sigmoid, and a number
  the score itself.

The form is found by evaluating the head in fp64, so that it holds for every kind of task. Other heads are refused: no stock
class computes the mean or the maximum over tokens behind BERT's layers.

Shapes: n examples, H hidden, C classes (1 for a number).
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_bytes, write_json
from minbert_fast.model import weights
from minbert_fast.model.bert import BertModel
from minbert_fast.tasks.base import Head, HeadOutput, Task, TaskInput
from minbert_fast.tasks.model import MultitaskModel

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
TOLERANCE = 1e-9  # of the linear form in fp64, relative to the largest score
INSTEAD = "use --format onnx, which exports every head"


@dataclass(frozen=True)
class Classifier:
    """The function that transformers computes from the pooled vector x [n, H]: softmax, sigmoid or identity of x W^T + b."""

    weight: Tensor  # [C, H] fp32
    bias: Tensor  # [C] fp32
    names: tuple[str, ...]  # of the classes; the task's name for a number
    problem: Problem
    pooling: Literal["pooler", "cls"]
    own_decision: bool  # the head does not always predict its most likely class


def classifier_of(model: MultitaskModel, name: str) -> Classifier:
    """The head of task `name` as a Classifier. Raises ConfigError with the reason and the alternative."""
    task, head = model.tasks[name], model.head(name)
    pooling = task.pooling or model.pooling
    if task.arity != 1:
        raise ConfigError(f"task {name} reads {task.arity} sequences, a classifier of transformers one: {INSTEAD}")
    if pooling not in ("pooler", "cls"):
        reason = f'transformers\' classifiers read the first token alone (pooling "cls" or "pooler"), not "{pooling}"'
        raise ConfigError(f"task {name}: {reason}; {INSTEAD}")
    probe = copy.deepcopy(head).cpu().double().eval()
    width = model.encoder.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(64, width, generator=generator, dtype=torch.float64)
    points = points * torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=torch.float64).repeat(16)[:, None]
    output = _output(probe, torch.cat([torch.zeros_like(points[:1]), torch.eye(width), points]))
    scores = logits_of(probe, task, output)
    bias = scores[0]
    weight = (scores[1 : 1 + width] - bias).T
    expected = points @ weight.T + bias
    largest = float(expected.abs().max())
    if not largest < torch.inf or not torch.allclose(
        scores[1 + width :], expected, rtol=TOLERANCE, atol=TOLERANCE * largest
    ):
        raise ConfigError(f"task {name}: its head is not linear in the pooled vector; {INSTEAD}")
    problem = problem_of(probe, task, output)
    if problem is None:
        reason = "its probabilities are neither the softmax nor the sigmoid of its scores"
        raise ConfigError(f"task {name}: {reason}; {INSTEAD}")
    single = problem == "single_label_classification"
    own_decision = single and bool((probe.predict(output) != scores.argmax(-1)).any())
    return Classifier(weight.float(), bias.float(), task.class_names or (name,), problem, pooling, own_decision)


def logits_of(head: Head, task: Task, output: HeadOutput) -> Tensor:
    """The logits that transformers would compute: [n, C] for classes, the prediction [n, 1] for a number.

    [n, 1] also for classes that the head finds from one score, as those of an ordinal loss.
    """
    if task.class_names is None:
        return head.predict(output)[:, None].to(output.scores.dtype)
    logits = head.logits(output)
    scores = output.scores if logits is None else logits
    return scores if scores.dim() == 2 else scores[:, None]


def problem_of(head: Head, task: Task, output: HeadOutput) -> Problem | None:
    """How transformers would read `logits_of` the output; None if its probabilities have no such form."""
    logits, shares = logits_of(head, task, output), head.probabilities(output)
    if task.class_names is None:
        return "regression" if shares is None else None
    if shares is None or logits.shape != shares.shape:
        return None
    if torch.allclose(logits.softmax(-1), shares, atol=1e-6):
        return "single_label_classification"
    if torch.allclose(logits.sigmoid(), shares, atol=1e-6):
        return "multi_label_classification"
    return None


def write(folder: Path, encoder: BertModel, classifier: Classifier) -> None:
    """Writes config.json and model.safetensors of the stock class to `folder`."""
    stock = {
        weights.to_stock_name(key): tensor.detach().float().cpu()
        for key, tensor in encoder.state_dict().items()
        if key != weights.POSITIONS
    }
    head = {"classifier.weight": classifier.weight, "classifier.bias": classifier.bias}
    config = json.loads(encoder.config.to_json()) | labels_config(classifier.names, classifier.problem)
    if classifier.pooling == "pooler":
        tensors = {f"bert.{key}": tensor for key, tensor in stock.items()} | head
        config["architectures"] = ["BertForSequenceClassification"]
    else:
        width = encoder.config.hidden_size
        body = {key: tensor for key, tensor in stock.items() if not key.startswith("pooler.")}
        tensors = {f"deberta.{_deberta_name(key)}": tensor for key, tensor in body.items()} | head
        tensors |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
        config |= {
            "architectures": ["DebertaV2ForSequenceClassification"],
            "model_type": "deberta-v2",
            "relative_attention": False,
            "position_biased_input": True,
            "pos_att_type": [],
            "pooler_hidden_act": "linear",
            "pooler_hidden_size": width,
            "pooler_dropout": 0.0,
        }
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", dict(sorted(config.items())))


def labels_config(names: tuple[str, ...], problem: Problem) -> dict[str, Any]:
    """The keys of a config.json that name the classes."""
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": problem,
    }


def _output(head: Head, x: Tensor) -> HeadOutput:
    """The head's output for pooled vectors x [n, H]. All token rows are NaN: no head of a classifier reads them."""
    offsets = torch.arange(len(x) + 1, dtype=torch.int32)
    with torch.inference_mode():
        output: HeadOutput = head(TaskInput((x,), torch.full_like(x, torch.nan), offsets, 1, 0))
    return output


def _deberta_name(key: str) -> str:
    return re.sub(r"attention\.self\.(query|key|value)\.", r"attention.self.\1_proj.", key)
