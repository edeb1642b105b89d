# SPDX-License-Identifier: Apache-2.0
"""Surgery's ops as torch sees them: opcheck, torch.compile, CUDA graphs, streams."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast import ops, surgery
from minbert_fast.ops import AdamWStep, backend, native, weights
from minbert_fast.ops.adamw import _adamw
from minbert_fast.ops.backend import force
from minbert_fast.ops.combine import _combine
from minbert_fast.ops.gram import _gram
from tests.surgery import oracles


def step(J: Tensor, order: Tensor, p: Tensor, m: Tensor, v: Tensor, scalars: Tensor, copy: Tensor) -> Tensor:
    """Surgery, clipping and AdamW, as the training step strings them together; returns the norm."""
    gram = ops.gram(J)
    w, _ = ops.pcgrad_weights(gram, order)
    norm = ops.clip_scale(gram, w, 1.0, scalars)
    ops.adamw(AdamWStep(J, w, p, m, v, scalars, copy, weight_decay=0.01))
    return norm


def tensors(device: torch.device, seed: int = 0) -> list[Tensor]:
    """Arguments of `step`."""
    J = oracles.random_rows(3, 3000, seed=seed)
    p, m, v = oracles.random_rows(3, 3000, seed=seed + 1)
    order = surgery.task_orders(3, torch.Generator().manual_seed(seed))
    state = [J, order, p.clone(), m.clone(), v.abs(), torch.tensor([1e-2, 3.0, 1.0, 0.0]), p.bfloat16()]
    return [t.to(device) for t in state]


def every_op(device: torch.device) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    J, order, p, m, v, scalars, copy = tensors(device)
    gram, w, extra = ops.gram(J), torch.rand(3, device=device), torch.ones(1, device=device)
    table = torch.arange(-1, 2, dtype=torch.int32, device=device)
    rows = [t.view(3, 1000) for t in (p, m, v)]
    return {
        "gram": (_gram, (J, gram, True)),
        "pcgrad_weights": (weights._pcgrad_weights, (gram, order, False)),
        "clip_scale": (weights._clip_scale, (gram, w, 1.0, extra, scalars)),
        "clip_scale, J alone": (weights._clip_scale, (gram, w, 0.0, None, scalars)),
        "combine": (_combine, (J, w, torch.empty_like(p))),
        "adamw": (_adamw, AdamWStep(J, w, p, m, v, scalars, copy, weight_decay=0.01)),
        "adamw, plain": (_adamw, AdamWStep(J[:1], None, p, m, v, scalars)),
        "adamw, rows": (_adamw, AdamWStep(J.view(3, 3, 1000)[:, :2], w, *rows, scalars, row_slot=table)),
    }


@pytest.mark.parametrize("name", every_op(torch.device("cpu")))
def test_opcheck(hardware: torch.device, name: str) -> None:
    op, arguments = every_op(hardware)[name]
    torch.library.opcheck(op.overload, tuple(arguments))


def test_a_gpu_uses_triton_if_the_extension_was_built_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    J: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda"))
    for has_cuda, has_triton, expected in ((True, True, "native"), (False, True, "triton"), (False, False, "torch")):
        monkeypatch.setattr(native, "HAS_CUDA", has_cuda)
        monkeypatch.setattr(backend, "triton_available", lambda has_triton=has_triton: has_triton)
        assert backend.surgery_implementation(J) == expected
    with force("triton"):
        monkeypatch.setattr(native, "HAS_CUDA", True)
        assert backend.surgery_implementation(J) == "triton"


def test_compiled_step_is_the_eager_step(hardware: torch.device) -> None:
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        ours, theirs = tensors(hardware, seed), tensors(hardware, seed)
        assert torch.equal(compiled(*ours), step(*theirs))
        assert all(map(torch.equal, ours, theirs))


def test_implementations_agree(anywhere: torch.device) -> None:
    ours, theirs = tensors(anywhere), tensors(anywhere)
    step(*ours)
    with force("torch"):
        step(*theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.gpu
def test_cuda_graph_replays_the_step_and_follows_the_scalars(anywhere: torch.device) -> None:
    if anywhere.type == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    device = anywhere
    inputs, eager = tensors(device), tensors(device)
    warm = tensors(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*warm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = step(*inputs)
    for t, source in zip(inputs, tensors(device), strict=True):
        t.copy_(source)
    for seed in (3, 4, 5):
        fresh = tensors(device, seed)
        for state in (inputs, eager):
            state[0].copy_(fresh[0])
            state[1].copy_(fresh[1])
            state[5].copy_(torch.tensor([1e-2 / seed, float(seed), 1.0, 0.0]))
        graph.replay()
        assert torch.equal(norm, step(*eager))
        assert all(map(torch.equal, inputs, eager))


@pytest.mark.gpu
def test_ops_run_on_the_current_stream() -> None:
    J = torch.zeros(3, 10_000_000, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        J.fill_(1.0)
        gram = ops.gram(J)
    stream.synchronize()
    assert bool((gram == 10_000_000).all())


@pytest.mark.gpu
def test_cuda_refuses_tensors_elsewhere() -> None:
    J = torch.zeros(2, 100, device="cuda")
    with pytest.raises(ValueError, match="out must be on cuda"):
        ops.gram(J, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="w must be on cuda"):
        ops.combine(J, torch.zeros(2))
