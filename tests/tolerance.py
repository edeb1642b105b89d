# SPDX-License-Identifier: Apache-2.0
"""The error budget: a fast implementation may err at most twice as much as plain PyTorch at the same dtype.

Both errors are measured against the same formula in fp64, so tests need no tolerances:

    expected = reference(formula, inputs, cotangents)          # outputs and input gradients, fp64 and at the dtype
    expected.check(outputs + gradients)

Kernel tests also share: outputs that are filled with NaN before a kernel writes them, and awkward shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

BUDGET = 2.0
# Plain PyTorch may round a short sum exactly where a kernel, summing in another order, does not (a sentence of one
# token: softmax is 1). So each budget has a floor: the last places that any correct rounding of the result, and of one
# intermediate of its size, may lose.
FLOOR_ULPS = 4.0

# Token counts that break kernels: one, none, block edges and their neighbours, runs of empty sentences.
AWKWARD_LENGTHS: dict[str, tuple[int, ...]] = {
    "one token": (1,),
    "one sentence": (13,),
    "single tokens": (1, 1, 1, 1, 1),
    "block edges": (15, 16, 17, 31, 32, 33),
    "empty sentences": (0, 5, 0, 0, 9, 0),
    "all empty": (0, 0, 0),
}
# Task segment bounds over 40 rows, padding behind: an empty first, middle and last task, one task, no rows at all.
AWKWARD_BOUNDS: dict[str, tuple[int, ...]] = {
    "three tasks": (0, 11, 30, 37),
    "no padding": (0, 1, 40),
    "empty first": (0, 0, 17, 40),
    "empty middle": (0, 17, 17, 33),
    "empty last": (0, 9, 31, 31),
    "one task": (0, 39),
    "no rows": (0, 0, 0),
}


def assert_within_budget(
    actual: Tensor, exact: Tensor, plain: Tensor, *, rows: int = 1, floor_ulps: float = FLOOR_ULPS, name: str = "result"
) -> None:
    """Asserts that `actual` errs from `exact` (fp64) at most `BUDGET` times as much as `plain` does.

    Two errors are held to it: the root mean square, and the largest one. The floor is `floor_ulps` units in the last
    place of `actual`'s dtype at the scale of `exact` (its root mean square, its largest magnitude). A sum over `rows`
    rows, as a weight gradient is, performs a random walk of roundings, so its floor grows with sqrt(rows).
    NaN and infinity never pass.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    if exact.numel() == 0:
        return
    got, want, usual = (t.detach().cpu().double() for t in (actual, exact, plain))
    assert torch.isfinite(want).all(), f"{name}: the reference itself is not finite"
    bad = ~torch.isfinite(got)
    assert not bad.any(), f"{name}: {int(bad.sum())} of {bad.numel()} not finite, first at {bad.nonzero()[0].tolist()}"
    ulp = torch.finfo(actual.dtype).eps * floor_ulps * math.sqrt(rows)
    for measure, of in (("rms", _rms), ("largest", _largest)):
        error, allowed = of(got - want), BUDGET * of(usual - want) + ulp * of(want)
        assert error <= allowed, (
            f"{name}: {measure} error {error:.3e} above the budget of {allowed:.3e} "
            f"(plain PyTorch errs by {of(usual - want):.3e}, the result's scale is {of(want):.3e})"
        )


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


@dataclass(frozen=True)
class Expected:
    """Results of one formula twice over: in fp64 and in plain PyTorch at the tested dtype."""

    names: tuple[str, ...]
    exact: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]
    rows: dict[str, int] = field(default_factory=dict)  # how many rows a named result sums over

    def check(self, actual: Sequence[Tensor], floor_ulps: float = FLOOR_ULPS) -> None:
        """Holds each of `actual` (outputs first, then gradients, in the order of `names`) to its budget."""
        assert len(actual) == len(self.names), f"{len(actual)} results for {self.names}"
        for name, a, e, p in zip(self.names, actual, self.exact, self.plain, strict=True):
            assert_within_budget(a, e, p, rows=self.rows.get(name, 1), floor_ulps=floor_ulps, name=name)


def reference(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    cotangents: Sequence[Tensor | None] = (),
    *,
    rows: dict[str, int] | None = None,
    **constants: Any,
) -> Expected:
    """Runs `formula(**inputs, **constants)` in fp64 and at the inputs' own dtypes, and differentiates it.

    Results are the formula's outputs ("output 0", ...), then, when there are cotangents (one an output, None for an
    output that is not differentiated), the gradient of every floating-point input ("d<name>"). Floating-point tensors
    among `constants` (a dropout mask) are rounded to the first input's dtype, in both runs, and get no gradient.
    `rows` as in `Expected`.
    """

    floating = [n for n, t in inputs.items() if t.is_floating_point()]
    own = inputs[floating[0]].dtype

    def run(dtype: torch.dtype | None) -> list[Tensor]:
        def convert(t: Tensor) -> Tensor:
            return t.to(dtype) if dtype and t.is_floating_point() else t

        leaves = {n: convert(t).detach().clone().requires_grad_(n in floating) for n, t in inputs.items()}
        fixed = {
            n: _map_tensors(c, lambda t: convert(t.to(own)) if t.is_floating_point() else t)
            for n, c in constants.items()
        }
        outputs = formula(**leaves, **fixed)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        results = [o.detach() for o in outputs]
        if cotangents:
            # Without a single sentence an output depends on no input.
            nothing = sum(leaves[n].flatten()[:1].sum() * 0 for n in floating)
            pairs = [(o + nothing, convert(c)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
            results += torch.autograd.grad([o for o, _ in pairs], [leaves[n] for n in floating], [c for _, c in pairs])
        return results

    plain, exact = run(None), run(torch.float64)
    gradients = [f"d{n}" for n in floating] if cotangents else []
    names = [f"output {i}" for i in range(len(plain) - len(gradients))] + gradients
    return Expected(tuple(names), tuple(exact), tuple(plain), rows or {})


def _map_tensors(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(v, convert) for v in value)
    return value


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills the tensors of torch.empty and its variants with NaN (floats) or a huge number (integers).

    An output element that a kernel forgets to write then fails `assert_within_budget` instead of being zero by luck.
    """

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            filled = tensor.detach()
            if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
                return tensor
            if tensor.is_floating_point():
                filled.fill_(math.nan)
            elif tensor.dtype != torch.bool:
                filled.fill_(torch.iinfo(tensor.dtype).max // 2)
            return tensor

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poison(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


def offsets(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """cu_seqlens [B + 1], int32, of sentences with these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def cosine_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine between the rows of two arrays [n, H] -> [n]; 1 for two zero rows, in fp64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), (a == b).all(1))
