# SPDX-License-Identifier: Apache-2.0
"""What runs beside each other on two streams, under graph capture, in a step by the GPU's kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minbert_fast import BertModel
from minbert_fast.ops.backend import force, triton_available
from minbert_fast.ops.library import OPS
from minbert_fast.step import one_pass
from minbert_fast.step.captured import at_capacity
from minbert_fast.tasks import MultitaskModel, build_tasks
from tests.step.test_step import CONFIG, make_batch, recipe
from tests.tolerance import poisoned_memory
from tests.without_gpu import accesses

if not triton_available():
    pytest.skip("Triton is not installed", allow_module_level=True)

from minbert_fast.kernels import attention

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="follows the GPU's code in the interpreter"),
]


class Touched(NamedTuple):
    """Memory that a launch, or an operation of torch, reads or writes."""

    name: str
    beside: bool
    writes: bool
    addresses: np.ndarray  # of bytes


class Streams(TorchDispatchMode):
    """Stands in for `forked`: follows every launch and every operation of torch in a block.

    Raises AssertionError where one side of a block writes what the other side touches, or allocates memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.beside = False
        self.touched: list[Touched] = []  # in the present block
        self.blocks: list[list[str]] = []  # what ran in each block so far

    @contextmanager
    def forked(self, device: torch.device) -> Iterator[AbstractContextManager[None]]:
        self.touched.clear()
        accesses.listeners.append(self.note_launch)
        try:
            with self:
                yield self._on_the_other_stream()
        finally:
            accesses.listeners.clear()
        self.blocks.append(list(dict.fromkeys(t.name + " beside" * t.beside for t in self.touched)))
        for one, other in itertools.permutations(self.touched, 2):
            if one.writes and one.beside != other.beside:
                shared = np.intersect1d(one.addresses, other.addresses).size
                assert not shared, f"{one.name} writes {shared} bytes that {other.name} touches on the other stream"

    @contextmanager
    def _on_the_other_stream(self) -> Iterator[None]:
        self.beside = True
        yield
        self.beside = False

    def note_launch(self, launch: accesses.Launch) -> None:
        for writes in (False, True):
            addresses = [np.empty(0, np.int64)]
            for access in itertools.chain.from_iterable(region.accesses for region in launch.regions):
                if access.writes == writes:
                    addresses.append(np.add.outer(access.addresses.astype(np.int64), np.arange(access.size)).ravel())
            self.touched.append(Touched(launch.kernel, self.beside, writes, np.unique(np.concatenate(addresses))))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in OPS:
            with self:  # what it launches counts
                return OPS[func.name()]._launched(*args)
        passed = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | (kwargs or {})
        known = set()
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(passed.get(argument.name)):
                if isinstance(tensor, Tensor):
                    known.add(tensor.untyped_storage().data_ptr())
                    if not func.is_view:
                        addresses = np.arange(*accesses.extent(tensor))
                        self.touched.append(Touched(func.name(), self.beside, writes, addresses))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                raise AssertionError(f"{func.name()} allocates memory beside another stream")
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.ci)])
def test_a_step_of_three_tasks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, words by rows, padding rows and sentences, and sentences for either kind of attention kernel."""
    streams = Streams()
    for module in (attention, one_pass):
        monkeypatch.setattr(module, "forked", streams.forked)
    # Tiled kernels take sentences above 16 tokens, two tiles each.
    table = attention.LaunchTable(short=((1, 1),), forward=(16, 4), backward=(16, 16, 4))
    monkeypatch.setattr(attention, "_TABLES", dict.fromkeys(attention._TABLES, table))
    chosen = recipe(surgery={"method": "pcgrad"})
    config = replace(
        CONFIG, num_hidden_layers=1, num_attention_heads=2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    torch.manual_seed(0)
    model = MultitaskModel(BertModel(config), build_tasks(chosen), "mean")
    sizes = {"sentiment": 1, "paraphrase": 1, "similarity": 1}
    batch = make_batch(model, sizes, longest=24, token_capacity=110, sentence_capacity=7, max_seqlen=24)
    with force("triton"), poisoned_memory():
        step = one_pass.OnePassStep(model, chosen, dtype)
        before = step.flat.data.clone()
        result = step(at_capacity(batch), 1.0)
    assert result.grad_norm.isfinite()
    assert (step.flat.data != before).any()
    assert streams.blocks == [
        ["tiled_forward beside", "short_forward"],
        ["tiled_backward beside", "short_backward"],
        ["_row_slots beside", "_adamw beside", "_adamw"],
    ]


def test_what_two_streams_must_not_do_is_named() -> None:
    x = torch.zeros(4)

    def block(beside: Callable[[], object], here: Callable[[], object]) -> None:
        with Streams().forked(x.device) as other:
            with other:
                beside()
            here()

    block(lambda: x[:2].add_(1), lambda: x[2:3].copy_(x[3:]))
    with pytest.raises(
        AssertionError, match=r"add_\.Tensor writes 4 bytes that aten::copy_ touches on the other stream"
    ):
        block(lambda: x[:3].add_(1), lambda: x[3:].copy_(x[2:3]))
    with pytest.raises(
        AssertionError, match=r"copy_ writes 4 bytes that aten::add_\.Tensor touches on the other stream"
    ):
        block(lambda: x[:1].add_(x[3:]), lambda: x[3:].copy_(x[2:3]))
    with pytest.raises(AssertionError, match=r"aten::add\.Tensor allocates memory"):
        block(lambda: x + 1, lambda: None)
