# SPDX-License-Identifier: Apache-2.0
"""`PCGrad(optimizer)`: gradient surgery for course code, with the interface of the classic implementation.

    optimizer = PCGrad(AdamW(model.parameters(), lr=2e-5))
    optimizer.zero_grad()
    optimizer.pc_backward([sentiment_loss, paraphrase_loss, similarity_loss])
    optimizer.step()

Each loss takes one ordinary backward; the part of a graph that several losses share is kept for them, and only that.
Surgery acts on the parameters that at least two losses reach; a parameter that one loss alone reaches (a head) keeps
that loss's gradient, and one that none reaches keeps none. Mixed precision: pass a GradScaler as `scaler`, or scale the
losses and call `scaler.step(optimizer)` yourself; a gradient that is not finite makes the scaler skip the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minbert_fast import surgery
from minbert_fast.common import huge_pages
from minbert_fast.ops import surgery as ops

# Elements of one task's gradients that are gathered at a time: large enough for full speed, small beside the model.
_BUCKET = 1 << 24

_Gradients = dict[int, Tensor]  # of one task, by the parameter's position


@dataclass
class _Bucket:
    """Some shared parameters' gradients, gathered: J [T, n]."""

    parameters: list[int]
    J: Tensor


class PCGrad:
    """Wraps an optimizer so that `pc_backward(losses)` leaves surgically combined gradients in `.grad`.

    reduction: "sum" (default) or "mean" of the projected gradients. weights: the surgery method, a name of
    minbert_fast.surgery.METHODS, an object of that module, or a TorchJD `Weighting`. generator: draws the task orders
    (default: one seeded with torch.initial_seed()); its state is part of `state_dict`. Up to 64 losses.

    After `pc_backward`, `gram` [T, T] and `task_weights` [T] hold what was found and decided (None: nothing is shared).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: surgery.Reduction = "sum",
        weights: str | Callable[[Tensor], Tensor] = "pcgrad",
        generator: torch.Generator | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.weights = surgery.weights(weights, reduction, generator)
        self.scaler = scaler
        self.gram: Tensor | None = None
        self.task_weights: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """The optimizer's step, through the GradScaler if there is one (whose `update` stays the caller's)."""
        if self.scaler is not None:
            return self.scaler.step(self.optimizer)
        return self.optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the surgery's (its random generator)."""
        return {"optimizer": self.optimizer.state_dict(), "surgery": self.weights.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.weights.load_state_dict(state["surgery"])

    def pc_backward(self, losses: Sequence[Tensor]) -> None:
        """Adds the combined gradient of the tasks' losses (scalars) to the parameters' `.grad`.

        ValueError when there is no loss, or one is not a scalar that requires a gradient.
        """
        losses = list(losses)
        if not losses:
            raise ValueError("pc_backward needs at least one loss")
        for task, loss in enumerate(losses):
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"losses[{task}] must be a scalar tensor that requires a gradient")
        parameters = list(dict.fromkeys(p for group in self.param_groups for p in group["params"] if p.requires_grad))
        before = [p.grad for p in parameters]
        try:
            tasks = self._backward_each(losses, parameters)
        finally:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient
        with torch.no_grad():
            for position, gradient in self._combine(tasks, parameters):
                p = parameters[position]
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)

    def _backward_each(self, losses: list[Tensor], parameters: list[nn.Parameter]) -> list[_Gradients]:
        """One backward a loss; each task's gradients, taken out of `.grad`."""
        tasks: list[_Gradients] = []
        for loss, keep in zip(losses, _shared_with_later(losses), strict=True):
            for p in parameters:
                p.grad = None
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scaled.backward(retain_graph=keep)
            found = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
            tasks.append({i: g.to_dense() if g.is_sparse else g for i, g in found.items()})
        return tasks

    def _combine(self, tasks: list[_Gradients], parameters: list[nn.Parameter]) -> Iterator[tuple[int, Tensor]]:
        """Positions and gradients: unchanged where one task owns the parameter, combined where several share it."""
        self.gram = self.task_weights = None
        shared = []
        for position in range(len(parameters)):
            owners = [task for task in tasks if position in task]
            if len(owners) > 1:
                shared.append(position)
            elif owners:
                yield position, owners[0].pop(position)
        if not shared:
            return
        home = parameters[shared[0]].device
        self.gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float32, device=home)
        buckets = [_gather(tasks, group) for group in _groups([parameters[i] for i in shared], shared)]
        for bucket in buckets:
            if bucket.J.device == home:
                ops.gram(bucket.J, self.gram, accumulate=True)
            else:
                self.gram += ops.gram(bucket.J).to(home)
        self.weights.prepare(len(tasks), home)
        # A broken gradient stays visible in every shared parameter, as GradScaler expects; weight 0 would hide it.
        w = torch.where(surgery.nonfinite(self.gram), torch.nan, self.weights(self.gram))
        self.task_weights = w
        for bucket in buckets:
            combined = ops.combine(bucket.J, w.to(bucket.J.device))
            sizes = [parameters[i].numel() for i in bucket.parameters]
            for position, piece in zip(bucket.parameters, combined.split(sizes), strict=True):
                yield position, piece.view_as(parameters[position]).to(parameters[position].dtype)


def _shared_with_later(losses: list[Tensor]) -> list[bool]:
    """Whether a part of each loss's graph (beyond the parameters themselves) belongs to a later loss too."""
    later: set[Any] = set()
    shared = []
    for loss in reversed(losses):
        nodes, pending = set(), [loss.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in nodes or hasattr(node, "variable"):  # a parameter saves nothing for a backward
                continue
            nodes.add(node)
            pending.extend(following for following, _ in node.next_functions)
        shared.append(not nodes.isdisjoint(later))
        later |= nodes
    return shared[::-1]


def _groups(parameters: list[nn.Parameter], positions: list[int]) -> Iterator[list[int]]:
    """The positions of parameters that are gathered together: one device and dtype, up to _BUCKET elements."""
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, int]]] = {}
    for p, position in zip(parameters, positions, strict=True):
        kinds.setdefault((p.device, p.dtype), []).append((position, p.numel()))
    for members in kinds.values():
        group: list[int] = []
        size = 0
        for position, count in members:
            if group and size + count > _BUCKET:
                yield group
                group, size = [], 0
            group.append(position)
            size += count
        yield group


def _gather(tasks: list[_Gradients], positions: list[int]) -> _Bucket:
    """Moves the tasks' gradients of these parameters into one J; a task that did not reach a parameter has zeros."""
    example = [next(task[i] for task in tasks if i in task) for i in positions]
    dtype = torch.bfloat16 if example[0].dtype == torch.bfloat16 else torch.float32
    J = huge_pages.empty(len(tasks), sum(g.numel() for g in example), dtype=dtype, device=example[0].device)
    for row, task in zip(J, tasks, strict=True):
        for i, piece in zip(positions, row.split([g.numel() for g in example]), strict=True):
            gradient = task.pop(i, None)
            if gradient is None:
                piece.zero_()
            else:
                piece.view(gradient.shape).copy_(gradient)
    return _Bucket(positions, J)
