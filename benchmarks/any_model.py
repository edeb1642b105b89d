# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery on models that are not ours: a training step with `PCGrad`, with TorchJD and with the classic loop.

Three losses of one graph, on a multilayer perceptron and on a residual network of 26 million parameters. Each candidate
takes a whole step: forward, backward, PCGrad over all parameters, SGD. "summed losses" is the step without surgery.

    ours            minbert_fast.PCGrad
    TorchJD         autojac.backward over all losses at once, jac_to_grad with its PCGrad
    classic loop    Pytorch-PCGrad's algorithm: a backward of the whole graph per loss, flattened copies, a loop over pairs
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Candidate, Ceilings, Row
from minbert_fast import PCGrad
from minbert_fast.common.provenance import package_version
from minbert_fast.step.naive import pcgrad

TASKS = 3
LR = 1e-3
timed = partial(harness.measure, repeats=5, seconds=90.0)


class Perceptron(nn.Module):
    """Four layers of 1,024 and a head a task: 3.7 million parameters; 64 examples of 512 numbers."""

    def __init__(self, width: int = 1024, features: int = 512) -> None:
        super().__init__()
        sizes = [features, width, width, width, width]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(TASKS))
        self.example = (64, features)

    def forward(self, x: Tensor) -> list[Tensor]:
        shared = self.trunk(x)
        return [head(shared) for head in self.heads]


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut (He et al. 2016, arXiv:1512.03385, figure 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.convolutions[0](x)))
        return torch.relu(x + self.norms[1](self.convolutions[1](inner)))


class Residual(nn.Module):
    """Blocks at 64 to 512 channels and a head a task: 26 million parameters; 8 images of 32 x 32."""

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512), blocks: Sequence[int] = (2, 3, 4, 4)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, count in zip(channels, blocks, strict=True):
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [Block(width) for _ in range(count)]
            before = width
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(before, 10) for _ in range(TASKS))
        self.example = (8, 3, 32, 32)

    def forward(self, x: Tensor) -> list[Tensor]:
        shared = self.trunk(x).mean((2, 3))
        return [head(shared) for head in self.heads]


MODELS: dict[str, Callable[[], nn.Module]] = {"perceptron": Perceptron, "residual network": Residual}


def run(device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """One case a model."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().to(device)
        count = sum(p.numel() for p in model.parameters())
        title = f"{name}, {count / 1e6:.1f}M parameters, {TASKS} losses"
        candidates = {key: Candidate(way.step, way.check) for key, way in ways(model, device).items()}
        others = [key for key in candidates if key != "ours"]
        yield from harness.case("any_model", title, candidates, device, ceilings, timer=timed, baselines=others)


@dataclass
class Way:
    """One way to take a step. `gradients` leaves the combined gradients in the parameters' `.grad`."""

    model: nn.Module
    batch: tuple[Tensor, list[Tensor]]
    gradients: Callable[[list[Tensor]], object]
    optimizer: torch.optim.Optimizer
    expected: Callable[[], list[Tensor]] | None = None

    def losses(self) -> list[Tensor]:
        x, labels = self.batch
        return [nn.functional.cross_entropy(y, label) for y, label in zip(self.model(x), labels, strict=True)]

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.gradients(self.losses())
        self.optimizer.step()

    def check(self) -> None:
        """Compares the gradients with those of the classic loop with two losses, where the random order has no effect."""
        if self.expected is None:
            self.step()
            return
        self.optimizer.zero_grad()
        self.gradients(self.losses()[:2])
        wanted = self.expected()
        error = sum(float((p.grad - g).square().sum()) for p, g in zip(self.model.parameters(), wanted, strict=True)
                    if p.grad is not None)  # fmt: skip
        size = sum(float(g.square().sum()) for g in wanted)
        assert error <= 1e-6 * size, f"gradients differ from the classic loop's by {(error / size) ** 0.5:.1e}"
        self.step()


def ways(model: nn.Module, device: torch.device) -> dict[str, Way]:
    """The candidates, each with its own copy of the model and the same batch."""
    size: Sequence[int] = model.example  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*size, generator=generator).to(device)
    batch = x, [torch.randint(10, (size[0],), generator=generator).to(device) for _ in range(TASKS)]

    def copied() -> tuple[nn.Module, torch.optim.Optimizer]:
        own = copy.deepcopy(model)
        return own, torch.optim.SGD(own.parameters(), lr=LR)

    def expected() -> list[Tensor]:
        own, optimizer = copied()
        way = Way(own, batch, partial(classic, list(own.parameters())), optimizer)
        way.gradients(way.losses()[:2])
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in own.parameters()]

    found = {}
    own, optimizer = copied()
    wrapped = PCGrad(optimizer)
    found["ours"] = Way(own, batch, wrapped.pc_backward, optimizer, expected)
    if package_version("torchjd"):
        from torchjd import aggregation, autojac

        own, optimizer = copied()
        found["TorchJD"] = Way(own, batch, partial(through_torchjd, own, autojac, aggregation.PCGrad()), optimizer)
    own, optimizer = copied()
    found["classic loop"] = Way(own, batch, partial(classic, list(own.parameters())), optimizer)
    own, optimizer = copied()
    found["summed losses"] = Way(own, batch, lambda losses: torch.stack(losses).sum().backward(), optimizer)
    return found


def through_torchjd(model: nn.Module, autojac: object, aggregator: object, losses: list[Tensor]) -> None:
    """Jacobians of all losses in one call, then PCGrad over all parameters; heads have rows of zeros."""
    autojac.backward(losses)  # type: ignore[attr-defined]
    autojac.jac_to_grad(model.parameters(), aggregator)  # type: ignore[attr-defined]


def classic(parameters: list[nn.Parameter], losses: list[Tensor]) -> None:
    """Pytorch-PCGrad's algorithm: zeros where a loss does not reach a parameter, averages where all of them do."""
    flat, reached = [], []
    for loss in losses:
        for p in parameters:
            p.grad = None
        loss.backward(retain_graph=True)
        reached.append([p.grad is not None for p in parameters])
        flat.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
    orders = [random.sample(range(len(losses)), len(losses)) for _ in losses]
    total = pcgrad(flat, orders)
    everywhere = [all(task[i] for task in reached) for i in range(len(parameters))]
    for p, piece, shared in zip(parameters, total.split([p.numel() for p in parameters]), everywhere, strict=True):
        p.grad = (piece / len(losses) if shared else piece).view_as(p)
