# SPDX-License-Identifier: Apache-2.0
"""`PCGrad(optimizer)`: the optimizer wrapper for course code, in place of the classic Pytorch-PCGrad.

    optimizer = PCGrad(AdamW(model.parameters(), lr=2e-5))
    optimizer.pc_backward([sentiment_loss, paraphrase_loss, similarity_loss])
    optimizer.step()

By default it leaves the gradients that github.com/WeiChengTseng/Pytorch-PCGrad leaves, at less cost. Each loss takes one
ordinary backward, and only the part of a graph that several losses share is kept for them. The projections need the Gram
matrix alone, and a parameter takes memory only for the losses that reach it.

The method of the same name, projections computed from a Gram matrix, is in pcgrad.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minbert_fast import ops, surgery
from minbert_fast.common import huge_pages
from minbert_fast.surgery.pcgrad import ClassicProjections
from minbert_fast.surgery.torchjd import FromTorchJD

# Elements of one task's gradients that are gathered at a time. Larger buckets are no faster; smaller ones save memory.
_BUCKET = 1 << 24

_Gradients = dict[int, Tensor]  # of one task, by the parameter's position


class PCGrad:
    """Wraps an optimizer so that `pc_backward(losses)` leaves surgically combined gradients in `.grad`.

    The defaults are the classic's:

    reduction: how the projected gradients are combined. "mean" averages them over the tasks where all losses reach a
        parameter, and adds them elsewhere (a head keeps its scale). "sum" adds them everywhere.
    scope: the parameters whose gradients count in norms and inner products and are changed. "all": every parameter of
        the optimizer, heads included. "shared": those that at least two losses reach; the others keep their loss's
        gradient, as in the trainer.
    accumulate: False overwrites `.grad` (zeros where no loss reaches, frozen parameters included); True adds to it, as
        `backward` does.
    weights: the method. "classic": PCGrad with the classic's loop, which also compares a gradient with its own task's
        original. Or a name of minbert_fast.surgery.METHODS ("pcgrad" is the paper's loop, which does not), an object of
        that module, or a TorchJD `Weighting`; `reduction` has no effect on the last two.
    generator: draws the task orders (default: one seeded with torch.initial_seed()); part of `state_dict`.
    scaler: a GradScaler for mixed precision. Without it, scale the losses and call `scaler.step(optimizer)` yourself;
        either way a gradient that is not finite makes the scaler skip the step.

    After `pc_backward`, `gram` [T, T] holds the inner products and `task_weights` [T] the weights of the parameters that
    all losses reach (None: there was nothing to combine). Up to 64 losses. ValueError for an unknown option.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: surgery.Reduction = "mean",
        *,
        scope: Literal["all", "shared"] = "all",
        accumulate: bool = False,
        weights: str | Callable[[Tensor], Tensor] = "classic",
        generator: torch.Generator | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction = {reduction!r}: expected "mean" or "sum"')
        if scope not in ("all", "shared"):
            raise ValueError(f'scope = {scope!r}: expected "all" or "shared"')
        self.optimizer = optimizer
        self.scope = scope
        self.accumulate = accumulate
        method = ClassicProjections("sum", generator) if weights == "classic" else weights
        self.weights = surgery.weights(method, "sum", generator)
        self.averages = reduction == "mean" and isinstance(weights, str) and not isinstance(self.weights, FromTorchJD)
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
        """Leaves the combined gradient of the tasks' losses (scalars) in the parameters' `.grad`.

        ValueError when there is no loss, or one is not a scalar that requires a gradient.
        """
        losses = list(losses)
        if not losses:
            raise ValueError("pc_backward needs at least one loss")
        for task, loss in enumerate(losses):
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"losses[{task}] must be a scalar tensor that requires a gradient")
        parameters = list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))
        before = [p.grad if self.accumulate else None for p in parameters]
        try:
            tasks = self._backward_each(losses, parameters)
        finally:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient
        with torch.no_grad():
            for position, gradient in self._combine(tasks, parameters):
                p = parameters[position]
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
            for p in parameters:
                if p.grad is None and not self.accumulate:
                    p.grad = torch.zeros_like(p)

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
        """Positions and final gradients of the parameters that a loss reaches; `tasks` is emptied on the way."""
        self.gram = self.task_weights = None
        reached = {i: tuple(t for t, g in enumerate(tasks) if i in g) for i in range(len(parameters))}
        combined = [i for i, owners in reached.items() if len(owners) > (self.scope == "shared")]
        for i in reached.keys() - set(combined):
            for owner in reached[i]:
                yield i, tasks[owner].pop(i)
        if not combined:
            return
        home = parameters[combined[0]].device
        self.gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float32, device=home)
        groups = list(_groups(parameters, reached, combined))
        buckets = [(group, reached[group[0]], _gather(tasks, reached[group[0]], group)) for group in groups]
        for _, owners, J in buckets:
            products = ops.gram(J).to(home)
            if len(owners) == len(tasks):
                self.gram += products
            else:  # element by element: an index tensor would make the host wait for a GPU
                for (a, i), (b, j) in itertools.product(enumerate(owners), repeat=2):
                    self.gram[i, j] += products[a, b]
        self.weights.prepare(len(tasks), home)
        # A broken gradient stays visible wherever it takes part, as GradScaler expects; weight 0 would hide it.
        w = torch.where(surgery.nonfinite(self.gram), torch.nan, self.weights(self.gram))
        self.task_weights = w / len(tasks) if self.averages else w
        while buckets:  # each is freed once its gradients are combined
            group, owners, J = buckets.pop()
            averaged = self.scope == "shared" or len(owners) == len(tasks)
            weights = self.task_weights if averaged else w
            gradient = ops.combine(J, torch.stack([weights[t] for t in owners]).to(J.device))
            sizes = [parameters[i].numel() for i in group]
            for i, piece in zip(group, gradient.split(sizes), strict=True):
                yield i, piece.view_as(parameters[i]).to(parameters[i].dtype)


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


def _groups(
    parameters: list[nn.Parameter], reached: dict[int, tuple[int, ...]], positions: list[int]
) -> Iterator[list[int]]:
    """The positions of parameters that share a bucket: one device, dtype and set of tasks, up to _BUCKET elements."""
    kinds: dict[Any, list[int]] = {}
    for i in positions:
        kinds.setdefault((parameters[i].device, parameters[i].dtype, reached[i]), []).append(i)
    for members in kinds.values():
        group: list[int] = []
        size = 0
        for i in members:
            count = parameters[i].numel()
            if group and size + count > _BUCKET:
                yield group
                group, size = [], 0
            group.append(i)
            size += count
        yield group


def _gather(tasks: list[_Gradients], owners: tuple[int, ...], positions: list[int]) -> Tensor:
    """Moves the gradients of these parameters, which the tasks `owners` reach, into one J [len(owners), n]."""
    example = [tasks[owners[0]][i] for i in positions]
    sizes = [g.numel() for g in example]
    dtype = torch.bfloat16 if example[0].dtype == torch.bfloat16 else torch.float32
    J = huge_pages.empty(len(owners), sum(sizes), dtype=dtype, device=example[0].device)
    del example
    for row, owner in zip(J, owners, strict=True):
        for i, piece in zip(positions, row.split(sizes), strict=True):
            gradient = tasks[owner].pop(i)
            piece.view(gradient.shape).copy_(gradient)
    return J
