# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained model on data files: predictions, metrics, prediction files, and details for the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minbert_fast.common.device import DTYPES, Precision
from minbert_fast.common.schema import check
from minbert_fast.common.storage import write_text
from minbert_fast.data.collate import evaluation_batches
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model.rows import PackedRows
from minbert_fast.model.snapshot import Snapshot
from minbert_fast.tasks.base import HeadOutput, Results, Task
from minbert_fast.tasks.inference.details import TaskResult, task_details
from minbert_fast.tasks.inference.predictions import write_predictions
from minbert_fast.tasks.inference.sentence_vectors import TOKEN_BUDGET
from minbert_fast.tasks.metrics import COURSE_METRICS, course_score, lower_is_better
from minbert_fast.tasks.model import MultitaskModel


def course_tasks(judged: Mapping[str, tuple[Task, Collection[str]]]) -> list[str]:
    """The tasks that the course's score counts, from every task's metrics; none if the score is the mean of all tasks.

    The score is that mean as soon as one task is the user's own: a task without a preset and a layout, whatever its name.
    """
    if not all(task.preset or any(source.layout for source in task.sources) for task, _ in judged.values()):
        return []
    return [name for name, (_, metrics) in judged.items() if COURSE_METRICS.get(name) in metrics]


@dataclass(frozen=True)
class Evaluation:
    """Results by task name."""

    tasks: dict[str, TaskResult]

    @property
    def metrics(self) -> dict[str, float]:
        """All tasks' metrics and `score`: the course's score, or the mean primary metric (see `course_tasks`).

        An error such as `price_mae` counts with a minus sign, so that a higher score is always better.
        """
        flat = {key: value for result in self.tasks.values() for key, value in result.metrics.items()}
        score = course_score(flat) if self._course else None
        if score is None:
            judging = [result.task.primary for result in self.tasks.values() if result.task.primary in flat]
            primary = [-flat[name] if lower_is_better(name) else flat[name] for name in judging]
            score = sum(primary) / len(primary) if primary else None
        return flat if score is None else flat | {"score": score}

    @property
    def scored(self) -> list[str]:
        """The tasks that `score` counts."""
        return self._course or [name for name, result in self.tasks.items() if result.metrics]

    @property
    def _course(self) -> list[str]:
        return course_tasks({name: (result.task, result.metrics) for name, result in self.tasks.items()})

    @property
    def score(self) -> float:
        """The overall score; nan without metrics."""
        return self.metrics.get("score", float("nan"))

    def write(
        self,
        directory: Path,
        texts: Mapping[str, Sequence[Sequence[str]]],
        split: str = "dev",
        train_labels: Mapping[str, np.ndarray | None] | None = None,
    ) -> None:
        """Writes the prediction files, and details.json for the report.

        `texts[task]` are the sentences of the task's file: one list [n] per sentence of an example. Without them the
        details list no errors. `train_labels[task]` are the labels that the task was trained on.
        """
        self.write_predictions(directory, split)
        trained = train_labels or {}
        details = {n: task_details(result, texts.get(n), trained.get(n)) for n, result in self.tasks.items()}
        write_text(directory / "details.json", json.dumps({"split": split, "tasks": details}, allow_nan=False) + "\n")

    def write_predictions(self, directory: Path, split: str = "dev") -> None:
        """Writes one file per task in the course's format, each atomically."""
        for result in self.tasks.values():
            path = directory / result.task.prediction_file(split)
            labels = result.task.as_labels(result.predictions)
            spaces = str.maketrans("\r\n", "  ")  # for line breaks in the name of a class
            values = [label.translate(spaces) if isinstance(label, str) else label for label in labels]
            write_predictions(path, result.task.header, result.ids, values)


def check_prediction_files(tasks: Mapping[str, Task]) -> None:
    """Raises ConfigError if two tasks would write one prediction file."""
    owners: dict[str, str] = {}
    for name, task in tasks.items():
        other = owners.setdefault(task.prediction_file("dev"), name) if task.predicts else name
        check(
            other == name,
            f"tasks.{name}: its prediction files would replace those of tasks.{other}; set another `stem`",
        )


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
            task = model.tasks[name]
            measurable = bool(len(table)) and (table.labels is not None or not task.labelled)
            found, loss = _run(model, name, table, snapshot, max_length, progress, losses=measurable)
            metrics = task.evaluate(found) if measurable else {}
            if loss is not None:
                metrics |= {f"{name}_loss": loss}
            results[name] = TaskResult(
                task=task,
                ids=list(table.ids),
                labels=table.labels,
                predictions=found.predictions,
                probabilities=found.probabilities,
                metrics=metrics,
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
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predictions [n] and probabilities [n, C] (None for a regression) of task `name`, in the order of the table's rows.

    `snapshot` is that of the model's encoder; the model must be in evaluation mode.
    """
    found, _ = _run(model, name, table, snapshot, max_length, progress, losses=False)
    return found.predictions, found.probabilities


@torch.inference_mode()
def _run(
    model: MultitaskModel,
    name: str,
    table: TokenTable,
    snapshot: Snapshot,
    max_length: int,
    progress: Callable[[int], object] | None,
    losses: bool,
) -> tuple[Results, float | None]:
    """The results of task `name` for the table's rows, in their order, and with `losses` the mean loss times its weight."""
    device = next(model.encoder.parameters()).device
    head = model.head(name)
    rows, predictions, probabilities, sums, vectors = [], [], [], [], []
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
        if losses and head.compares_rows:
            vectors.append([x.cpu().numpy() for x in output.vectors])
        if losses:
            sums.append(head.loss(output, batch.labels.get(name)).double() * len(rows[-1]))
        if progress is not None:
            progress(len(rows[-1]))
    if not rows:
        return Results(np.empty(0, np.float32), table.labels, table=table), None
    order = np.argsort(np.concatenate(rows))
    mean = float(torch.stack(sums).sum()) / len(order) * model.tasks[name].weight if sums else None
    in_order = np.concatenate(probabilities)[order] if probabilities else None
    columns = tuple(np.concatenate(column)[order] for column in zip(*vectors, strict=True))
    return Results(np.concatenate(predictions)[order], table.labels, in_order, columns, table), mean
