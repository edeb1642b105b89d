# SPDX-License-Identifier: Apache-2.0
"""`PCGrad(optimizer)`: the optimizer wrapper for course code, in place of the classic Pytorch-PCGrad.

    optimizer = PCGrad(AdamW(model.parameters(), lr=2e-5))
    optimizer.pc_backward([sentiment_loss, paraphrase_loss, similarity_loss])
    optimizer.step()

By default it leaves the gradients that github.com/WeiChengTseng/Pytorch-PCGrad leaves, at less cost. Each loss takes one
ordinary backward, and only the part of a graph that several losses share is kept for them. Its gradients move straight into
their row of J, which is allocated once; nothing is flattened or filled with zeros. The projections need the Gram matrix
alone, and a parameter takes memory only for the losses that reach it.

The method of the same name, projections computed from a Gram matrix, is in pcgrad.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, distributed, nn

from minbert_fast import ops, surgery
from minbert_fast.surgery import buckets
from minbert_fast.surgery.buckets import Gradients, Reached, Rows
from minbert_fast.surgery.pcgrad import ClassicProjections
from minbert_fast.surgery.torchjd import FromTorchJD

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LEAF = "torch::autograd::AccumulateGrad"  # a node where a graph ends


class PCGrad:
    """Wraps an optimizer so that `pc_backward(losses)` leaves surgically combined gradients in `.grad`.

    The defaults are the classic's:

    reduction: how the projected gradients are combined. "mean" (default) averages them over the tasks where all losses
        reach a parameter (scope "shared": everywhere), and adds them elsewhere (a head keeps its scale). "sum" adds them.
    scope: the parameters whose gradients count in norms and inner products and are changed. "all": every parameter of
        the optimizer, heads included. "shared": those that at least two losses reach; the others keep their loss's
        gradient, as in the trainer.
    accumulate: False overwrites `.grad` (zeros where no loss reaches, frozen parameters included); True adds to it, as
        `backward` does.
    weights: the method. "classic": PCGrad with the classic's loop, which also compares a gradient with its own task's
        original. Or a name of minbert_fast.surgery.METHODS ("pcgrad" is the paper's loop, which does not), an object of
        that module, or a TorchJD `Weighting`; the last two give the weights themselves, so they take no `reduction`.
    generator: draws the task orders (default: one seeded with torch.initial_seed()); part of `state_dict`.
    process_group: several processes, each with its share of the examples (True: all of torch.distributed's). The tasks'
        gradients are averaged over them before surgery. Every process needs the same parameters and losses; run the
        forward and pc_backward of a DistributedDataParallel under `no_sync()`.
    scaler: a GradScaler for mixed precision. Without it, scale the losses and call `scaler.step(optimizer)` yourself;
        either way a gradient that is not finite makes the scaler skip the step.

    Gradients are combined in fp32 (bf16 parameters: from a J in bf16), those of float64 parameters too.
    After `pc_backward`, `gram` [T, T] holds the inner products and `task_weights` [T] the weights of the parameters that
    all losses reach (None: there was nothing to combine). Up to 64 losses. ValueError for an unknown option.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: surgery.Reduction | None = None,
        *,
        scope: Literal["all", "shared"] = "all",
        accumulate: bool = False,
        weights: str | Callable[[Tensor], Tensor] = "classic",
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | Literal[True] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if reduction not in ("sum", "mean", None):
            raise ValueError(f'reduction = {reduction!r}: expected "mean" or "sum"')
        if scope not in ("all", "shared"):
            raise ValueError(f'scope = {scope!r}: expected "all" or "shared"')
        self.optimizer = optimizer
        self.scope = scope
        self.accumulate = accumulate
        self.group = distributed.group.WORLD if process_group is True else process_group
        if self.group is not None and generator is None:  # every process draws the same orders
            seed = [torch.initial_seed()]
            distributed.broadcast_object_list(seed, group=self.group, group_src=0)
            generator = torch.Generator().manual_seed(seed[0])
        method = ClassicProjections("sum", generator) if weights == "classic" else weights
        self.weights = surgery.weights(method, "sum", generator)
        given = not isinstance(weights, str) or isinstance(self.weights, FromTorchJD)
        if given and reduction is not None:
            raise ValueError(f"reduction = {reduction!r} has no effect on weights that are given: leave it out")
        self.averages = not given and reduction != "sum"
        self._rows: Rows | None = None
        self._collected: list[Gradients] = []  # of calls with final=False
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
        """Clears the gradients, also those of calls of `pc_backward` that were not final."""
        self._collected = []
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """The optimizer's step, through the GradScaler if there is one (whose `update` stays the caller's).

        To clip, call `scaler.unscale_` before, with this object or the optimizer inside. A GradScaler that is enabled takes
        no closure: RuntimeError.
        """
        options = {} if closure is None else {"closure": closure}
        if self.scaler is not None:
            states = getattr(self.scaler, "_per_optimizer_states", {})  # by id; absent if the scaler is disabled
            if id(self) in states:  # else the step would divide the gradients by the scale a second time
                states[id(self.optimizer)] = states.pop(id(self))
            return self.scaler.step(self.optimizer, **options)
        return self.optimizer.step(**options)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the surgery's (its random generator)."""
        return {"optimizer": self.optimizer.state_dict(), "surgery": self.weights.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError, and loads nothing, if the state is of another method of surgery."""
        saved, own = ({k for k in each if "/" not in k} for each in (state["surgery"], self.weights.state_dict()))
        if saved != own:  # names with "/" are tensors that a TorchJD weighting makes in its first call
            raise ValueError(f"the state of another method of surgery: it has {sorted(saved)}, expected {sorted(own)}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.weights.load_state_dict(state["surgery"])

    def pc_backward(self, losses: Sequence[Tensor], final: bool = True) -> None:
        """Leaves the combined gradient of the tasks' losses (scalars) in the parameters' `.grad`.

        final: False only adds the tasks' gradients to those of the calls before, for micro-batches: the next final call
            combines the sums, as if all micro-batches were one batch. Scale the losses yourself.

        ValueError when there is no loss, when one is not a scalar that requires a gradient, when the losses reach other
        parameters than in the call before that was not final, or when the parameters are sharded (FSDP).
        """
        losses = list(losses)
        if not losses:
            raise ValueError("pc_backward needs at least one loss")
        for task, loss in enumerate(losses):
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"losses[{task}] must be a scalar tensor that requires a gradient")
        parameters = list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))
        if any(hasattr(p, "device_mesh") or hasattr(p, "_fsdp_flattened") for p in parameters):  # FSDP 2 and 1
            raise ValueError(
                "pc_backward needs whole parameters: FSDP gives this process a part of each, and the parts of a gradient do "
                "not tell which tasks conflict; DistributedDataParallel with process_group=True works"
            )
        before = [p.grad for p in parameters]
        try:
            tasks = self._backward_each(losses, parameters)
        except BaseException:
            self._collected = []
            raise
        finally:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient if self.accumulate or not final else None
        self._collected = [] if final else tasks
        if not final:
            return
        with torch.no_grad():
            for position, gradient in self._combine(tasks, parameters):
                p = parameters[position]
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
            for p in parameters:
                if p.grad is None and not self.accumulate and (p.is_floating_point() or p.is_complex()):
                    p.grad = torch.zeros_like(p)  # integers have no gradient

    def _backward_each(self, losses: list[Tensor], parameters: list[nn.Parameter]) -> list[Gradients]:
        """One backward a loss; each task's gradients, taken out of `.grad` into its row of J."""
        shared, reaches = _walk(losses, parameters)
        rows = self._rows_for(reaches, parameters)
        tasks: list[Gradients] = []
        for number, (loss, keep) in enumerate(zip(losses, shared, strict=True)):
            for p in parameters:
                p.grad = None
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scaled.backward(retain_graph=keep)
            found = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
            dense = {i: g.to_dense() if g.is_sparse else g for i, g in found.items()}
            tasks.append(rows.take(number, dense, self._collected[number] if self._collected else {}))
        return tasks

    def _plan(self, reaches: Sequence[Container[int]], count: int) -> tuple[Reached, list[int]]:
        """Which of `count` parameters the tasks reach, from each task's positions; and the positions to combine."""
        reached = [tuple(t for t, found in enumerate(reaches) if i in found) for i in range(count)]
        return reached, [i for i, owners in enumerate(reached) if len(owners) > (self.scope == "shared")]

    def _rows_for(self, reaches: list[set[int]], parameters: list[nn.Parameter]) -> Rows:
        """The rows of J for losses that reach the parameters at these positions: those of the last call if they fit."""
        reached, combined = self._plan(reaches, len(parameters))
        rows = self._rows
        if rows is not None and not rows.fit(parameters, reached, combined):
            rows = None
        if self._collected and (rows is None or len(reaches) != len(self._collected)):
            raise ValueError(
                "pc_backward: these losses reach other parameters than those of the call that was not final"
            )
        if rows is None:
            self._rows = None  # frees its memory first
            self._rows = rows = Rows(parameters, reached, combined)
        return rows

    def _combine(self, tasks: list[Gradients], parameters: list[nn.Parameter]) -> Iterator[tuple[int, Tensor]]:
        """Positions and final gradients of the parameters that a loss reaches; `tasks` is emptied on the way."""
        self.gram = self.task_weights = None
        reached, combined = self._plan(tasks, len(parameters))
        assert self._rows is not None
        # False: a graph hid some parameters (reentrant checkpointing), or gave them no gradient.
        foreseen = self._rows.fit(parameters, reached, combined)
        for i in set(range(len(parameters))) - set(combined):
            for owner in reached[i]:
                gradient = tasks[owner].pop(i)
                if not foreseen:  # it may lie in J, which the next call overwrites
                    gradient = gradient.to(parameters[i].dtype, copy=True)
                self._average(gradient)
                yield i, gradient
        if not combined:
            return
        home = parameters[combined[0]].device
        self.gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float32, device=home)
        pending = list(self._rows.buckets) if foreseen else buckets.gathered(tasks, parameters, reached, combined)
        for _, owners, J in pending:
            self._average(J)
            products = ops.gram(J).to(home)
            if len(owners) == len(tasks):
                self.gram += products
            else:  # element by element: an index tensor would make the host wait for a GPU
                for (a, i), (b, j) in itertools.product(enumerate(owners), repeat=2):
                    self.gram[i, j] += products[a, b]
        # A broken gradient stays visible wherever it takes part, as GradScaler expects; weight 0 would hide it.
        w = torch.where(surgery.nonfinite(self.gram), torch.nan, self.weights(self.gram))
        self.task_weights = w / len(tasks) if self.averages else w
        while pending:  # gathered ones are freed once their gradients are combined
            group, owners, J = pending.pop()
            averaged = self.scope == "shared" or len(owners) == len(tasks)
            weights = self.task_weights if averaged else w
            gradient = ops.combine(J, torch.stack([weights[t] for t in owners]).to(J.device))
            for i, piece in zip(group, buckets.split(gradient, [parameters[i] for i in group]), strict=True):
                yield i, piece.to(parameters[i].dtype)

    def _average(self, gradients: Tensor) -> None:
        """Averages over the processes, in place, in one message."""
        if self.group is not None:
            distributed.all_reduce(gradients, group=self.group)
            gradients /= self.group.size()


def _walk(losses: list[Tensor], parameters: list[nn.Parameter]) -> tuple[list[bool], list[set[int]]]:
    """Walks each loss's graph.

    Returns, by loss, whether a part of its graph (beyond the parameters themselves) belongs to a later loss too, and the
    positions of the parameters in it.
    """
    positions = {id(p): i for i, p in enumerate(parameters)}
    later: set[Any] = set()
    shared, reaches = [], []
    for loss in reversed(losses):
        nodes: set[Any] = set()
        found: set[int] = set()
        pending: list[Any] = [loss.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in nodes:
                continue
            if node.name() == _LEAF:  # a parameter; it saves nothing for a backward
                if id(node.variable) in positions:
                    found.add(positions[id(node.variable)])
                continue
            nodes.add(node)
            pending.extend(following for following, _ in node.next_functions)
        shared.append(not nodes.isdisjoint(later))
        reaches.append(found)
        later |= nodes
    return shared[::-1], reaches[::-1]
