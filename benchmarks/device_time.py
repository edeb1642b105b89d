# SPDX-License-Identifier: Apache-2.0
"""Times single GPU kernels with device events around a replayed CUDA graph, with the L2 cache cold or warm.

The host's launch overhead would hide a kernel of ten microseconds, and a loop over one small buffer would measure the
cache. So each candidate is captured once, with its two events, as a CUDA graph (a replay first fills two tensors of the
random generator, outside the events). Work before each replay hides the host's latency: for cold times a write of more
bytes than the L2 cache holds, for warm times a wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_HIDE_CYCLES = 200_000  # about 0.1 ms: longer than the host needs to queue two events and a replay
_WARM_UP = 3
_failed: list[torch.cuda.CUDAGraph] = []  # kept alive: the allocator still asks them about their capture


def measure(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, cold: bool, repeats: int = 50
) -> dict[str, list[float]]:
    """Device milliseconds of each function, `repeats` times; each round runs every function once.

    Runs on the current stream, which must not be the default one; tensors that a function differentiates must have
    been computed on it too.
    """
    candidates = {name: _Timed.capture(function, device) for name, function in functions.items()}
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
    """A function between two events, as a graph replay; called directly if capture fails (it synchronises)."""

    run: Callable[[], object]
    begin: torch.cuda.Event
    end: torch.cuda.Event

    @classmethod
    def capture(cls, function: Callable[[], object], device: torch.device) -> _Timed:
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
            # A failed capture leaves the random generator in capture mode; a successful one resets it.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                torch.zeros(1, device=device)
            return cls(timed, begin, end)
        return cls(graph.replay, begin, end)
