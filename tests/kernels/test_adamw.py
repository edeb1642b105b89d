# SPDX-License-Identifier: Apache-2.0
"""adamw kernels against the course's and torch's own AdamW, dense and by rows, joined with the surgery weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minbert_fast.kernels.adamw import Options, adamw, adamw_rows
from minbert_fast.step import naive

COUNT = 1500  # more than one program, and a tail


def scalars(lr: float, step: int, scale: float = 1.0, skip: float = 0.0, *, device: torch.device) -> Tensor:
    return torch.tensor([lr, step, scale, skip], device=device)


def draw(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def expected(start: Tensor, gradients: list[Tensor], lr: float, options: Options) -> Tensor:
    """The parameters after these steps, in fp64, by the reference optimizers."""
    parameter = nn.Parameter(start.double())
    settings = {"betas": options.betas, "eps": options.eps, "weight_decay": options.weight_decay}
    optimizer: torch.optim.Optimizer
    if options.torch_style:
        optimizer = torch.optim.AdamW([parameter], lr=lr, **settings)  # type: ignore[arg-type]
    else:
        optimizer = naive.AdamW([parameter], lr=lr, correct_bias=options.correct_bias, **settings)  # type: ignore[arg-type]
    for gradient in gradients:
        parameter.grad = gradient.double()
        optimizer.step()
    return parameter.detach()


def assert_steps_agree(actual: Tensor, wanted: Tensor, start: Tensor) -> None:
    """What was learned agrees to fp32 rounding: of the parameter itself, and of the steps' own arithmetic."""
    moved = (wanted - start.double()).abs()
    allowed = 4 * torch.finfo(torch.float32).eps * wanted.abs() + 1e-5 * moved
    assert ((actual.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(weight_decay=0.01),
        Options(weight_decay=0.01, correct_bias=False),
        Options(weight_decay=0.01, eps=1e-8, torch_style=True),
        Options(betas=(0.8, 0.95)),
    ],
    ids=["course", "decay", "no correction", "torch", "betas"],
)
def test_follows_the_reference(options: Options, device: torch.device) -> None:
    start = draw(COUNT, seed=0, device=device)
    gradients = [draw(COUNT, seed=1 + step, device=device) for step in range(4)]
    p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    copy = torch.empty(COUNT, dtype=torch.bfloat16, device=device)
    for step, gradient in enumerate(gradients, 1):
        adamw(p, m, v, gradient[None], None, copy, scalars(1e-2, step, device=device), options)
    assert_steps_agree(p, expected(start, gradients, 1e-2, options), start)
    assert (copy.float() - p).abs().max() <= p.abs().max() * 2**-7


