# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained model on data files: predictions, metrics, prediction files, and details for the report."""

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
from minbert_fast.data.collate import evaluation_batches
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model.inference import TOKEN_BUDGET, Snapshot
from minbert_fast.model.passes import PackedRows
from minbert_fast.tasks.base import HeadOutput, Task
from minbert_fast.tasks.metrics import confusion_matrix, course_score
from minbert_fast.tasks.model import MultitaskModel
from minbert_fast.tasks.predictions import write_predictions

MAX_ERRORS = 25  # errors listed per task


@dataclass(frozen=True)
class TaskResult:
    """One task's predictions [n] in the order of its file, with labels and metrics."""

    task: Task
    ids: Sequence[str]
    labels: np.ndarray | None  # [n]
    predictions: np.ndarray  # [n] on the labels' scale: integers for classes written as whole numbers, else fp32
    probabilities: np.ndarray | None  # [n, C]
    metrics: dict[str, float]  # empty for an unlabelled file


@dataclass(frozen=True)
class Evaluation:
    """Results by task name."""

    tasks: dict[str, TaskResult]

    @property
    def metrics(self) -> dict[str, float]:
        """All tasks' metrics and `score`: the course's score, or the mean primary metric without course tasks."""
        flat = {key: value for result in self.tasks.values() for key, value in result.metrics.items()}
        score = course_score(flat)
        if score is None:
            primary = [flat[r.task.primary] for r in self.tasks.values() if r.task.primary in flat]
            score = sum(primary) / len(primary) if primary else None
        return flat if score is None else flat | {"score": score}

    @property
    def score(self) -> float:
        """The overall score; nan without metrics."""
        return self.metrics.get("score", float("nan"))

    def write(self, directory: Path, texts: Mapping[str, Sequence[Sequence[str]]], split: str = "dev") -> None:
        """Writes the prediction files, and details.json for the report.

        `texts[task]` are the sentences of the task's file: one list [n] per sentence of an example. Without them the
        details list no errors.
        """
        self.write_predictions(directory, split)
        details = {name: _details(result, texts.get(name)) for name, result in self.tasks.items()}
        write_text(directory / "details.json", json.dumps({"split": split, "tasks": details}, allow_nan=False) + "\n")

    def write_predictions(self, directory: Path, split: str = "dev") -> None:
        """Writes one file per task in the course's format, each atomically."""
        for result in self.tasks.values():
            path = directory / result.task.prediction_file(split)
            write_predictions(path, result.task.header, list(result.ids), result.predictions)


def evaluate(
    model: MultitaskModel,
    tables: Mapping[str, TokenTable],
    *,
    precision: Precision = "fp32",
    max_length: int = 128,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Runs the model over `tables` (by task name), on the model's device and without dropout.

    Sentences are truncated to `max_length` tokens or the model's positions, and batched by length. `progress` gets the
    number of rows of each batch.
    """
    training = model.training
    model.eval()
    try:
        results = {}
        snapshot = Snapshot(model.encoder, DTYPES[precision])
        for name, table in tables.items():
            predictions, probabilities = predict(model, name, table, snapshot, max_length=max_length, progress=progress)
            task = model.tasks[name]
            measurable = len(table) and (table.labels is not None or not task.labelled)
            results[name] = TaskResult(
                task=task,
                ids=[table.ids[row] for row in range(len(table))],
                labels=table.labels,
                predictions=predictions,
                probabilities=probabilities,
                metrics=task.evaluate(predictions, table.labels) if measurable else {},
            )
        return Evaluation(results)
    finally:
        model.train(training)


@torch.inference_mode()
def predict(
    model: MultitaskModel,
    name: str,
    table: TokenTable,
    snapshot: Snapshot,
    *,
    max_length: int,
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predictions [n] and probabilities [n, C] (None for a regression) of task `name`, in the order of the table's rows.

    `snapshot` is that of the model's encoder; the model must be in evaluation mode.
    """
    device = next(model.encoder.parameters()).device
    head = model.head(name)
    rows, predictions, probabilities = [], [], []
    batches = evaluation_batches(
        name,
        table,
        max_length=min(max_length, model.encoder.config.max_position_embeddings),
        token_budget=TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"]),
        encoder=model.tasks[name].encoder,
    )
    for batch in batches:
        rows.append(batch.rows[name])
        batch = batch.to(device)
        output: HeadOutput = head(model.inputs(batch, snapshot.hidden(PackedRows.of(batch.packed)))[name])
        predictions.append(head.predict(output).cpu().numpy())
        if (shares := head.probabilities(output)) is not None:
            probabilities.append(shares.cpu().numpy())
        if progress is not None:
            progress(len(rows[-1]))
    if not rows:
        return np.empty(0, np.float32), None
    order = np.argsort(np.concatenate(rows))
    return np.concatenate(predictions)[order], np.concatenate(probabilities)[order] if probabilities else None


def _details(result: TaskResult, texts: Sequence[Sequence[str]] | None) -> dict[str, Any]:
    """A task's results as JSON values, for the report."""
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
        details["worst"] = _worst_errors(result, texts)
    return details


def _worst_errors(result: TaskResult, texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The largest errors: 1 - probability of the label for classes, |prediction - label| otherwise."""
    assert result.labels is not None
    rows = np.arange(len(result.labels))
    if result.probabilities is not None:
        size = 1 - result.probabilities[rows, result.labels.astype(np.int64)]
        rows = rows[result.predictions != result.labels]
    else:
        size = np.abs(result.predictions - result.labels)
        rows = rows[size > 0]
    rows = rows[np.argsort(-size[rows], kind="stable")][:MAX_ERRORS]
    return [
        {
            "id": result.ids[row],
            "sentences": [column[row] for column in texts],
            "label": _rounded(result.labels[row : row + 1])[0],
            "prediction": _rounded(result.predictions[row : row + 1])[0],
            "probability": None if result.probabilities is None else _finite(float(result.probabilities[row].max())),
            "error": _finite(float(size[row])),
        }
        for row in rows.tolist()
    ]


def _rounded(values: np.ndarray) -> list[Any]:
    """Numbers for JSON with at most six decimals; values that are not finite become null."""
    return [_finite(value) for value in values.tolist()]


def _finite(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
