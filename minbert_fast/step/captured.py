# SPDX-License-Identifier: Apache-2.0
"""The one-pass step as CUDA graphs: one launch per step instead of one per kernel.

A graph is captured for each *bucket*: the capacities that a batch was packed to, and which tasks have examples in it.
The first batch of a bucket runs eagerly (that loads kernels and sizes workspaces, and is an ordinary training step);
the second is captured; from then on a batch's bytes are copied into the bucket's own tensors and the graph replays.
Learning rates, seeds, task orders, `cu_seqlens`, task bounds and labels are read from device memory, so the graph follows
them. Batches come from page-locked memory, or lie on the device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.step.stepping import StepResult

Bucket = tuple[Any, ...]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    buffer: Tensor  # the batch that the graph reads
    result: StepResult  # the tensors that it writes
    held: Sequence[Tensor]  # buffers that it uses, which the step may have replaced by larger ones, and its tables

    def run(self, batch: MultitaskBatch) -> StepResult:
        """Copies a batch in, replays, and copies the result out of the graph's own memory."""
        self.buffer.copy_(batch.staged(), non_blocking=True)
        self.graph.replay()
        return cloned(self.result)


@dataclass
class Captures:
    """The number of graphs that a run has captured, and the seconds spent on it."""

    captured: int = 0
    capture_seconds: float = 0.0


class GraphedStep:
    """Replays a `OnePassStep` as graphs. It has the same methods and gives the same results.

    `len` is the number of graphs captured so far. They share one pool of memory.
    """

    def __init__(self, step: OnePassStep, captures: Captures | None = None) -> None:
        self.step = step
        self.average = step.average
        self.captures = captures or Captures()
        self._seen: set[Bucket] = set()
        self._captured: dict[Bucket, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # Autograd remembers streams. Every step runs on this stream before it is captured on it.
        self._stream = torch.cuda.Stream()

    def __len__(self) -> int:
        return len(self._captured)

    def graphs(self) -> list[torch.cuda.CUDAGraph]:
        """The graphs captured so far."""
        return [captured.graph for captured in self._captured.values()]

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        bucket = _bucket(batch)
        self.step.prepare(batch, lr_scale)
        if bucket in self._seen:
            if bucket not in self._captured:
                self._captured[bucket] = self._capture(batch)
            return self._captured[bucket].run(batch)
        self._seen.add(bucket)
        batch = at_capacity(batch.to(self.step.seed.device, non_blocking=True))
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self.step.compute(batch)
        current.wait_stream(self._stream)
        return result

    def _capture(self, batch: MultitaskBatch) -> _Captured:
        began = time.perf_counter()
        own = batch.to(self.step.seed.device).clone()
        assert own.buffer is not None
        tables = self.step.tables.set_aside(own.buffer.device)
        torch.cuda.synchronize()
        # Matrix products then take new workspaces from the graph's own pool. Other code may free the old ones
        # (torch.compile's CUDA graphs do), while the graph would still write to them.
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        # Meanwhile another thread makes batches and pins memory, which the mode "global" would treat as an error.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = self.step.compute(at_capacity(own))
        self.captures.captured += 1
        self.step.tables.write()
        self.captures.capture_seconds += time.perf_counter() - began
        return _Captured(graph, own.buffer, result, [*self.step.gradients.buffers(), tables])

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return self.step.state_dict()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.step.load_state_dict(state)


def at_capacity(batch: MultitaskBatch) -> MultitaskBatch:
    """The batch with its host-side sizes at capacity, so that the shapes depend on the bucket alone."""
    packed = batch.packed
    return replace(batch, packed=replace(packed, num_words=packed.word_ids.numel()))


def _bucket(batch: MultitaskBatch) -> Bucket:
    shapes = ((t.shape, t.dtype) for t in batch.tensors())
    return (*shapes, batch.packed.max_seqlen, *(batch.num_examples(name) for name in batch.tasks))


def cloned(result: StepResult) -> StepResult:
    """The result in memory that the next replay does not overwrite, copied with one launch for each dtype."""
    found = {name: t for name, t in vars(result).items() if isinstance(t, Tensor)}
    copies: dict[str, Any] = {name: torch.empty_like(t) for name, t in found.items()}
    for dtype in {t.dtype for t in found.values()}:
        names = [name for name, t in found.items() if t.dtype == dtype]
        torch._foreach_copy_([copies[name] for name in names], [found[name] for name in names])
    return replace(result, **copies)
