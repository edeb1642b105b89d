# SPDX-License-Identifier: Apache-2.0
"""A stand-in for torch.cuda.CUDAGraph on a CPU: records the operations of a step, and replays them and nothing else.

Like a CUDA graph it keeps what Python computed during the capture: numbers, shapes, addresses. A replay runs no Python of
the step: a value that Python chooses in each step stays that of the capture, and the test that compares with an eager
step fails. A capture leaves no trace in tensors that are older than the capture.

A capture may not read a value, nor copy between host and device (`pretend_cuda` has both). It does not show what
a device adds: streams, and memory that is used again within a graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class RecordedGraph(TorchDispatchMode):
    """The operations of a capture: each with its arguments and the tensors that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.seen: set[int] = set()  # addresses of memory that the capture made or wrote to
        self.before: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []  # older memory, and its contents

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        assert func is not torch.ops.aten._local_scalar_dense.default, "a capture reads a tensor's value"
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        written = tensors([given.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write])
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.before.append((storage, storage.clone()))
        # Operations without a result wait for the replay: they may read tables that are written after the capture.
        out = func(*args, **kwargs) if schema.returns else None
        (aliases,) = {bool(r.alias_info) for r in schema.returns} or {False}
        made = [] if aliases else tensors(out)
        results, inputs = [*made, *written], tensors((args, kwargs))
        here = {t.device.type for t in results}
        # A GPU may read a number of the host's, an element of no dimension: it is part of the launch.
        elsewhere = [t for t in inputs if results and t.device.type not in here and (t.dim() or t.is_cuda)]
        assert not elsewhere, f"a capture copies between host and device: {func}"
        self.seen.update(t.untyped_storage().data_ptr() for t in made)
        if made or written:
            self.calls.append((func, args, kwargs, made))
        return out

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        state = torch.get_rng_state()
        with self:
            yield
        torch.set_rng_state(state)
        for storage, contents in self.before:
            storage.copy_(contents)

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            for old, new in zip(made, tensors(func(*args, **kwargs)), strict=bool(made)):
                old.copy_(new)
