# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of single ops share: a case, its inputs, and how near its result must come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Candidate
from minbert_fast.ops import backend

TASKS = 3
P = 0.1
EPS = 1e-12
DTYPES = (torch.bfloat16, torch.float32)
#: The weights [outputs, inputs] of the layers of MiniLM-L6 and BERT-base.
MATRICES = [(384, 384), (1152, 384), (1536, 384), (384, 1536), (768, 768), (2304, 768), (3072, 768), (768, 3072)]
#: Tasks and parameters of J. On a CPU the surgery suite times its ops.
JACOBIANS = {"cpu": [], "cuda": [(3, 22_713_216), (3, 109_482_240), (8, 22_713_216), (16, 22_713_216)]}
#: The largest error, as a share of the result's norm, that rounding in this dtype explains.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """One op at one size: ours first, then what it is compared with."""

    name: str
    candidates: dict[str, Candidate]
    product: str = "bf16"  # which of the machine's measured products its FLOP/s are compared with

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.candidates if name != "ours"]


def label(op: str, dtype: torch.dtype, *sizes: int) -> str:
    return f"{op}, {str(dtype).removeprefix('torch.')}, {' x '.join(map(str, sizes))}"


def draw(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal values: never zeros, which run faster and hide mistakes."""
    return (scale * torch.randn(shape, device=device)).to(dtype)


def bounds(rows: int, device: torch.device) -> Tensor:
    """Three tasks of unequal share, all rows used."""
    return torch.tensor([0, rows // 4, rows // 2, rows], dtype=torch.int32, device=device)


def close(name: str, actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """AssertionError unless `actual` is `exact` but for rounding in `dtype`."""
    got, wanted = actual.detach().double(), exact.detach().double()
    error = float((got - wanted).norm() / wanted.norm())
    assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}, allowed {TOLERANCE[dtype]:.0e}"


def triton_too(ours: Candidate, J: Tensor) -> dict[str, Candidate]:
    """A surgery op as it runs on J's device, and by Triton where the extension's CUDA kernels come first."""
    if J.device.type != "cuda" or backend.surgery_implementation(J) == "triton" or not backend.triton_available():
        return {"ours": ours}

    def forced(run: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            with backend.force("triton"):
                run()

        return call

    return {"ours": ours, "triton": Candidate(forced(ours.run), forced(ours.check or ours.run), ours.bytes)}


def backward_of(y: Tensor, inputs: list[Tensor], dy: Tensor) -> Callable[[], object]:
    """Autograd's backward alone, over and over on one graph."""
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any] | None:
    """torch.compile's version, where there is a GPU for it to compile for."""
    if device.type != "cuda":
        return None
    from torch._dynamo import config
    from torch._functorch import config as autograd

    config.recompile_limit = 256  # all sizes share the function's code: after 8 the rest would run eagerly
    autograd.donated_buffer = False  # `backward_of` walks through a graph more than once
    return torch.compile(function, dynamic=False)
