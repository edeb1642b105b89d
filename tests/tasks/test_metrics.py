# SPDX-License-Identifier: Apache-2.0
"""Metrics against scikit-learn and SciPy; where those warn or return nan, against the docstrings."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.calibration
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
    with warnings.catch_warnings():  # scikit-learn warns of a single class
        warnings.simplefilter("ignore")
        assert metrics.matthews(predictions, labels) == pytest.approx(
            sklearn.metrics.matthews_corrcoef(labels, predictions), abs=1e-12
        )
    *expected, _ = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(CLASSES), zero_division=0
    )
    np.testing.assert_allclose(metrics.precision_recall_f1(predictions, labels, CLASSES), np.transpose(expected))
    matrix = metrics.confusion_matrix(predictions, labels, CLASSES)
    expected = sklearn.metrics.confusion_matrix(labels, predictions, labels=range(CLASSES))
    assert (matrix == expected).all()
    shares = metrics.normalised_confusion(matrix)
    assert shares[matrix.sum(1) > 0].sum(1) == pytest.approx(1.0)
    assert not shares[matrix.sum(1) == 0].any()


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_several_labels_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.random((50, CLASSES)) < 0.3
    predictions = np.where(rng.random(labels.shape) < 0.8, labels, ~labels).astype(int)
    labels = labels.astype(int)
    assert metrics.accuracy(predictions, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
    assert metrics.macro_f1(predictions, labels) == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, average="macro")
    )
    assert metrics.micro_f1(predictions, labels) == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, average="micro")
    )
    assert metrics.macro_precision(predictions, labels) == pytest.approx(
        sklearn.metrics.precision_score(labels, predictions, average="macro")
    )
    assert metrics.macro_recall(predictions[:, 0], labels[:, 0]) == pytest.approx(
        sklearn.metrics.recall_score(labels[:, 0], predictions[:, 0], average="macro")
    )
    *expected, _ = sklearn.metrics.precision_recall_fscore_support(labels, predictions)
    np.testing.assert_allclose(metrics.precision_recall_f1(predictions, labels), np.transpose(expected))
    wider = [
        np.pad(matrix, ((0, 0), (0, 1))) for matrix in (predictions, labels)
    ]  # a class that nobody has or predicts
    for metric in (metrics.macro_f1, metrics.macro_precision, metrics.macro_recall, metrics.micro_f1):
        assert metric(*wider) == metric(predictions, labels)
        assert metric(wider[0][:, -1:], wider[1][:, -1:]) == 0.0
    scores = rng.random(labels.shape)
    assert metrics.average_precision(scores, labels) == pytest.approx(
        sklearn.metrics.average_precision_score(labels, scores, average="macro")
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [2, 17, 1023])
def test_average_precision_equals_scikit_learn(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    labels[0] = 1
    scores = (labels + rng.normal(size=n)).round(1)  # with ties
    expected = sklearn.metrics.average_precision_score(labels, scores)
    assert metrics.average_precision(scores, labels) == pytest.approx(expected)


def test_average_precision_without_positives_or_with_nan():
    assert metrics.average_precision(np.array([0.1, 0.9]), np.zeros(2)) == 0.0
    assert metrics.average_precision(np.array([]), np.array([])) == 0.0
    assert math.isnan(metrics.average_precision(np.array([0.1, np.nan]), np.ones(2)))
    columns = np.array([[0.1, 0.9], [0.9, 0.1]]), np.array([[0, 0], [1, 0]])  # no row has the second class
    assert metrics.average_precision(*columns) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_rankings_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    n, candidates = 40, 30
    right = rng.integers(0, candidates, n)
    scores = rng.normal(size=(n, candidates))
    scores[np.arange(n), right] += 1
    relevant = np.eye(candidates)[right]
    ranks = metrics.ranks_of(scores, right)
    assert metrics.ndcg_at(ranks) == pytest.approx(sklearn.metrics.ndcg_score(relevant, scores, k=10))
    assert metrics.ndcg_at(ranks, 3) == pytest.approx(sklearn.metrics.ndcg_score(relevant, scores, k=3))
    ties = scores.round()  # label_ranking_average_precision counts equal scores as better, too
    for each in (scores, ties):
        expected = sklearn.metrics.label_ranking_average_precision_score(relevant, each)
        assert metrics.mrr(metrics.ranks_of(each, right)) == pytest.approx(expected)
    for k in (1, 5):
        expected = sklearn.metrics.top_k_accuracy_score(right, scores, k=k, labels=range(candidates))
        assert metrics.recall_at(ranks, k) == pytest.approx(expected)


def test_a_model_that_scores_all_candidates_alike_ranks_last():
    for value in (0.5, np.nan):
        assert (metrics.ranks_of(np.full((3, 7), value), np.arange(3)) == 7).all()
    assert metrics.recall_at(np.array([]), 5) == metrics.mrr(np.array([])) == metrics.ndcg_at(np.array([])) == 0.0


def test_mean_absolute_error():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30))
    assert metrics.mae(x, y) == pytest.approx(sklearn.metrics.mean_absolute_error(y, x))
    assert math.isnan(metrics.mae(np.array([np.inf]), np.array([1.0])))
    assert metrics.lower_is_better("price_mae")
    assert metrics.lower_is_better("topic_loss")
    assert metrics.lower_is_better("price_rmse")  # of a kind of one's own: best/ was the model with the largest error
    assert not metrics.lower_is_better("topic_macro_f1")


def test_calibration_of_ten_equal_bins():
    """Against scikit-learn's calibration curve, and the error as written in the paper."""
    rng = np.random.default_rng(0)
    confidences = rng.random(500)
    right = (rng.random(500) < confidences**2).astype(int)
    rows, error = metrics.calibration(confidences, right)
    share, mean = sklearn.calibration.calibration_curve(right, confidences, n_bins=10)
    np.testing.assert_allclose(rows[:, 0], mean)
    np.testing.assert_allclose(rows[:, 1], share)
    assert rows[:, 2].sum() == 500
    assert error == pytest.approx(np.sum(rows[:, 2] / 500 * np.abs(share - mean)))
    assert error > 0.1
    empty, none = metrics.calibration(np.array([]), np.array([]))
    assert (len(empty), none) == (0, 0.0)
    sure, error = metrics.calibration(np.array([0.0, 1.0, 1.0]), np.array([0, 1, 1]))
    assert (len(sure), error) == (2, 0.0)


