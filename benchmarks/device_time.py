# SPDX-License-Identifier: Apache-2.0
"""Time of single kernels on a GPU: device events around a replayed graph, with the L2 cache cold or warm.

A kernel of ten microseconds drowns in the host's launch overhead, and a loop over one small buffer measures the
cache. So each candidate is captured once as a CUDA graph, and the events with it (a replay fills two tensors of the
random generator first); before each replay the device gets work that hides the host's latency: for cold times a write
over more than the L2 holds, for warm ones a wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_HIDE_CYCLES = 200_000  # about 0.1 ms: longer than the host needs to queue two events and a replay
_WARM_UP = 3
_failed: list[torch.cuda.CUDAGraph] = []  # kept, since the allocator goes on asking them for their capture


def measure(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, cold: bool, repeats: int = 50
) -> dict[str, list[float]]:
    """Milliseconds of each function on the device, in rounds: one replay of each, over and over.

    On the current stream, which must not be the default one; what a function differentiates was computed there too.
    """
    candidates = {name: _Timed.of(function, device) for name, function in functions.items()}
    cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(cache, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for candidate in candidates.values():
            if cold:
                flush.zero_()
            else:
                candidate.run()
                torch.cuda._sleep(_HIDE_CYCLES)
            candidate.run()
        torch.cuda.synchronize(device)
        for name, candidate in candidates.items():
            times[name].append(candidate.begin.elapsed_time(candidate.end))
    return times


@dataclass(frozen=True)
class _Timed:
    """A function between two events, as a graph's replay; itself where it cannot be captured (it asks for a value)."""

    run: Callable[[], object]
    begin: torch.cuda.Event
    end: torch.cuda.Event

    @classmethod
    def of(cls, function: Callable[[], object], device: torch.device) -> _Timed:
        begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))

        def timed() -> None:
            begin.record()
            function()
            end.record()

        for _ in range(_WARM_UP):
            timed()
        torch.cuda.synchronize(device)
        stream, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                timed()
        except RuntimeError:
            torch.cuda.synchronize(device)
            torch.cuda.set_stream(stream)
            _failed.append(graph)
            # A capture that fails leaves the random generator waiting for its end; one that succeeds sets it right.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                torch.zeros(1, device=device)
            return cls(timed, begin, end)
        return cls(graph.replay, begin, end)
