# SPDX-License-Identifier: Apache-2.0
"""The paired t test and Holm's correction, against SciPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from minbert_fast.common.statistics import holm, paired_t_test, student_tail


@pytest.mark.parametrize("freedom", range(1, 12))
def test_tails_are_scipys(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for t in (0.0, 0.3, -1.0, 2.5, 10.0):
        assert student_tail(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-9)


def test_pairs_are_tested_as_scipy_tests_them() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, 10):
        differences = rng.normal(0.3, 1.0, size)
        assert paired_t_test(differences.tolist()) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_a_spread_that_is_unknown_gives_no_p() -> None:
    assert paired_t_test([]) is None
    assert paired_t_test([0.1]) is None
    assert paired_t_test([0.5, 0.5]) is None
    assert paired_t_test([0.0, 0.0, 0.0]) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
