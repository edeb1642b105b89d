# SPDX-License-Identifier: Apache-2.0
"""The step suite on a tiny shape: all candidates run, are checked, and give the numbers that the README shows."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from benchmarks import baselines, batches, harness, step
from minbert_fast import BertConfig

CPU = torch.device("cpu")
TINY = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
CEILINGS = harness.Ceilings(1e10, 1e11, 1e11)


@pytest.fixture(autouse=True)
def _few_objects() -> Iterator[None]:
    """Freezes existing objects, so that the suite's garbage collections between cases are fast."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.ci
@pytest.mark.parametrize("method", ["pcgrad", pytest.param("none", marks=pytest.mark.slow)])
def test_every_step_is_checked_and_timed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "TIMING", step.Timing(2, 1.0))
    makers = step.candidate_makers(method, torch.float32, CPU)
    makers.pop("transformers, compiled", None)  # minutes of compilation
    rows = step._case("tiny", makers, TINY, 3, 2, CPU, CEILINGS, method)
    assert [row.name for row in rows] == list(makers)
    for row in rows:
        assert row.median is not None, row.note
        assert row.tokens_per_second
        assert row.repeats >= 1
    assert {"naive", "packed, torch's kernels"} <= set(rows[0].speedup)


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "TIMING", step.Timing(2, 1.0))

    def wrong(*arguments: object) -> step.Step:
        found = step.naive(*arguments)  # type: ignore[arg-type]
        return lambda batch: found(batch) * 1.1

    (row, _) = step._case("tiny", {"wrong": wrong, "naive": step.naive}, TINY, 3, 2, CPU, CEILINGS, "none")
    assert row.median is None
    assert row.note.startswith("WRONG")


def test_flops_equal_a_naive_count() -> None:
    model, _ = step.make_model(TINY, 3, CPU)
    (batch,) = batches.make_batches(model, 1, 4)
    total = 0
    for length in batch.packed.cu_seqlens.diff().tolist():
        products = [(length, 32, 32)] * 4 + [(length, 32, 48), (length, 48, 32)] + [(length, 32, length)] * 2
        total += 2 * sum(a * b * c for a, b, c in products)
    assert step.count_flops(TINY, batch) == 3 * 2 * total  # three passes, two layers


def test_packed_and_padded_baselines_contain_every_token() -> None:
    model, _ = step.make_model(TINY, 3, CPU)
    (batch,) = batches.make_batches(model, 1, 4)
    parts = dict(baselines.split_tasks(batch))
    assert sum(part.packed.num_tokens for part in parts.values()) == batch.packed.num_tokens
    rebuilt = []
    for part in parts.values():
        index, mask = baselines.rectangle(part.packed, part.packed.max_seqlen)
        rebuilt.append(part.packed.tokens[index][mask])
    assert torch.equal(torch.cat(rebuilt), batch.packed.tokens)


def test_surgery_is_measured_against_the_step_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "TIMING", step.Timing(2, 1.0))
    *rows, share = step.cost_of_surgery("tiny", TINY, torch.float32, CPU, CEILINGS)
    assert [row.name for row in rows] == ["ours, summed losses", "ours, PCGrad"]
    without, surgical = (row.median for row in rows)
    assert without
    assert surgical
    assert share.note == f"{surgical / without - 1:.1%} over summed losses"


@pytest.mark.slow
def test_scaling_cases_run_and_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "TIMING", step.Timing(1, 0.5))
    monkeypatch.setattr(step, "TASKS", (1, 2))
    monkeypatch.setattr(step, "ALL_EXAMPLES", 4)
    monkeypatch.setattr(step, "EXAMPLES", (1, 2))
    *timed, fit = step.scaling(TINY, torch.float32, CPU, CEILINGS)
    assert len(timed) == 4
    assert "a thousand tokens" in fit.note


def test_the_fit_is_exact_on_a_plane_and_reveals_a_bend() -> None:
    exact = [(n, t, 5 + 0.25 * n + 3 * t) for n, t in ((100, 1), (200, 3), (700, 2), (400, 8))]
    assert step.describe_fit(exact).startswith("5 ms + 250 ms a thousand tokens + 3 ms a task: off by 0.0%")
    bent = [(n, t, time + (40 if n == 700 else 0)) for n, t, time in exact]
    assert "off by 0.0%" not in step.describe_fit(bent)
