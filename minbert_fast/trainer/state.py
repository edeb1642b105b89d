# SPDX-License-Identifier: Apache-2.0
"""The state of a run that a checkpoint holds: counters and scores as JSON, tensors by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minbert_fast.trainer.checkpoint import Checkpoint

if TYPE_CHECKING:
    from minbert_fast.step.stepping import TrainingStep


@dataclass
class State:
    """Counters and scores of a run. JSON-able; the field names are keys of checkpoints/*/state.json."""

    step: int = 0  # over all stages
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: int = -1  # step of the last scheduled evaluation
    stage_best: float | None = None  # best score of this stage
    stale: int = 0  # evaluations since this stage's best score
    best: dict[str, Any] | None = None  # {"step", "score" (None if not finite), "metrics"}
    untrained: dict[str, float | None] | None = None
    skipped: dict[str, int] = field(default_factory=dict)  # skipped steps by task
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    record: dict[str, Any] | None = None  # this step's line of metrics.jsonl
    timings: dict[str, float] = field(default_factory=dict)  # seconds by part

    def begin_stage(self, index: int) -> None:
        """Resets the counters that belong to one stage."""
        self.stage, self.stage_step, self.stage_best, self.stale = index, 0, None, 0


def collect_tensors(model: nn.Module, step: TrainingStep) -> tuple[dict[str, Tensor], Any]:
    """All tensors of a run (model, optimizer, random generators) by unique name, and the scalars of the step."""
    state = step.state_dict()
    tensors = {f"model/{name}": tensor for name, tensor in _parameters(model).items()}
    tensors |= {f"step/{name}": tensor for name, tensor in state["tensors"].items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors, state["scalars"]


def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies the checkpoint's parameters and buffers into the model."""
    with torch.no_grad():
        for name, parameter in _parameters(model).items():
            parameter.copy_(checkpoint.tensors[f"model/{name}"])


def load_step(step: TrainingStep, checkpoint: Checkpoint) -> None:
    """Restores the step's state and the random generators."""
    tensors = {n.removeprefix("step/"): t for n, t in checkpoint.tensors.items() if n.startswith("step/")}
    step.load_state_dict({"tensors": tensors, "scalars": checkpoint.state["step"]})
    torch.set_rng_state(checkpoint.tensors["random/cpu"])
    if "random/cuda" in checkpoint.tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(checkpoint.tensors["random/cuda"])


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied parameters appear once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
