# SPDX-License-Identifier: Apache-2.0
"""The step suite on a tiny shape: all candidates run, are checked, and give the numbers that the README shows."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, batches, harness, step
from minbert_fast import BertConfig
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.step.captured import _bucket

CPU = torch.device("cpu")
TINY = BertConfig(vocab_size=1100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
CEILINGS = harness.Ceilings(1e10, 1e11, 1e11)


@pytest.fixture(autouse=True)
def _few_objects() -> Iterator[None]:
    """Freezes existing objects, so that the suite's garbage collections between cases are fast."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _few_words() -> Iterator[None]:
    """Random sentences of TINY's words, whatever data there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "VOCABULARY_SIZE", TINY.vocab_size)
        pools = "few words", {kind: batches._random_sentences(kind) for kind in batches.STEMS}
        patch.setattr(batches, "sentence_pools", lambda: pools)
        yield


@pytest.mark.ci
@pytest.mark.parametrize("method", ["pcgrad", pytest.param("none", marks=pytest.mark.slow)])
def test_every_step_is_checked_and_timed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "TIMING", step.Timing(2, 1.0))
    makers = step.candidate_makers(method, torch.float32, CPU)
    makers.pop("transformers, compiled", None)  # minutes of compilation
    rows = step.run_case("tiny", makers, TINY, 3, 2, CPU, CEILINGS, method)
    assert [row.name for row in rows] == list(makers)
    for row in rows:
        assert row.median is not None, row.note
        assert row.tokens_per_second
        assert row.repeats >= 1
    assert {"naive", "packed, torch's kernels"} <= set(rows[0].speedup)


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "TIMING", step.Timing(2, 1.0))

    class Wrong(baselines.NaiveStep):
        def __call__(self, batch: MultitaskBatch, lr_scale: float = 1.0) -> Tensor:
            return super().__call__(batch, lr_scale) * 1.1

    makers: dict[str, step.Maker] = {"wrong": partial(Wrong, dtype=torch.float32), "naive": step.naive}
    (row, _) = step.run_case("tiny", makers, TINY, 3, 2, CPU, CEILINGS, "none")
    assert row.median is None
    assert row.note.startswith("WRONG")


class OtherRate(baselines.NaiveStep):
    """A learning rate that is 2 % too high; the losses of three steps hardly show it."""

    def __call__(self, batch: MultitaskBatch, lr_scale: float = 1.0) -> Tensor:
        return super().__call__(batch, 1.02 * lr_scale)


class OneTaskTwice(baselines.PackedStep):
    """Adds the first task's gradient once more."""

    def _combine(self, J: Tensor) -> Tensor:
        return super()._combine(J) + 0.05 * J[0]


class NoSurgery(baselines.PackedStep):
    """Adds the gradients, whatever the recipe says."""

    def _combine(self, J: Tensor) -> Tensor:
        return J.sum(0)


@pytest.mark.parametrize("kind", [OtherRate, OneTaskTwice, NoSurgery])
def test_parameters_show_steps_that_the_losses_hide(kind: Any) -> None:
    """Each is right but for one thing, and is refused in fp32."""
    with pytest.raises(AssertionError, match="otherwise than in the reference's three steps"):
        step.steps_agree(partial(kind, dtype=torch.float32), TINY, "pcgrad", CPU)


@pytest.mark.ci
@pytest.mark.parametrize("method", ["pcgrad", "none"])
def test_every_candidate_in_bf16_passes_and_a_larger_error_does_not(method: str) -> None:
    makers = step.candidate_makers(method, torch.bfloat16, CPU)
    makers.pop("transformers, compiled", None)
    assert {"ours", "ours, fp32", "naive", "naive, bf16"} <= makers.keys()
    for make in makers.values():
        step.steps_agree(make, TINY, method, CPU)

    class Fast(baselines.NaiveStep):
        def __call__(self, batch: MultitaskBatch, lr_scale: float = 1.0) -> Tensor:
            return super().__call__(batch, 1.2 * lr_scale)

    with pytest.raises(AssertionError, match="otherwise"):
        step.steps_agree(partial(Fast, dtype=torch.bfloat16), TINY, method, CPU)


def test_the_check_of_a_step_with_graphs_replays_one() -> None:
    """Named after the bug: each batch had a bucket of its own, so the graphs that were timed never ran in the check."""
    model, _ = step.make_model(TINY, 3, CPU)
    found = step.checked_batches(model)
    assert len(found) == step.CHECKED_STEPS >= 3  # eager, captured and replayed, replayed with another batch
    assert len(set(map(_bucket, found))) == 1
    assert len({batch.packed.num_tokens for batch in found}) > 1


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
        made = baselines.rectangle_of(part, grain=8)
        assert made.ids.shape[1] % 8 == 0
        assert torch.equal(made.ids[made.mask.bool()], made.ids.flatten()[made.padded])
        assert torch.equal(part.packed.tokens[made.packed][made.mask.bool()], part.packed.tokens)
        rebuilt.append(made.ids.flatten()[made.padded].int())
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
