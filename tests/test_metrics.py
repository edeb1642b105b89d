# SPDX-License-Identifier: Apache-2.0
"""Metrics against scikit-learn and SciPy; where those warn or return nan, against the docstrings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from minbert_fast.tasks import metrics

CLASSES = 5
columns = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(columns)
def test_classification_metrics_equal_scikit_learn(pairs):
    predictions, labels = (np.array(c) for c in zip(*pairs, strict=True))
    assert metrics.accuracy(predictions, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
    assert metrics.macro_f1(predictions, labels) == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, average="macro")
    )
    matrix = metrics.confusion_matrix(predictions, labels, CLASSES)
    expected = sklearn.metrics.confusion_matrix(labels, predictions, labels=range(CLASSES))
    assert (matrix == expected).all()
    shares = metrics.normalised_confusion(matrix)
    assert shares[matrix.sum(1) > 0].sum(1) == pytest.approx(1.0)
    assert not shares[matrix.sum(1) == 0].any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [2, 3, 17, 1023])
def test_correlations_equal_scipy(n, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 26, n) / 5  # many ties, like similarity labels
    x = y + rng.normal(size=n).round(1)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        y[0] += 1
        x[0] += 1
    assert metrics.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-12)
    assert metrics.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0], abs=1e-12)


def test_ranks_average_ties_as_scipy_does():
    values = np.array([3.0, 1.0, 3.0, 2.0, 3.0, 1.0])
    assert (metrics.ranks(values) == scipy.stats.rankdata(values)).all()


@pytest.mark.parametrize("metric", [metrics.pearson, metrics.spearman])
def test_degenerate_correlations_are_zero_without_a_warning(metric):
    varied = np.array([1.0, 2.0, 4.0])
    for constant in (0.0, 0.1, 1e300):
        assert metric(np.full(3, constant), varied) == 0.0
        assert metric(varied, np.full(3, constant)) == 0.0
    assert metric(np.array([]), np.array([])) == 0.0
    assert metric(np.array([1.0]), np.array([2.0])) == 0.0


@pytest.mark.parametrize("metric", [metrics.pearson, metrics.spearman])
def test_correlation_of_a_broken_model_is_nan(metric):
    assert math.isnan(metric(np.array([1.0, np.nan, 2.0]), np.array([1.0, 2.0, 3.0])))
    assert math.isnan(metric(np.array([1.0, np.inf, 2.0]), np.array([1.0, 2.0, 3.0])))


def test_large_and_small_values_keep_their_correlation():
    x = np.array([1.0, 2.0, 3.0, 5.0])
    assert metrics.pearson(x * 1e200, x * 1e-200) == pytest.approx(1.0)
    assert metrics.pearson(x.astype(np.float32), -x) == pytest.approx(-1.0)


def test_no_examples_and_mismatched_shapes():
    empty = np.array([], dtype=np.int64)
    assert metrics.accuracy(empty, empty) == 0.0
    assert metrics.macro_f1(empty, empty) == 0.0
    assert not metrics.confusion_matrix(empty, empty, 2).any()
    with pytest.raises(ValueError, match="one length"):
        metrics.accuracy(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="from 0 to 1"):
        metrics.confusion_matrix(np.array([2]), np.array([0]), 2)


def test_course_score():
    scores = {
        "sentiment_accuracy": 0.5,
        "paraphrase_accuracy": 0.8,
        "similarity_pearson": 0.4,
        "similarity_spearman": 1,
    }
    assert metrics.course_score(scores) == pytest.approx((0.5 + 0.8 + 0.7) / 3)
    assert metrics.course_score({"similarity_pearson": -1.0, "sentiment_accuracy": 0.5}) == pytest.approx(0.25)
    assert metrics.course_score({"cfimdb_accuracy": 1.0}) is None
