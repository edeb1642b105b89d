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
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minbert_fast.surgery.base import Weights, check_shape, nonfinite

# Weightings that G alone cannot feed, and what they need.
UNFIT = {
    "CRMOGM": "another weighting, which is no number, text or list",
    "ExcessMTL": "the gradients themselves, not their Gram matrix",
    "MoDo": "the gradients of two batches, not a Gram matrix",
    "SDMGrad": "the gradients of two batches, not a Gram matrix",
}


class FromTorchJD(Weights):
    """A TorchJD `Weighting`, or any other callable from G to w. It may wait for the device.

    The weights are used as the callable gives them: no reduction is applied. What the callable draws from torch's own
    generators is seeded from `generator` in each call, so that every process draws the same. `state_dict` holds that
    generator, and the tensors that a TorchJD weighting with a state keeps as buffers.
    """

    def __init__(self, weighting: Callable[[Tensor], Tensor], generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weighting = weighting
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        self._tasks = 0  # of the state, if there is one

    def __call__(self, gram: Tensor, orders: Tensor | None = None) -> Tensor:
        used = ~nonfinite(gram)
        w = torch.zeros_like(gram[0])
        seed = int(torch.randint(2**62, (1,), generator=self.generator))
        with torch.random.fork_rng([gram.device] if gram.device.type == "cuda" else []):
            torch.manual_seed(seed)
            if used.all():
                self._tasks = len(gram)
                found = torch.as_tensor(self.weighting(gram))
                check_shape(self.weighting, found.shape, len(gram))
                w.copy_(found)
            elif used.any():  # such a step is skipped: the state stays
                self._leave_out(gram, used, w)
        return w

    def _leave_out(self, gram: Tensor, used: Tensor, w: Tensor) -> None:
        """Writes the weights of the tasks `used` to w [T], by a copy of the weighting."""
        try:
            w[used] = copy.deepcopy(self.weighting)(gram[used][:, used]).to(w)
        except (RuntimeError, ValueError):  # a weighting for a certain number of tasks
            zeroed = torch.where(used & used[:, None], gram, 0.0)
            w[used] = copy.deepcopy(self.weighting)(zeroed)[used].to(w)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, the number of tasks of the weighting's state, and its buffers by name."""
        state: dict[str, Any] = {"generator": self.generator.get_state(), "tasks": torch.tensor(self._tasks)}
        return state | {f"weighting/{name}": value.clone() for name, value in self._buffers().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        self._tasks = int(state["tasks"])
        saved = {k.removeprefix("weighting/"): v for k, v in state.items() if k.startswith("weighting/")}
        if saved and self._tasks:  # the weighting makes its buffers in its first call
            self.weighting(torch.eye(self._tasks))
        own = self._buffers()
        if own.keys() != saved.keys():
            raise ValueError(f"the state of another weighting: it has {sorted(saved)}, expected {sorted(own)}")
        for name, buffer in own.items():
            buffer.copy_(saved[name])

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self.weighting.named_buffers()) if isinstance(self.weighting, nn.Module) else {}


def named(text: str, generator: torch.Generator | None = None) -> FromTorchJD:
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
        raise ValueError(f"{where}: {name} needs {UNFIT[name]}")
    try:
        call = ast.parse(text if bracket else f"{text}()", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"{where}: expected NAME or NAME(option=value, ...)") from None
    tensors = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return FromTorchJD(getattr(aggregation, f"{name}Weighting")(**tensors), generator)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
