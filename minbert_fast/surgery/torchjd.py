# SPDX-License-Identifier: Apache-2.0
"""TorchJD's weightings of Gram matrices as methods of ours, by object or by name.

    >>> named("MGDA")(torch.eye(2))
    tensor([0.5000, 0.5000])
    >>> named("Constant(weights=[1.0, 3.0])")(torch.eye(2))
    tensor([1., 3.])

TorchJD: Quinton & Rey 2024, arXiv:2406.16232; `pip install torchjd`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

import torch
from torch import Tensor

from minbert_fast.surgery.base import Weights, nonfinite

# Weightings of other matrices than G: what they need.
UNFIT = {
    "ExcessMTL": "the gradients themselves",
    "MoDo": "the gradients of two batches",
    "SDMGrad": "the gradients of two batches",
}


class FromTorchJD(Weights):
    """A TorchJD `Weighting`, or any other callable from G to w. It may wait for the device.

    The weights are used as the callable gives them: no reduction is applied.
    """

    def __init__(self, weighting: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weighting = weighting

    def __call__(self, gram: Tensor) -> Tensor:
        used = ~nonfinite(gram)
        w = torch.zeros_like(gram[0])
        if used.any():
            w[used] = self.weighting(gram[used][:, used]).to(w)
        return w


def named(text: str) -> FromTorchJD:
    """TorchJD's weighting `NAME` or `NAME(option=value, ...)`; a list is passed on as a tensor.

    ValueError of one line for a name or an option that TorchJD does not know, and where a package is missing.
    """
    where = f"surgery method 'torchjd:{text}'"
    try:
        from torchjd import aggregation
    except ImportError:
        raise ValueError(f"{where}: TorchJD is not installed; run pip install torchjd") from None
    name, bracket, _ = text.partition("(")
    name = name.removesuffix("Weighting")
    known = [n.removesuffix("Weighting") for n in aggregation.__all__ if n.endswith("Weighting") and n != "Weighting"]
    if name not in known:
        raise ValueError(f"{where}: expected one of {', '.join(n for n in known if n not in UNFIT)}")
    if name in UNFIT:
        raise ValueError(f"{where}: {name} needs {UNFIT[name]}, not their Gram matrix")
    try:
        call = ast.parse(text if bracket else f"{text}()", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"{where}: expected NAME or NAME(option=value, ...)") from None
    tensors = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return FromTorchJD(getattr(aggregation, f"{name}Weighting")(**tensors))
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
