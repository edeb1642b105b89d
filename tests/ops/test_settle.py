# SPDX-License-Identifier: Apache-2.0
"""settle and row_slots: Triton's single launches against plain PyTorch, with everything that may not be finite."""

from __future__ import annotations

import pytest
import torch

from minbert_fast import ops
from minbert_fast.ops.backend import force
from minbert_fast.ops.settle import _settle

INF, NAN = float("inf"), float("nan")
#: Losses, Gram matrix, weights, norm limit; then the tasks that are not finite, and whether the step is skipped.
CASES = {
    "clipped": ([1.0, 2.0, 3.0], torch.diag(torch.tensor([4.0, 9.0, 16.0])), [1.0, 0.5, 2.0], 1.0, [], False),
    "short enough": ([1.0, 2.0, 3.0], torch.eye(3), [1.0, 1.0, 1.0], 100.0, [], False),
    "no clipping": ([1.0, 2.0, 3.0], torch.eye(3), [1.0, 1.0, 1.0], 0.0, [], False),
    "a loss": ([1.0, NAN, 3.0], torch.eye(3), [1.0, 1.0, 1.0], 1.0, [1], True),
    "a gradient of weight 0": ([1.0, 2.0, 3.0], torch.diag(torch.tensor([1.0, 1.0, INF])), [1.0, 1.0, 0.0], 1.0, [2], True),
    "a gradient": ([1.0, 2.0, 3.0], torch.full((3, 3), NAN), [1.0, 1.0, 1.0], 1.0, [0, 1, 2], True),
    "summed tasks": ([1.0, 2.0, 3.0], torch.tensor([[25.0]]), [1.0], 1.0, [], False),
    "summed tasks, overflow": ([1.0, 2.0, 3.0], torch.tensor([[INF]]), [1.0], 1.0, [], True),
    "rounded below zero": ([1.0, 2.0, 3.0], torch.tensor([[-1.0]]), [1.0], 1.0, [], False),
}  # fmt: skip


@pytest.mark.parametrize(("values", "gram", "w", "limit", "bad", "skip"), CASES.values(), ids=CASES)
def test_settle(
    values: list[float], gram: torch.Tensor, w: list[float], limit: float, bad: list[int], skip: bool,
    kernels: torch.device,
) -> None:  # fmt: skip
    heads = torch.tensor([3.0, -4.0]) if float(gram[0, 0]) != -1.0 else torch.zeros(2)
    taking = torch.tensor([1.0, 0.0, 1.0])

    def run(device: torch.device) -> list[torch.Tensor]:
        scalars = torch.tensor([[0.1, 4.0, 0.5, 1.0], [0.2, 5.0, 0.5, 1.0], [0.3, 6.0, 0.5, 1.0]], device=device)
        found = [t.to(device) for t in (torch.tensor(values), gram, torch.tensor(w), heads)]
        return [t.cpu() for t in (*ops.settle(*found, limit, scalars, taking.to(device)), scalars)]

    norm, nonfinite, skipped, scalars = run(kernels)
    assert nonfinite.nonzero().flatten().tolist() == bad
    assert bool(skipped) is skip
    assert torch.equal(scalars[:, 1], torch.tensor([4.0, 5.0, 6.0]) + (0 if skip else taking))
    assert (scalars[:, 3] == float(skip)).all()
    with force("torch"):
        expected = run(torch.device("cpu"))
    for one, other in zip((norm, scalars), (expected[0], expected[3]), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("ids", [[0, 3, 4, 9], [7], [-1, -1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 9, -1, -1, -1]])
def test_row_slots(ids: list[int], kernels: torch.device) -> None:
    slots = torch.full((11,), 77, dtype=torch.int32, device=kernels)
    ops.row_slots(torch.tensor(ids, dtype=torch.int32, device=kernels), slots)
    assert slots[:10].tolist() == [ids.index(row) if row in ids else -1 for row in range(10)]


def test_they_are_ops_that_torch_can_trace() -> None:
    values, ids = torch.ones(3), torch.tensor([1, 4, -1], dtype=torch.int32)
    arguments = (values, torch.eye(3), values, values, 1.0, torch.zeros(2, 4), torch.ones(2))
    torch.library.opcheck(_settle.overload, arguments)
    torch.library.opcheck(ops.row_slots.overload, (ids, torch.zeros(8, dtype=torch.int32)))
