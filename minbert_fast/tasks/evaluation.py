# SPDX-License-Identifier: Apache-2.0
"""A trained model over data files: predictions, metrics, the course's files, and what the report shows of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minbert_fast.common.device import DTYPES, Precision
from minbert_fast.common.storage import write_text
from minbert_fast.data import TokenTable, evaluation_batches
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.inference import TOKEN_BUDGET, Snapshot
from minbert_fast.model.passes import PackedRows
from minbert_fast.tasks import HeadOutput, MultitaskModel, Task
from minbert_fast.tasks.metrics import confusion_matrix, course_score

WORST = 25  # errors listed a task


@dataclass(frozen=True)
class TaskResult:
    """One task's predictions [n] in the order of its file, with what they are judged by."""

    task: Task
    ids: Sequence[str]
    labels: np.ndarray | None  # [n]
    predictions: np.ndarray  # [n] on the labels' scale: integers for classes that print so, else fp32
    probabilities: np.ndarray | None  # [n, C]
    metrics: dict[str, float]  # empty where there are no labels to judge by


@dataclass(frozen=True)
class Evaluation:
    """Results by task name."""

    tasks: dict[str, TaskResult]

    @property
    def metrics(self) -> dict[str, float]:
        """All tasks' metrics and `score`: the course's, or where none of its tasks is there the mean of the primary."""
        flat = {key: value for result in self.tasks.values() for key, value in result.metrics.items()}
        score = course_score(flat)
        if score is None:
            primary = [flat[r.task.primary] for r in self.tasks.values() if r.task.primary in flat]
            score = sum(primary) / len(primary) if primary else None
        return flat if score is None else flat | {"score": score}

    @property
    def score(self) -> float:
        """The overall score; nan where nothing could be judged."""
        return self.metrics.get("score", float("nan"))

    def write(self, directory: Path, texts: Mapping[str, Sequence[Sequence[str]]], split: str = "dev") -> None:
        """Writes the prediction files, and details.json for the report.

        `texts[task]` are the sentences as their file has them, one list a sentence of an example; a task without
        them is listed without its worst errors.
        """
        self.write_predictions(directory, split)
        details = {name: _details(result, texts.get(name)) for name, result in self.tasks.items()}
        write_text(directory / "details.json", json.dumps({"split": split, "tasks": details}, allow_nan=False) + "\n")

    def write_predictions(self, directory: Path, split: str = "dev") -> None:
        """Writes one file a task in the course's format, each atomically."""
        for result in self.tasks.values():
            path = directory / result.task.prediction_file(split)
            result.task.write_predictions(path, list(result.ids), result.predictions)


def evaluate(
    model: MultitaskModel,
    tables: Mapping[str, TokenTable],
    *,
    precision: Precision = "fp32",
    max_length: int = 128,
    token_budget: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Runs the model over `tables` (by task name), on the model's own device, dropout off.

    Sentences are cut to `max_length` tokens or the model's positions, batched by length, up to `token_budget` tokens a
    batch (None: what suits the device); `progress` is told how many rows each batch had.
    """
    training = model.training
    model.eval()
    try:
        results = {}
        snapshot = Snapshot(model.encoder, DTYPES[precision])
        for name, table in tables.items():
            predictions, probabilities = predict(
                model,
                name,
                table,
                snapshot,
                max_length=max_length,
                token_budget=token_budget,
                progress=progress,
            )
            task = model.tasks[name]
            judged = table.labels is not None or not task.labelled
            results[name] = TaskResult(
                task=task,
                ids=[table.ids[row] for row in range(len(table))],
                labels=table.labels,
                predictions=predictions,
                probabilities=probabilities,
                metrics=task.evaluate(predictions, table.labels) if judged and len(table) else {},
            )
        return Evaluation(results)
    finally:
        model.train(training)


def predict(
    model: MultitaskModel,
    name: str,
    table: TokenTable,
    snapshot: Snapshot,
    *,
    max_length: int,
    token_budget: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predictions [n] and probabilities [n, C] (None for a regression) of task `name`, in the order of the table's rows.

    `snapshot` holds the weights of the model's encoder; the model is in evaluation mode.
    """
    device = next(model.encoder.parameters()).device
    limit = min(max_length, model.encoder.config.max_position_embeddings)
    predictions: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    batches = evaluation_batches(
        table,
        max_length=limit,
        task=name,
        token_budget=token_budget or TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"]),
        encoder=model.tasks[name].encoder,
    )
    for batch in batches:
        rows = batch.rows[name]
        values, shares = forward(model, name, batch.to(device), snapshot)
        if predictions is None:
            predictions = np.empty(len(table), values.dtype)
            probabilities = None if shares is None else np.empty((len(table), shares.shape[1]), np.float32)
        predictions[rows] = values
        if probabilities is not None:
            probabilities[rows] = shares
        if progress is not None:
            progress(len(rows))
    return (np.empty(0, np.float32) if predictions is None else predictions), probabilities


@torch.inference_mode()
def forward(
    model: MultitaskModel, name: str, batch: MultitaskBatch, snapshot: Snapshot
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predictions [n] and probabilities [n, C] (None for a regression) of one task's batch, fetched to the host."""
    hidden = snapshot.hidden(PackedRows.of(batch.packed))
    head = model.head(name)
    output: HeadOutput = head(model.inputs(batch, hidden)[name])
    shares = head.probabilities(output)
    return head.predict(output).cpu().numpy(), None if shares is None else shares.cpu().numpy()


def _details(result: TaskResult, texts: Sequence[Sequence[str]] | None) -> dict[str, Any]:
    """What the report shows of a task, JSON-able."""
    task, classes = result.task, result.task.class_names
    details: dict[str, Any] = {
        "kind": task.kind,
        "classes": classes,
        "metrics": {key: _finite(value) for key, value in result.metrics.items()},
        "ids": list(result.ids),
        "labels": None if result.labels is None else _rounded(result.labels),
        "predictions": _rounded(result.predictions),
    }
    if result.labels is None:
        return details
    if classes is not None:
        details["confusion"] = confusion_matrix(result.predictions, result.labels, len(classes)).tolist()
    if texts is not None:
        details["worst"] = [_worst(result, row, error, texts) for row, error in _errors(result)]
    return details


def _errors(result: TaskResult) -> list[tuple[int, float]]:
    """The rows that were wrong by most, and how much: probability missing at the truth, or |difference|."""
    assert result.labels is not None
    rows = np.arange(len(result.labels))
    if result.probabilities is not None:
        size = 1 - result.probabilities[rows, result.labels.astype(np.int64)]
        rows = rows[result.predictions != result.labels]
    else:
        size = np.abs(result.predictions - result.labels)
        rows = rows[size > 0]
    rows = rows[np.argsort(-size[rows], kind="stable")][:WORST]
    return [(int(row), float(size[row])) for row in rows]


def _worst(result: TaskResult, row: int, error: float, texts: Sequence[Sequence[str]]) -> dict[str, Any]:
    assert result.labels is not None
    shares = result.probabilities
    return {
        "id": result.ids[row],
        "sentences": [column[row] for column in texts],
        "label": _rounded(result.labels[row : row + 1])[0],
        "prediction": _rounded(result.predictions[row : row + 1])[0],
        "probability": None if shares is None else _finite(float(shares[row].max())),
        "error": _finite(error),
    }


def _rounded(values: np.ndarray) -> list[Any]:
    """Numbers for JSON, six decimals at most; what is not finite becomes null."""
    if np.issubdtype(values.dtype, np.integer):
        return list(values.tolist())
    return [_finite(value) for value in values.tolist()]


def _finite(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
