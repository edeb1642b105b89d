# SPDX-License-Identifier: Apache-2.0
"""Time of single kernels on a GPU: device events around a replayed graph, with the L2 cache cold or warm.

A kernel of ten microseconds drowns in the host's launch overhead, and a loop over one small buffer measures the
cache. So each candidate is captured once as a CUDA graph; before each replay the device gets work that hides the
host's latency: for cold times a write over more than the L2 holds, for warm ones a wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
    replays = {name: _captured(function, device) for name, function in functions.items()}
    cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(cache, dtype=torch.int8, device=device)
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, replay in replays.items():
            if cold:
                flush.zero_()
            else:
                replay()
                torch.cuda._sleep(_HIDE_CYCLES)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            pairs[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {name: [begin.elapsed_time(end) for begin, end in each] for name, each in pairs.items()}


def _captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The function as a graph's replay; itself where it cannot be captured (it asks the device for a value)."""
    for _ in range(_WARM_UP):
        function()
    torch.cuda.synchronize(device)
    stream, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            function()
    except RuntimeError:
        torch.cuda.synchronize(device)
        torch.cuda.set_stream(stream)
        _failed.append(graph)
        # A capture that fails leaves the random generator waiting for its end; one that succeeds sets it right.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.zeros(1, device=device)
        return function
    return graph.replay