def test_standard_errors_equal_the_known_formulas():
    """Binomial for accuracy, (1 - r^2) / sqrt(n) for Pearson's r of normal columns; the jackknife itself errs by 10 %."""
    rng = np.random.default_rng(0)
    n = 4000
    labels = np.sort(rng.integers(0, 2, n))
    predictions = np.where(rng.random(n) < 0.7, labels, 1 - labels)
    share = metrics.accuracy(predictions, labels)
    expected = math.sqrt(share * (1 - share) / n)
    assert metrics.standard_error(metrics.accuracy, predictions, labels) == pytest.approx(expected, rel=0.25)
    by_hits = np.argsort(predictions == labels)  # a file may be sorted
    assert metrics.standard_error(metrics.accuracy, predictions[by_hits], labels[by_hits]) == pytest.approx(
        expected, rel=0.25
    )
    x = rng.normal(size=n)
    y = 0.6 * x + 0.8 * rng.normal(size=n)
    expected = (1 - metrics.pearson(x, y) ** 2) / math.sqrt(n)
    assert metrics.standard_error(metrics.pearson, x, y) == pytest.approx(expected, rel=0.25)
    few = metrics.standard_error(
        metrics.accuracy, predictions[::200], labels[::200]
    )  # 20 rows: one is left out each time
    share = metrics.accuracy(predictions[::200], labels[::200])
    assert few == pytest.approx(math.sqrt(share * (1 - share) / 19))
    assert math.isnan(metrics.standard_error(metrics.accuracy, labels[:1], labels[:1]))


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
