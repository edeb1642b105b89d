# SPDX-License-Identifier: Apache-2.0
"""Tasks on top of the encoder, one file per kind: options, head, loss, metrics, prediction format.

To add a kind, add a file like `regression.py` and import it here.
"""

from minbert_fast.tasks import (  # noqa: F401  (each registers its kind)
    classification,
    contrastive,
    multilabel,
    pair_classification,
    pair_regression,
    pretraining,
    ranking,
    regression,
)
from minbert_fast.tasks.base import Head, HeadOutput, Task, TaskInput, TaskOptions, build_task, is_kind, register
from minbert_fast.tasks.consistency import ConsistencyLoss
from minbert_fast.tasks.guess import guess_kind
from minbert_fast.tasks.model import MultitaskModel, build_tasks

__all__ = [
    "ConsistencyLoss",
    "Head",
    "HeadOutput",
    "MultitaskModel",
    "Task",
    "TaskInput",
    "TaskOptions",
    "build_task",
    "build_tasks",
    "guess_kind",
    "is_kind",
    "register",
]
