# SPDX-License-Identifier: Apache-2.0
"""Gradients of many layers in one launch, against fp64: weights, biases, column sums, and the Gram matrix of the weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from minbert_fast.ops import grouped
from minbert_fast.ops.backend import triton_available
from minbert_fast.ops.grouped import Product, Tables, Unfinished
from tests.ops.common import Slices, int32, random
from tests.tolerance import assert_within_budget

pytestmark = pytest.mark.skipif(not triton_available(), reason="Triton is not installed")

# Rows of each task: none, one, many; and shapes: MiniLM's widths beside narrow ones, full tiles and parts of tiles.
CASES = {
    "1,023 rows, fp32": ((0, 0, 1, 1023), [(384, 16)], torch.float32),
    "widths of MiniLM, fp32": ((0, 3, 3, 8), [(384, 16), (16, 768)], torch.float32),
    "parts of tiles, fp16": ((0, 70, 70, 131), [(144, 144), (96, 16)], torch.float16),
    "unaligned, fp32": ((0, 5, 40), [(100, 36), (7, 3)], torch.float32),
    "unaligned, fp16": ((0, 40), [(100, 36), (7, 3)], torch.float16),
    "nine tasks, fp32": (tuple(range(10)), [(64, 16)], torch.float32),
    "no rows, fp32": ((0, 0, 0), [(64, 16)], torch.float32),
}


def products(
    bounds: Sequence[int], shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> tuple[list[Product], Slices]:
    """Problems with padding rows of NaN behind, and the buffer that their outputs are slices of."""
    generator = torch.Generator().manual_seed(1)
    names = {f"{kind}{i}": shape[: 2 - bias] for i, shape in enumerate(shapes) for bias, kind in enumerate(("w", "b"))}
    slices = Slices(len(bounds) - 1, names, torch.float32, device)
    found = []
    for i, shape in enumerate(shapes):
        dy, x = (random(bounds[-1] + 3, n, dtype=dtype, device=device, generator=generator) for n in shape)
        dy[bounds[-1] :] = torch.nan
        found.append(Product(dy, x, slices.views[f"w{i}"], slices.views[f"b{i}"]))
    return found, slices


def run(found: list[Product], bounds: Tensor) -> Tensor | None:
    """Computes the products in one launch or two, and returns the Gram matrix of the weights."""
    partials, tables = grouped.partial_grams(bounds.numel() - 1, bounds.device), Tables()
    half = (len(found) + 1) // 2
    grouped.weight_gradients(found[:half], bounds, tables, partials, add=False)
    if found[half:]:
        grouped.weight_gradients(found[half:], bounds, tables, partials, add=True)
    if partials is None:
        return None
    rest = torch.zeros(bounds.numel() - 1, 5, device=bounds.device)
    return grouped.gram([rest], tables, partials, add=True)


@pytest.mark.parametrize(("bounds", "shapes", "dtype"), CASES.values(), ids=CASES)
def test_within_the_error_budget(
    bounds: tuple[int, ...], shapes: list[tuple[int, int]], dtype: torch.dtype, triton: torch.device
) -> None:
    found, slices = products(bounds, shapes, dtype, triton)
    gram = run(found, int32(*bounds, device=triton))
    for dy, x, dweight, dbias in found:
        assert dweight is not None
        assert dbias is not None
        for task, (begin, end) in enumerate(itertools.pairwise(bounds)):
            a, b = dy[begin:end], x[begin:end]
            rows = max(end - begin, 1)
            assert_within_budget(dweight[task], a.double().T @ b.double(), (a.T @ b).float(), rows=rows, name="weight")
            assert_within_budget(dbias[task], a.double().sum(0), a.sum(0).float(), rows=rows, name="bias")
    slices.assert_gaps_untouched()
    if len(bounds) - 1 > 8:
        assert gram is None
        return
    assert gram is not None
    J = torch.cat([each.dweight.flatten(1) for each in found if each.dweight is not None], 1)
    assert_within_budget(gram, J.double() @ J.double().T, J @ J.T, rows=J.shape[1], name="gram")


def test_every_run_gives_the_same_bits(triton: torch.device) -> None:
    bounds = (0, 5, 40)
    found, slices = products(bounds, [(100, 36)], torch.float32, triton)
    first = run(found, int32(*bounds, device=triton))
    before = slices.buffer.nan_to_num()
    second = run(found, int32(*bounds, device=triton))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert torch.equal(slices.buffer.nan_to_num(), before)


def test_bf16_is_multiplied_and_stored_as_such(triton: torch.device) -> None:
    """G is that of the gradients as they are stored, rounded to bf16."""
    bounds = int32(0, 20, 33, device=triton)
    generator = torch.Generator().manual_seed(2)
    dy, x = (random(33, n, dtype=torch.bfloat16, device=triton, generator=generator) for n in (32, 48))
    out = torch.empty(2, 32, 48, dtype=torch.bfloat16, device=triton)
    gram = run([Product(dy, x, out, None)], bounds)
    exact = torch.stack([dy[a:b].double().T @ x[a:b].double() for a, b in ((0, 20), (20, 33))])
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=1e-6)  # the interpreter truncates to bf16
    J = out.double().flatten(1)
    assert gram is not None
    torch.testing.assert_close(gram.double(), J @ J.T, rtol=1e-5, atol=0)


def test_column_sums_of_many(triton: torch.device) -> None:
    """Two backwards of different widths; a program's rows cross the tasks' bounds, one task is empty, one sum unwanted.

    The last task has more programs than a kernel adds at once (32).
    """
    bounds, rows, programs = (0, 5, 5, 141), 4, 36  # rows of a program
    generator = torch.Generator().manual_seed(3)
    noted, expected, outputs = [], [], []
    for width, quantities in ((36, 3), (70, 1)):
        values = torch.randn(quantities, bounds[-1], width, generator=generator)
        partials = torch.full((programs + 2, quantities, width), torch.nan)
        for program, (task, (begin, end)) in itertools.product(range(programs), enumerate(itertools.pairwise(bounds))):
            low, high = max(begin, program * rows), min(end, (program + 1) * rows)
            if low < high:
                partials[program + task] = values[:, low:high].sum(1)
        out = [torch.full((3, width), torch.nan, device=triton) for _ in range(quantities)]
        wanted = tuple(None if number == 1 else each for number, each in enumerate(out))
        noted.append(Unfinished(partials.to(triton), rows, wanted))
        outputs.append(out)
        expected.append([torch.stack([v[a:b].sum(0) for a, b in itertools.pairwise(bounds)]) for v in values])
    grouped.column_sums(noted, int32(*bounds, device=triton), Tables())
    for out, exact in zip(outputs, expected, strict=True):
        for number, (each, sums) in enumerate(zip(out, exact, strict=True)):
            if number == 1:
                assert each.isnan().all()
            else:
                torch.testing.assert_close(each.cpu(), sums)


def test_tables_of_a_capture_lie_in_memory_of_their_own_and_are_filled_afterwards() -> None:
    tables, here = Tables(), torch.device("cpu")
    assert tables.on(here, [[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    tables.begin()
    assert tables.on(here, [[5]]).tolist() == [[5]]
    tables.begin()
    room = tables.set_aside(here).fill_(-1)
    assert room.numel() == 4  # the largest step's
    made = [tables.on(here, [[6]]), tables.on(here, [[7, 8]])]
    assert room.tolist() == [-1] * 4
    with pytest.raises(RuntimeError, match="a table of 2 numbers; 1 were set aside"):
        tables.on(here, [[9, 10]])
    tables.write()
    assert [table.tolist() for table in made] == [[[6]], [[7, 8]]]
    assert room.tolist() == [6, 7, 8, -1]
    assert tables.on(here, [[11]]).tolist() == [[11]]
