# SPDX-License-Identifier: Apache-2.0
"""Tasks on top of the encoder: kinds of tasks with their heads, losses and metrics; inference; exports."""

from minbert_fast.tasks import kinds  # noqa: F401  (registers them)
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
