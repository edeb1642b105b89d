# SPDX-License-Identifier: Apache-2.0
"""A stack of layers in front of a head's last one, which several tasks may share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import ConfigError, check_at_least, check_below_one
from minbert_fast.tasks.base import Head, TaskOptions


class Stack(nn.Module):
    """`depth` times linear, ReLU, dropout at constant width; x [n, H] -> [n, H]."""

    def __init__(self, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(F.relu(layer(x)), self.dropout, self.training)
        return x


@dataclass(frozen=True)
class StackOptions(TaskOptions):
    """Options of a task whose head may have a stack in front of its last layer."""

    shared_layers: str = ""  # name of a stack of linear, ReLU, dropout; tasks with the same name share it
    shared_depth: int = 2  # layers of that stack
    dropout: float = 0.1  # of the head

    def __post_init__(self) -> None:
        super().__post_init__()
        check_below_one(self, "dropout")
        check_at_least(self, 1, "shared_depth")

    def unused(self) -> dict[str, str]:
        return super().unused() | ({} if self.shared_layers else {"shared_depth": "shared_layers"})


class StackHead(Head):
    """A head that may have a stack; a stage may change its dropout."""

    stack: Stack | None

    def configure(self, options: Any) -> None:
        super().configure(options)
        if self.stack is not None:
            self.stack.dropout = options.dropout


def shared_stack(options: StackOptions, width: int, shared: dict[str, nn.Module]) -> Stack | None:
    """The stack that all heads with the same `options.shared_layers` share; None if that name is empty.

    Raises ConfigError if the name is taken or another head has set a different depth or dropout.
    """
    name, depth, dropout = options.shared_layers, options.shared_depth, options.dropout
    if not name:
        return None
    stack = shared.setdefault(name, Stack(width, depth, dropout))
    if not isinstance(stack, Stack):
        raise ConfigError(f"shared_layers = {name!r}: expected another name, this one is taken")
    if len(stack.layers) != depth or stack.dropout != dropout:
        raise ConfigError(
            f"shared_layers = {name!r}: {depth} layers with dropout {dropout} here, "
            f"{len(stack.layers)} layers with dropout {stack.dropout} in another task"
        )
    return stack
