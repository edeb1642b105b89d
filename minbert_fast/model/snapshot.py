# SPDX-License-Identifier: Apache-2.0
"""`Snapshot`, a pass (passes.py) over weights that no longer change, without gradients and dropout.

It stacks query, key and value into one matrix and converts weights to the precision of the products once, instead of in
every batch. Shapes: N token rows, H hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.model.bert import BertModel
from minbert_fast.model.passes import Pass
from minbert_fast.model.rows import PackedRows


class Snapshot(Pass):
    """The weights of an encoder as they are now, in `dtype`, for passes without gradients and dropout.

    LayerNorms and biases keep their dtype, because statistics and sums are fp32. A snapshot shares the weights that have
    `dtype` already, so make a new one after the model has changed.
    """

    @torch.no_grad()
    def __init__(self, model: BertModel, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self._weights: dict[int, Tensor] = {}
        self._originals = list(model.parameters())  # kept, so that no other tensor gets the id of one of them
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                keeps = isinstance(module, nn.LayerNorm) or name == "bias"
                self._weights[id(parameter)] = parameter.detach().to(parameter.dtype if keeps else dtype)
        self._stacked: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> tuple[type[Snapshot], tuple[BertModel, torch.dtype]]:
        """Builds a copy from the copied model: the tables' keys are identities in this process."""
        return type(self), (self.model, self.dtype)

    @torch.inference_mode()
    def hidden(self, rows: PackedRows) -> Tensor:
        """The last hidden state [N, H] of packed rows."""
        with _evaluating(self.model) if self.model.plan().reasons else nullcontext():
            return self.model.encode_rows(self, rows)

    def linear(self, x: Tensor, *modules: nn.Linear) -> Tensor:
        key = tuple(map(id, modules))
        if key not in self._stacked:
            weight = torch.cat([self.weight(m.weight) for m in modules])
            self._stacked[key] = weight, torch.cat([self.weight(m.bias) for m in modules]).to(self.dtype)
        return F.linear(x, *self._stacked[key])

    def product(self, x: Tensor, module: nn.Linear) -> Tensor:
        return F.linear(x, self.weight(module.weight))

    def dropout(self, module: nn.Dropout, device: torch.device) -> tuple[float, Tensor | None, int]:
        return 0.0, None, 0

    def weight(self, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._weights.get(id(parameter), parameter)  # not there: zeros for the bias of a foreign module


_changing_modes = threading.Lock()
#: Models in evaluation mode for now: how many threads need that, and the modules that return to training mode after it.
_changed: dict[nn.Module, tuple[int, list[nn.Module]]] = {}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the block with every module in evaluation mode. The last thread that leaves such a block restores the modes."""
    with _changing_modes:
        threads, training = _changed.get(model) or (0, [module for module in model.modules() if module.training])
        _changed[model] = threads + 1, training
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with _changing_modes:
            threads, training = _changed.pop(model)
            if threads > 1:
                _changed[model] = threads - 1, training
            else:
                for module in training:
                    module.training = True