@pytest.mark.parametrize("step", [1, 2, 10, 299, 301, 5000, 10**6])
@pytest.mark.parametrize("torch_style", [False, True])
def test_bias_correction_at_any_step(step: int, torch_style: bool, device: torch.device) -> None:
    """1 - beta^t must not cancel near t = 1, nor jump where its formula changes."""
    options = Options(torch_style=torch_style, eps=1e-6)
    p, m, v = (torch.full((4,), value, device=device) for value in (0.0, 0.3, 0.04))
    adamw(p, m, v, torch.full((1, 4), 0.1, device=device), None, None, scalars(1.0, step, device=device), options)
    moment, square = 0.9 * 0.3 + 0.1 * 0.1, 0.999 * 0.04 + 0.001 * 0.1**2
    first, second = 1 - 0.9**step, math.sqrt(1 - 0.999**step)
    if torch_style:
        wanted = -moment / first / (math.sqrt(square) / second + 1e-6)
    else:
        wanted = -second / first * moment / (math.sqrt(square) + 1e-6)
    torch.testing.assert_close(p, torch.full_like(p, wanted), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_combines_the_tasks(tasks: int, dtype: torch.dtype, device: torch.device) -> None:
    """w J in one pass is the step with the combined, scaled gradient."""
    start = draw(COUNT, seed=0, device=device)
    j = draw(tasks, COUNT + 16, seed=1, device=device).to(dtype)[:, :COUNT]
    w = draw(tasks, seed=2, device=device)
    p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    options = Options(weight_decay=0.01, lr_factor=0.5)
    adamw(p, m, v, j, w, None, scalars(2e-2, 1, 0.25, device=device), options)
    combined = 0.25 * (w.double() @ j.double())
    torch.testing.assert_close(m.double(), 0.1 * combined, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(v.double(), 0.001 * combined.square(), rtol=1e-4, atol=1e-9)
    wanted = expected(start, [combined], 1e-2, replace(options, lr_factor=1.0))
    near_zero = combined.abs() < 1e-2  # there m / sqrt(v) turns rounding of w J into a whole step
    assert_steps_agree(p[~near_zero], wanted[~near_zero], start[~near_zero])


def test_weight_zero_hides_a_task(device: torch.device) -> None:
    """A task whose gradient is not finite has no say when its weight is 0."""
    j = torch.stack([draw(COUNT, seed=1, device=device), torch.full((COUNT,), math.nan, device=device)])
    state = [torch.zeros(COUNT, device=device) for _ in range(3)]
    alone = [torch.zeros(COUNT, device=device) for _ in range(3)]
    numbers = scalars(1e-2, 1, device=device)
    adamw(*state, j, torch.tensor([1.0, 0.0], device=device), None, numbers, Options())
    adamw(*alone, j[:1], None, None, numbers, Options())
    assert all(torch.equal(a, b) for a, b in zip(state, alone, strict=True))


def test_skip_changes_nothing(device: torch.device) -> None:
    state = [draw(COUNT, seed=s, device=device) for s in range(3)]
    copy = draw(COUNT, seed=4, device=device).bfloat16()
    before = [t.clone() for t in (*state, copy)]
    gradient = torch.full((1, COUNT), math.nan, device=device)
    adamw(*state, gradient, None, copy, scalars(1e-2, 1, skip=1.0, device=device), Options())
    assert all(torch.equal(a, b) for a, b in zip((*state, copy), before, strict=True))


@pytest.mark.parametrize("width", [64, 100, 384])
@pytest.mark.parametrize("weighted", [False, True])
def test_by_rows_is_the_dense_step(width: int, weighted: bool, device: torch.device) -> None:
    """Bit for bit: untouched rows too, whose moments decay and whose weights move on."""
    rows, slots = 23, 5
    tasks = 3 if weighted else 1
    row_slot = torch.full((rows,), -1, dtype=torch.int32, device=device)
    touched = torch.tensor([2, 3, 11, 22], device=device)
    row_slot[touched] = torch.arange(4, dtype=torch.int32, device=device)
    sparse = draw(tasks, slots, width, seed=3, device=device)
    dense = torch.zeros(tasks, rows, width, device=device)
    dense[:, touched] = sparse[:, :4]
    w = draw(tasks, seed=4, device=device) if weighted else None
    start = [draw(rows, width, seed=s, device=device).abs() for s in range(3)]
    one, two = [t.clone() for t in start], [t.clone() for t in start]
    copies = torch.empty(2, rows, width, dtype=torch.bfloat16, device=device)
    numbers, options = scalars(1e-2, 7, device=device), Options(weight_decay=0.1)
    adamw_rows(one[0], one[1], one[2], row_slot, sparse, w, copies[0], numbers, options)
    flat = [t.view(-1) for t in two]
    adamw(flat[0], flat[1], flat[2], dense.view(tasks, -1), w, copies[1].view(-1), numbers, options)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(copies[0], copies[1])


def test_course_check(device: torch.device) -> None:
    """The course's own optimizer test: a small regression, 1,000 steps, held to the reference's weights."""
    import numpy as np

    torch.manual_seed(0)
    weight = nn.Linear(3, 2, bias=False).weight.detach().to(device)
    rng = np.random.default_rng(0)
    examples = torch.tensor(rng.uniform(size=[60, 3]), dtype=torch.float32, device=device)
    parameter = nn.Parameter(weight.double())
    optimizer = naive.AdamW([parameter], lr=1e-3, weight_decay=1e-4)
    p, m, v = weight.flatten().clone(), torch.zeros(6, device=device), torch.zeros(6, device=device)

    def gradient(w: Tensor, x: Tensor) -> Tensor:
        y = torch.stack([x[0] + x[1], -x[2]])
        return 2 * torch.outer(w @ x - y, x)

    for step, x in enumerate(examples, 1):
        parameter.grad = gradient(parameter.detach(), x.double())
        optimizer.step()
        own = gradient(p.view(2, 3), x).view(1, 6)
        adamw(p, m, v, own, None, None, scalars(1e-3, step, device=device), Options(weight_decay=1e-4))
    torch.testing.assert_close(p.view(2, 3).double(), parameter.detach(), rtol=1e-5, atol=1e-6)


def test_weights_must_match_the_tasks(device: torch.device) -> None:
    state = [torch.zeros(8, device=device) for _ in range(3)]
    numbers = scalars(1e-3, 1, device=device)
    with pytest.raises(ValueError, match="3 tasks' gradients need 3 weights"):
        adamw(*state, torch.zeros(3, 8, device=device), torch.zeros(2, device=device), None, numbers, Options())
    with pytest.raises(ValueError, match="betas"):
        adamw(*state, torch.zeros(1, 8, device=device), None, None, numbers, Options(betas=(1.0, 0.9)))
