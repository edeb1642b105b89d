# SPDX-License-Identifier: Apache-2.0
"""The launches of a captured step, and their bytes: what a change of the step adds or saves shows here first."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks import traffic
from benchmarks.gradients import CONFIGS

#: Launches and megabytes of one step, 3 x 32 examples, PCGrad. Lower them with the change that saves launches.
TOTALS = {"MiniLM-L6": (148, 2128.0), "BERT-base": (245, 9453.0)}


@pytest.mark.parametrize("shape", TOTALS)
def test_totals(shape: str) -> None:
    found = traffic.summary(traffic.launches(CONFIGS[shape]))
    launches, megabytes = TOTALS[shape]
    assert found["launches"] == launches, traffic.table(shape, found)
    assert found["megabytes"] == pytest.approx(megabytes, rel=1e-3), traffic.table(shape, found)


def test_attention_of_a_bucket_with_longer_sentences() -> None:
    """Above 64 tokens, one more launch in each direction of a layer."""
    names = Counter(launch.name for launch in traffic.launches(CONFIGS["MiniLM-L6"], longest=128))
    kernels = ("short_forward", "tiled_forward", "short_backward", "tiled_backward")
    assert {name: names[name] for name in kernels} == dict.fromkeys(kernels, 6)


def test_bytes_are_those_of_the_tensors() -> None:
    """y = x + 1 reads and writes 4 bytes an element, an in-place sum too, a view nothing, an expanded tensor its rows."""
    x = torch.empty(100, 30, device="meta")
    watch = traffic.Watch()
    with watch:
        y = x + 1
        y += x[:1]
        y.view(3000)
    assert [(each.name, each.bytes) for each in watch.launches] == [("add", 24_000), ("add_", 24_120)]


def test_an_op_without_a_result_is_a_launch() -> None:
    """`_foreach_copy_` returns nothing: it reads one list and writes the other."""
    x, y = torch.empty(2, 100, device="meta")
    watch = traffic.Watch()
    with watch:
        torch._foreach_copy_([x], [y])
    assert [(each.name, each.bytes) for each in watch.launches] == [("_foreach_copy_", 800)]


def test_a_row_of_a_table_is_not_the_table() -> None:
    table, rows = torch.empty(30_000, 8, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")
    watch = traffic.Watch()
    with watch:
        table[rows]
    assert [each.bytes for each in watch.launches] == [2 * 5 * 8 * 4 + 5 * 8]
