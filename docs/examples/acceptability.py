# SPDX-License-Identifier: Apache-2.0
"""A new task in one file: is a sentence good English? Two classes, scored by Matthews' correlation (CoLA).

    python docs/examples/acceptability.py train --data DIR --recipe docs/examples/acceptability.toml --output runs/cola

DIR holds cola-train.csv and cola-dev.csv: tab-separated, with columns id, sentence and acceptable (0 or 1).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast import evaluate, train
from minbert_fast.common import cli
from minbert_fast.data import FileFormat, Label, add_format
from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import Head, HeadOutput, Task, TaskInput, TaskOptions, register

# 1. The format of its files, {stem}-train.csv and {stem}-dev.csv.
add_format(FileFormat("acceptability", "cola", ("sentence",), Label("acceptable", 0, 1, True, "int64")))


# 2. Its options under [tasks.acceptability] in a recipe, in addition to those of every task.
@dataclass(frozen=True)
class AcceptabilityOptions(TaskOptions):
    dropout: float = 0.1


# 3. From sentence embeddings to scores, loss and predictions.
class AcceptabilityHead(Head):
    def __init__(self, options: AcceptabilityOptions, config: BertConfig) -> None:
        super().__init__()
        self.options = options
        self.output = nn.Linear(config.hidden_size, 2)

    def forward(self, inputs: TaskInput) -> HeadOutput:
        (x,) = inputs.embeddings  # one sentence per example: [n, H]
        return HeadOutput(self.output(F.dropout(x, self.options.dropout, self.training)))

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return F.cross_entropy(output.scores, labels)

    def predict(self, output: HeadOutput) -> Tensor:
        return output.scores.argmax(-1)

    def probabilities(self, output: HeadOutput) -> Tensor:
        return output.scores.softmax(-1)


# 4. The task itself: files, sentences per example, metric.
@register("acceptability")
@dataclass(frozen=True)
class AcceptabilityTask(Task):
    options: AcceptabilityOptions

    Options: ClassVar[type] = AcceptabilityOptions
    stem: ClassVar[str] = "cola"
    header: ClassVar[str] = "Predicted_Acceptable"
    dataset: ClassVar[str] = "acceptability"  # type: ignore[misc]  # a property of the base class
    arity: ClassVar[int] = 1  # type: ignore[misc]
    class_names: ClassVar[tuple[str, ...]] = ("unacceptable", "acceptable")  # type: ignore[misc]

    @property
    def primary(self) -> str:
        return f"{self.name}_matthews"

    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> AcceptabilityHead:
        return AcceptabilityHead(self.options, config)

    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        assert labels is not None
        varied = len(np.unique(predictions)) > 1 and len(np.unique(labels)) > 1
        correlation = float(np.corrcoef(predictions, labels)[0, 1]) if varied else 0.0
        return {self.primary: correlation, f"{self.name}_accuracy": float((predictions == labels).mean())}


# 5. The package's commands, which now know the task.
def main(arguments: Sequence[str]) -> None:
    commands = {"train": train.main, "evaluate": evaluate.main}
    if not arguments or arguments[0] not in commands:
        raise ValueError(f"expected one of {', '.join(commands)}, then its flags")
    commands[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(cli.run(main))
