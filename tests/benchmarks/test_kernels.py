# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmarks on tiny sizes: all candidates run, ours is checked, wrong results are detected."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from benchmarks import harness, kernels
from benchmarks.kernels import case, product

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for op, sizes in (("add_norm", (40, 64)), ("bias_gelu", (40, 64)), ("embedding", (9, 64))):
        monkeypatch.setattr(import_module(f"benchmarks.kernels.{op}"), "SIZES", {"cpu": [sizes]})
    for op in ("gram", "combine"):
        monkeypatch.setattr(import_module(f"benchmarks.kernels.{op}"), "JACOBIANS", {"cpu": [(3, 700)]})
    attention = import_module("benchmarks.kernels.attention")
    monkeypatch.setattr(attention, "MODELS", {"MiniLM-L6": (2, 32), "BERT-base": (2, 64)})
    monkeypatch.setattr(attention, "batches", lambda device: [attention.real_batch(2)])
    step = import_module("benchmarks.kernels.adamw")
    monkeypatch.setattr(step, "SIZES", {"cpu": {"tiny": 700}})
    monkeypatch.setattr(step, "TABLES", {"cpu": [(30, 16, 5)]})
    products = import_module("benchmarks.kernels.linear")
    monkeypatch.setattr(products, "ROWS", {"cpu": [40]})
    monkeypatch.setattr(products, "MATRICES", [(32, 16)])


@pytest.mark.ci
@pytest.mark.usefixtures("tiny")
def test_every_candidate_runs_and_ours_is_right() -> None:
    seen = set()
    for op in kernels.OPS:
        for each in import_module(f"benchmarks.kernels.{op}").cases(CPU):
            seen.add(each.name)
            for candidate in each.candidates.values():
                candidate.run()
                if candidate.check is not None:
                    candidate.check()
            assert each.candidates["ours"].check is not None, f"{each.name} is timed unchecked"
    assert len(seen) >= 34


@pytest.mark.parametrize("setting", product.SETTINGS)
def test_the_rival_products(setting: str) -> None:
    """In the interpreter; parts of tiles."""
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(shape, generator=generator).half() for shape in ((130, 72), (200, 72), (200,)))
    exact = x.double() @ w.double().T
    y, u, dx = (torch.full(shape, torch.nan).half() for shape in ((130, 200), (130, 200), (130, 72)))
    product.product(setting, x, w, y, transposed=False)
    case.close("forward", y, exact, torch.float16)
    product.product(setting, y, w, dx, transposed=True)
    case.close("backward", dx, y.double() @ w.double(), torch.float16)
    product.product(setting, x, w, y, False, bias, u)
    case.close("before the bias", u, exact, torch.float16)
    case.close("with GELU", y, torch.nn.functional.gelu(exact + bias.double()), torch.float16)


@pytest.mark.usefixtures("tiny")
def test_rows_compare_ours_with_every_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "OPS", ("linear",))
    rows = list(kernels.run(CPU, harness.Ceilings(1e9, 1e9, 1e9)))
    assert set(rows[0].speedup) == {"torch.mm a task", "torch.mm, tasks summed"}
    assert all(row.median is not None for row in rows)


def test_close_detects_a_wrong_result() -> None:
    exact = torch.randn(100)
    case.close("exact", exact, exact, torch.float32)
    with pytest.raises(AssertionError, match="off: relative error"):
        case.close("off", exact + 1e-3, exact, torch.float32)
    with pytest.raises(AssertionError):
        case.close("nan", exact * torch.nan, exact, torch.bfloat16)


def test_a_candidate_that_raises_does_not_end_the_suite() -> None:
    def broken() -> None:
        raise RuntimeError("graph was overwritten\nand more")

    candidates = {"ours": harness.Candidate(lambda: None), "theirs": harness.Candidate(broken)}
    ours, theirs = harness.case("kernels", "a case", candidates, CPU, harness.Ceilings(1, 1, 1), baselines=["theirs"])
    assert ours.median is not None
    assert not ours.speedup
    assert (theirs.median, theirs.note) == (None, "FAILED, not timed: RuntimeError: graph was overwritten")
