# SPDX-License-Identifier: Apache-2.0
"""All that a run is at one moment, as a checkpoint holds it: counters and scores, and tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minbert_fast.trainer.checkpoint import Checkpoint

if TYPE_CHECKING:
    from minbert_fast.step.stepping import TrainingStep


@dataclass
class State:
    """Where a run stands. JSON-able; with the tensors, all that a checkpoint holds."""

    step: int = 0  # of the whole run
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: int = -1  # step of the last evaluation that was due
    stage_best: float | None = None  # best score of this stage
    stale: int = 0  # evaluations of this stage since its best one
    best: dict[str, Any] | None = None  # {"step", "score" (None: not a number), "metrics"}
    untrained: dict[str, float | None] | None = None
    skipped: dict[str, int] = field(default_factory=dict)  # skipped steps by task
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    record: dict[str, Any] | None = None  # the line of metrics.jsonl of this very step
    timings: dict[str, float] = field(default_factory=dict)

    def begin_stage(self, index: int) -> None:
        """Counts from the start of another stage."""
        self.stage, self.stage_step, self.stage_best, self.stale = index, 0, None, 0


def gather(model: nn.Module, step: TrainingStep) -> tuple[dict[str, Tensor], Any]:
    """All tensors of a run under distinct names, and the step's scalars."""
    state = step.state_dict()
    tensors = {f"model/{name}": tensor for name, tensor in _parameters(model).items()}
    tensors |= {f"step/{name}": tensor for name, tensor in state["tensors"].items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors, state["scalars"]


def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies the model's tensors out of a checkpoint's."""
    with torch.no_grad():
        for name, parameter in _parameters(model).items():
            parameter.copy_(tensors[f"model/{name}"])


def restore(step: TrainingStep, checkpoint: Checkpoint) -> None:
    """Gives the step its state, and the random generators theirs."""
    tensors = {n.removeprefix("step/"): t for n, t in checkpoint.tensors.items() if n.startswith("step/")}
    step.load_state_dict({"tensors": tensors, "scalars": checkpoint.state["step"]})
    torch.set_rng_state(checkpoint.tensors["random/cpu"])
    if "random/cuda" in checkpoint.tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(checkpoint.tensors["random/cuda"])


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
