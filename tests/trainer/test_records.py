# SPDX-License-Identifier: Apache-2.0
"""A step's results on the host: which task each number belongs to, and which tasks a skipped step names."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.packing import pack
from minbert_fast.step.stepping import StepResult
from minbert_fast.trainer.records import Observation, Observer

TASKS = ("a", "b", "c")


def observed(norm: float, weights: Tensor | None = None) -> Observation:
    """A step of three tasks, of which b has no examples."""
    sizes = {"a": 1, "b": 0, "c": 2}
    packed = pack([[[5, 6]] * n for n in sizes.values()])
    batch = MultitaskBatch(packed, TASKS, dict.fromkeys(TASKS, 1), {}, {n: np.arange(k) for n, k in sizes.items()})
    gram = torch.tensor([[4.0, 0.0, -3.0], [0.0, 0.0, 0.0], [-3.0, 0.0, 9.0]])
    result = StepResult(torch.tensor([0.5, 0.0, 2.0]), torch.tensor(norm), gram, torch.zeros(3).bool(), weights)
    observer = Observer()
    observer.add(7, batch, result)
    return observer.fetch()[0]


def test_a_task_without_examples_has_no_loss_and_no_cosine() -> None:
    seen = observed(1.5)
    assert (seen.step, seen.losses, seen.grad_norm, seen.skipped) == (7, {"a": 0.5, "c": 2.0}, 1.5, ())
    assert (seen.cosines, seen.conflicts, seen.weights) == ({"a|c": -0.5}, 1.0, {})


def test_dynamic_weights_stand_before_the_gram_matrix() -> None:
    seen = observed(1.5, torch.tensor([0.25, 0.5, 0.75]))
    assert (seen.weights, seen.cosines) == ({"a": 0.25, "b": 0.5, "c": 0.75}, {"a|c": -0.5})


def test_a_sum_of_gradients_that_overflows_is_every_present_tasks() -> None:
    """Each task's own gradient is finite."""
    assert observed(math.inf).skipped == ("a", "c")
