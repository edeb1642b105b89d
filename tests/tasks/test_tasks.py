# SPDX-License-Identifier: Apache-2.0
"""Tasks built from options: errors are one line, heads equal their formulas, prediction files match byte for byte."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    ndcg_score,
    precision_score,
    recall_score,
)
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import ConfigError
from minbert_fast.data.label_summary import LabelSummary, merge_summaries
from minbert_fast.data.labels import Classes, Numbers, label_number, label_text
from minbert_fast.data.sentences import Text, Tokens
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import HeadOutput, TaskInput, build_task, losses
from minbert_fast.tasks.base import Results
from minbert_fast.tasks.guess import guess_kind
from minbert_fast.tasks.inference.predictions import write_predictions
from minbert_fast.tasks.kinds.ranking import retrieval_ranks
from minbert_fast.tasks.presets import PRESETS

CONFIG = BertConfig(vocab_size=20, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


def make_input(arity: int, n: int = 4, seed: int = 0) -> TaskInput:
    generator = torch.Generator().manual_seed(seed)
    embeddings = tuple(torch.randn(n, 6, generator=generator) for _ in range(arity))
    offsets = torch.arange(n * arity + 1, dtype=torch.int32)
    return TaskInput(embeddings, torch.cat(embeddings), offsets, max_seqlen=1, first=0)


def make_head(name: str, **options):
    torch.manual_seed(1)
    return build_task(name, options).build_head(CONFIG, {})


def test_every_error_is_one_line_that_names_its_place():
    wrong = [
        ("sentiment", {"dropuot": 0.1}, "tasks.sentiment: unknown key 'dropuot'; did you mean 'dropout'"),
        ("sentiment", {"dropout": 1.0}, "tasks.sentiment.dropout = 1.0"),
        ("sentiment", {"pooling": "median"}, "tasks.sentiment.pooling"),
        ("sentiment", {"data": 3}, "tasks.sentiment.data = 3: expected a file, the name of a layout"),
        ("sentiment", {"data": {"trian": "x.csv"}}, "tasks.sentiment.data: unknown key 'trian'; did you mean 'train'"),
        ("mood", {}, "tasks.mood.kind = 'mood': expected one of classification, .*, sentiment"),
        ("a.b", {"kind": "sentiment"}, "expected a name of letters"),
        ("paraphrase", {"features": []}, "features = []"),
        ("paraphrase", {"features": ["u", "u"]}, "named twice"),
        ("paraphrase", {"features": ["w"]}, r"tasks.paraphrase.features\[0\] = 'w': expected one of u, v"),
        ("paraphrase", {"loss": "cosent"}, 'needs head = "cosine"'),
        ("paraphrase", {"head": "cosine", "loss": "cross_entropy"}, 'needs head = "linear"'),
        ("paraphrase", {"auxiliary": {"cosin": 1.0}}, "auxiliary.cosin: expected one of"),
        ("paraphrase", {"project": 0}, "project = 0"),
        ("similarity", {"encoder": "cross"}, 'encoder = "cross" needs head = "linear"'),
        ("paraphrase", {"encoder": "cross", "auxiliary": {"cosent": 1.0}}, "no two vectors to compare"),
        ("paraphrase", {"encoder": "tri"}, "tasks.paraphrase.encoder = 'tri': expected one of bi, cross, both"),
        ("similarity", {"per_class": 9, "balanced": True}, "per_class: expected no fraction"),
        ("paraphrase", {"head": "cosine", "loss": "mse", "class_weights": [1, 2]}, 'loss = "mse" has none'),
        ("nli", {"loss": "bce"}, 'loss = "bce": the task has 3 classes; expected "cross_entropy"'),
        ("nli", {"threshold": 0.6}, "the most likely one is predicted"),
        ("sentiment", {"metric": "pearson"}, "metric 'pearson': expected one of this kind: accuracy, macro_f1"),
        ("sentiment", {"metrics": ["f1/bad"]}, "metric 'f1/bad': expected one of this kind: .*f1/neutral"),
        ("mlm", {"metric": "accuracy"}, "expected one of this kind: none, it only trains"),
        ("sentiment", {"class_weights": [1.0, 2.0]}, "expected one number for each of the 5 classes"),
        ("sentiment", {"kind": ["sentiment"]}, r"kind = \['sentiment'\]: expected one of"),
        ("sentiment", {"class_weights": "even"}, "tasks.sentiment.class_weights = 'even': expected a list"),
        ("topic", {"kind": "classification", "classes": ["a"]}, "expected two or more"),
        ("topic", {"kind": "classification", "classes": ["a", "a"]}, "named twice"),
        ("stars", {"kind": "regression", "range": [5, 1]}, "low < high"),
        ("stars", {"kind": "regression", "range": [0, 2.5], "loss": "ordinal"}, "whole labels"),
        ("tags", {"kind": "multilabel", "balanced": True}, "several classes"),
        ("find", {"kind": "ranking", "objectives": {"triplet": 1.0}}, "needs 3 texts or more, the data has 2"),
        (
            "find",
            {
                "kind": "triplet",
                "objectives": {"regression": 1.0},
                "data": {"train": "x", "text": ["a", "b", "c", "d"]},
            },
            "needs 3 texts, the data has 4",
        ),
        ("find", {"kind": "triplet", "data": {"train": "x.csv", "text": ["a", "b"]}}, "expected 3 text columns, not 2"),
        ("find", {"kind": "ranking", "temperature": 0.0}, "temperature = 0.0: expected above 0"),
        ("words", {"kind": "masked-lm"}, "expected at least one data set, or `data` with files of text"),
        ("nli-triplets", {"objectives": {"contrastive": -1.0}}, "expected 0 or more"),
        ("nli-triplets", {"objectives": {}}, "expected at least one"),
        ("paraphrase", {"weight": math.inf}, "weight = inf"),
        ("paraphrase", {"batch_size": 0}, "batch_size = 0"),
        ("paraphrase", {"fraction": 0.0}, "fraction = 0.0"),
    ]
    for name, options, message in wrong:
        with pytest.raises(ConfigError, match=message.replace("[]", r"\[\]")) as caught:
            build_task(name, options)
        assert "\n" not in str(caught.value)


def test_the_courses_tasks_are_presets_of_general_kinds():
    cfimdb = build_task("cfimdb", {"kind": "polarity"})
    assert (cfimdb.kind, cfimdb.preset, cfimdb.layout) == ("classification", "polarity", "polarity")
    assert (cfimdb.primary, cfimdb.prediction_file("test")) == ("cfimdb_accuracy", "cfimdb-test-output.csv")
    assert cfimdb.header == "Predicted_Sentiment"
    assert cfimdb.build_head(CONFIG, {}).output.out_features == 2
    names = [build_task(name).prediction_file("dev") for name in ("sentiment", "paraphrase", "similarity")]
    assert names == ["sst-dev-output.csv", "para-dev-output.csv", "sts-dev-output.csv"]
    assert [source.layout for source in build_task("nli").sources] == ["snli", "multinli"]
    own = build_task("films", {"kind": "sentiment", "data": {"train": "films.csv", "text": "review"}, "dropout": 0.3})
    assert (own.sources[0].train, own.layout, own.prediction_file("dev")) == ("films.csv", "", "films-dev-output.csv")
    assert (own.options.dropout, len(own.class_names)) == (0.3, 5)
    for name, preset in PRESETS.items():
        task = build_task(name)
        assert (task.kind, task.preset) == (preset["kind"], name)
        assert task.resolved
        assert task.rule is None or task.labelled


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("similarity", {}, False),
        ("similarity", {"loss": "cosent"}, True),
        ("paraphrase", {"loss": "ranking", "head": "cosine"}, True),
        ("paraphrase", {"auxiliary": {"cosine_embedding": 1.0}}, False),
        ("paraphrase", {"auxiliary": {"cosent": 1.0}}, True),
        ("triplet", {"data": "triplets"}, False),
        ("triplet", {"data": "triplets", "objectives": {"regression": 1.0}}, True),
        ("nli-triplets", {"objectives": {"triplet": 1.0, "contrastive": 1.0}}, True),
        ("contrastive", {"text": ["sentiment"]}, True),
        ("mlm", {}, False),
    ],
)
def test_losses_that_compare_the_examples_of_a_batch(kind: str, options: dict[str, object], expected: bool) -> None:
    """Such a loss of several processes is another one, which the run must say."""
    assert build_task(kind, options).compares_examples == expected


def test_a_task_of_ones_own_has_its_names_in_files_and_metrics():
    task = build_task("topic", {"kind": "classification", "classes": ["b", "a"], "metric": "f1/a"})
    assert (task.prediction_file("dev"), task.header) == ("topic-dev-output.csv", "Predicted_topic")
    assert task.primary == "topic_f1/a"
    assert task.metric_names[-1] == "topic_f1/a"
    assert task.as_labels(np.array([1, 0])) == ["a", "b"]
    assert build_task("sentiment").as_labels(np.array([1, 0])) == [1, 0]
    assert build_task("topic", {"kind": "classification", "metric": "f1/later"}).primary == "topic_f1/later"


# ---- What training labels say ----------------------------------------------------------------------------------------


def summary(*labels: object, **more) -> LabelSummary:
    names = Counter(label_text(label) for label in labels)
    numbers = [label_number(label) for label in labels]
    found = [number for number in numbers if number is not None]
    ends = (min(found), max(found)) if found and len(found) == len(labels) else (None, None)
    return LabelSummary(len(labels), names, {}, *ends, **{"whole": all(float(n).is_integer() for n in found)} | more)


def resolved(name: str, options: dict, found: LabelSummary):
    task = build_task(name, options)
    assert not task.resolved
    whole = build_task(name, options | task.resolve(found))
    assert whole.resolved
    assert whole.resolve(found) == {}
    return whole


def test_classes_and_their_weights_are_found_in_the_training_labels():
    labels = ["world", "sport", "sport", "10", "9", "sport"]
    task = resolved("topic", {"kind": "classification", "class_weights": "balanced"}, summary(*labels))
    assert task.class_names == ("9", "10", "sport", "world")
    assert task.rule == Classes(task.class_names)
    expected = compute_class_weight("balanced", classes=np.array(task.class_names), y=np.array(labels))
    np.testing.assert_allclose(task.options.weights, expected)
    sst = resolved("sentiment", {"class_weights": "balanced"}, summary(*[0, 1, 2, 3, 4, 4.0]))
    assert sst.options.class_counts == (1, 1, 1, 1, 2)


def test_names_of_several_labels_are_found():
    text = summary("a,b", "b", "b, c", empty=1)
    lists = LabelSummary(4, listed={"a": 1, "b": 3, "c": 1}, lists=True)
    both = merge_summaries([summary("a,b", empty=1), LabelSummary(2, listed={"b": 2, "c": 1}, lists=True)])
    for found in (text, lists, both):  # the same labels, written in three ways
        task = resolved("tags", {"kind": "multilabel", "class_weights": "balanced"}, found)
        assert task.class_names == ("a", "b", "c")
        assert task.options.weights == (3.0, 1 / 3, 3.0)
    counted = {"kind": "multilabel", "class_weights": "balanced", "class_counts": [1, 2, 1]}
    assert resolved("tags", counted, text).options.weights == (3.0, 1.0, 3.0)  # of 4 rows
    named = LabelSummary(2, listed={"b": 2}, lists=True, classes=("c", "b", "a"))
    assert resolved("tags", {"kind": "multilabel"}, named).class_names == named.classes


def test_names_that_prediction_files_would_divide_are_refused():
    found = LabelSummary(4, listed={"slow, old": 2, "new": 3}, lists=True)
    with pytest.raises(ConfigError, match="the class 'slow, old' contains the separator ','; set another one"):
        build_task("tags", {"kind": "multilabel"}).resolve(found)
    assert resolved("tags", {"kind": "multilabel", "separator": "|"}, found).class_names == ("new", "slow, old")


def test_the_range_of_a_regression_is_found_and_does_not_refuse_other_rows():
    task = resolved("stars", {"kind": "regression"}, summary(1, 5, 2.5))
    assert (task.options.limits, task.rule) == ((1.0, 5.0), Numbers())
    assert build_task("stars", {"kind": "pair-regression", "range": [1, 5]}).rule == Numbers(1.0, 5.0)


@pytest.mark.parametrize(
    ("kind", "found", "message"),
    [
        ("classification", summary(*range(4000)), "4,000 different labels in 4,000 rows are no classes"),
        ("classification", LabelSummary(20_000), "too many different labels in 20,000 rows"),
        ("classification", summary("a", "a"), "all 2 rows have the label 'a'; expected two classes or more"),
        ("pair-classification", LabelSummary(), "no row has a label"),
        ("classification", summary("a", "b", lists=True), 'expected kind = "multilabel"'),
        ("multilabel", summary(*[f"a{i}" for i in range(3000)]), "3,000 different labels in 3,000 rows"),
        ("regression", summary("good", 3), "the labels are not all numbers; expected numbers, or a kind of"),
        ("pair-regression", summary(3, 3.0), "every label is 3; expected different numbers"),
        ("regression", LabelSummary(), "no row has a label"),
    ],
)
def test_labels_that_do_not_suit_the_kind_are_refused(kind, found, message):
    with pytest.raises(ConfigError, match=f"^tasks.mine: .*{message}") as caught:
        build_task("mine", {"kind": kind}).resolve(found)
    assert "\n" not in str(caught.value)


def test_a_class_without_training_rows_has_no_balanced_weight():
    task = build_task("sentiment", {"class_weights": "balanced"})
    with pytest.raises(ConfigError, match="no training row of class 'positive'"):
        task.resolve(summary(0, 1, 2, 3))


def test_a_loss_for_two_classes_is_refused_once_three_are_found():
    task = build_task("same", {"kind": "pair-classification", "loss": "bce"})
    with pytest.raises(ConfigError, match="the task has 3 classes"):
        build_task("same", {"kind": "pair-classification", "loss": "bce"} | task.resolve(summary("a", "b", "c")))


@pytest.mark.parametrize(
    ("labels", "texts", "kind"),
    [
        ((), 1, "contrastive"),
        ((), 2, "ranking"),
        ((), 3, "ranking"),
        (("good", "bad", "good"), 1, "classification"),
        ((1, 2, 5, 3.0), 1, "classification"),
        ((True, False), 2, "pair-classification"),
        ((0.0, 1.0, 1), 2, "pair-classification"),
        ((0.5, 2, 4.8), 2, "pair-regression"),
        (tuple(range(20)), 1, "classification"),
        (tuple(range(21)), 1, "regression"),
        (tuple(range(1900, 2000)), 1, "regression"),
        ((-1.5, 2e3), 1, "regression"),
    ],
)
def test_the_kind_is_guessed_from_the_labels(labels, texts, kind):
    guessed, reason = guess_kind(summary(*labels), texts)
    assert guessed == kind
    assert reason
    assert "\n" not in reason
    if labels:
        build_task("mine", {"kind": guessed}).resolve(summary(*labels))


def test_labels_that_are_true_or_false_are_called_labels():
    assert guess_kind(summary(True, False), 1)[1] == "2 different labels (false, true)"
    assert guess_kind(summary(1, 0), 1)[1] == "2 different whole numbers as labels (0, 1)"


def test_lists_are_several_labels_and_free_text_is_no_label():
    assert guess_kind(summary("a", "b", lists=True), 1)[0] == "multilabel"
    for found, texts in ((summary("a", "b", lists=True), 2), (summary("a", "b"), 3)):
        with pytest.raises(ConfigError):
            guess_kind(found, texts)
    with pytest.raises(ConfigError, match=r"with a decimal comma \(0,5\): write them with a decimal point"):
        guess_kind(summary("0,5", "2", "1,0"), 1)
    assert guess_kind(summary("1,2", "1,b"), 1)[0] == "classification"
    with pytest.raises(ConfigError, match="500 different labels in 500 rows"):
        guess_kind(summary(*[f"text {i}" for i in range(500)]), 1)


# ---- Heads -----------------------------------------------------------------------------------------------------------


def test_sentiment_baseline_is_a_linear_layer_and_cross_entropy():
    head = make_head("sentiment", dropout=0.0)
    inputs = make_input(1)
    output = head(inputs)
    torch.testing.assert_close(output.scores, inputs.embeddings[0] @ head.output.weight.T + head.output.bias)
    labels = torch.tensor([4, 0, 2, 2])
    expected = -output.scores.log_softmax(-1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(head.loss(output, labels), expected)
    assert head.predict(output).tolist() == output.scores.argmax(-1).tolist()
    torch.testing.assert_close(head.probabilities(output).sum(-1), torch.ones(4))


def test_paraphrase_baseline_is_concatenation_and_binary_cross_entropy():
    head = make_head("paraphrase", dropout=0.0)
    inputs = make_input(2)
    output = head(inputs)
    logits = (torch.cat(inputs.embeddings, -1) @ head.output.weight.T + head.output.bias)[:, 0]
    torch.testing.assert_close(output.scores, logits)
    labels = torch.tensor([1.0, 0.0, 1.0, 1.0])
    p = logits.sigmoid()
    torch.testing.assert_close(
        head.loss(output, labels), -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(), rtol=1e-5, atol=1e-6
    )
    assert head.predict(output).tolist() == (p >= 0.5).float().tolist()
    torch.testing.assert_close(head.probabilities(output)[:, 1], p)


def test_similarity_baseline_is_the_cosine_on_labels_from_0_to_1():
    head = make_head("similarity")
    inputs = make_input(2)
    u, v = inputs.embeddings
    c = (u * v).sum(-1) / u.norm(dim=-1) / v.norm(dim=-1)
    output = head(inputs)
    torch.testing.assert_close(output.scores, c)
    labels = torch.tensor([5.0, 0.0, 2.5, 4.4])
    torch.testing.assert_close(head.loss(output, labels), ((c - labels / 5) ** 2).mean())
    torch.testing.assert_close(head.predict(output), (5 * c).clamp(0, 5))
    assert head.probabilities(output) is None


def test_signed_labels_are_from_minus_1_to_1():
    head = make_head("similarity", labels="signed", project=True)
    inputs = make_input(2)
    u, v = (head.projection(x) for x in inputs.embeddings)
    c = torch.cosine_similarity(u, v)
    output = head(inputs)
    labels = torch.tensor([5.0, 0.0, 2.5, 4.0])
    torch.testing.assert_close(head.loss(output, labels), ((c - (2 * labels / 5 - 1)) ** 2).mean())
    torch.testing.assert_close(head.predict(output), 5 * (c + 1) / 2)


def test_features_are_concatenated_in_the_given_order():
    names = ["cosine", "product", "v", "abs_diff", "u"]
    head = make_head("paraphrase", features=names, dropout=0.0)
    inputs = make_input(2)
    u, v = inputs.embeddings
    x = torch.cat([torch.cosine_similarity(u, v)[:, None], u * v, v, (u - v).abs(), u], -1)
    torch.testing.assert_close(head(inputs).scores, (x @ head.output.weight.T + head.output.bias)[:, 0])


def test_similarity_over_classes_predicts_the_expected_label():
    head = make_head("similarity", head="linear", loss="cross_entropy")
    output = head(make_input(2))
    assert output.scores.shape == (4, 6)
    labels = torch.tensor([0.4, 2.6, 5.0, 3.0])
    expected = -output.scores.log_softmax(-1)[torch.arange(4), torch.tensor([0, 3, 5, 3])].mean()
    torch.testing.assert_close(head.loss(output, labels), expected)
    torch.testing.assert_close(head.predict(output), output.scores.softmax(-1) @ torch.arange(6.0))
    rounded = make_head("similarity", head="linear", loss="cross_entropy", rounded=True)
    assert set(rounded.predict(output).tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


def test_auxiliary_losses_are_added_with_their_weights():
    plain = make_head("paraphrase", dropout=0.0)
    more = make_head("paraphrase", dropout=0.0, auxiliary={"ranking": 0.5, "cosent": 2.0})
    inputs = make_input(2)
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = plain.loss(plain(inputs), labels)
    expected = expected + 0.5 * losses.ranking(*inputs.embeddings, labels, 0.05)
    expected = expected + 2.0 * losses.cosent(*inputs.embeddings, labels, 0.05)
    torch.testing.assert_close(more.loss(more(inputs), labels), expected)


@pytest.mark.parametrize("loss", ["bce", "mse", "l1", "hinge", "cosine_embedding", "cosent", "ranking"])
@pytest.mark.parametrize("name", ["paraphrase", "similarity"])
def test_every_loss_of_the_cosine_head_decreases_along_its_gradient(name, loss):
    head = make_head(name, head="cosine", loss=loss, project=True, dropout=0.0, calibrated=True, scale=2.0)
    inputs = make_input(2, n=8)
    labels = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0]) * (5 if name == "similarity" else 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
    first = head.loss(head(inputs), labels)
    for _ in range(20):
        optimizer.zero_grad()
        head.loss(head(inputs), labels).backward()
        optimizer.step()
    assert head.loss(head(inputs), labels) < first
    degrees = head.similarity(head(inputs))
    assert ((degrees >= 0) & (degrees <= 1)).all()


def test_a_cross_encoded_pair_has_one_embedding():
    task = build_task("paraphrase", {"encoder": "cross", "dropout": 0.0})
    assert (task.arity, task.encoder) == (1, "cross")
    head = task.build_head(CONFIG, {})
    inputs = make_input(1)
    torch.testing.assert_close(
        head(inputs).scores, (inputs.embeddings[0] @ head.output.weight.T + head.output.bias)[:, 0]
    )


def test_encoder_both_adds_a_linear_function_of_the_joint_embedding():
    """score = factor cos(u, v) + offset + a . x + b, with x the joint embedding; a and b are 0 at first."""
    task = build_task(
        "similarity", {"encoder": "both", "calibrated": True, "scale": 0.8, "offset": 0.1, "dropout": 0.0}
    )
    assert task.arity == 3
    head = task.build_head(CONFIG, {})
    inputs = make_input(3)
    u, v, x = inputs.embeddings
    cosines = (u * v).sum(-1) / u.norm(dim=-1) / v.norm(dim=-1)
    torch.testing.assert_close(head(inputs).scores, 0.8 * cosines + 0.1)
    nn.init.normal_(head.together.weight)
    nn.init.normal_(head.together.bias)
    expected = 0.8 * cosines + 0.1 + x @ head.together.weight[0] + head.together.bias
    torch.testing.assert_close(head(inputs).scores, expected)
    linear = build_task(
        "paraphrase", {"encoder": "both", "features": ["cosine", "product"], "dropout": 0.0}
    ).build_head(CONFIG, {})
    features = torch.cat([cosines[:, None], u * v, x], dim=-1)
    torch.testing.assert_close(linear(inputs).scores, linear.output(features)[:, 0])
    assert [vector is given for vector, given in zip(linear(inputs).vectors, (u, v), strict=True)] == [True, True]


@pytest.mark.parametrize(("placement", "changes"), [(["embedding"], True), (["features"], True), ([], False)])
def test_dropout_acts_at_its_place_and_only_in_training(placement, changes):
    head = make_head("paraphrase", dropout=0.5, dropout_at=placement)
    inputs = make_input(2, n=64)
    still = head.eval()(inputs).scores
    assert torch.equal(still, head(inputs).scores)
    assert torch.equal(still, head.train()(inputs).scores) != changes


def test_nli_objectives_are_summed_with_their_weights():
    head = make_head("nli-triplets", objectives={"regression": 1.0, "contrastive": 0.5, "triplet": 2.0})
    inputs = make_input(3)
    a, p, n = inputs.embeddings
    expected = losses.entailment_regression(a, p, n) + 0.5 * losses.contrastive(a, p, (n,), 0.05)
    expected = expected + 2.0 * losses.triplet(a, p, n, 1.0)
    output = head(inputs)
    torch.testing.assert_close(head.loss(output, None), expected)
    follows = torch.cosine_similarity(a, p) > torch.cosine_similarity(a, n)
    assert head.predict(output).tolist() == follows.float().tolist()
    task = build_task("nli", {"kind": "nli-triplets"})
    assert task.evaluate(Results(head.predict(output).numpy(), None)) == {"nli_accuracy": follows.float().mean().item()}


def test_the_threshold_sets_the_decision():
    scores = torch.tensor([-2.0, 0.0, 2.0])
    for threshold, expected in ((0.05, [1.0, 1.0, 1.0]), (0.6, [0.0, 0.0, 1.0]), (0.99, [0.0, 0.0, 0.0])):
        head = make_head("paraphrase", threshold=threshold)
        assert head.predict(HeadOutput(scores)).tolist() == expected


# ---- Heads of the general kinds --------------------------------------------------------------------------------------


def test_class_weights_multiply_the_losses_of_their_examples():
    options = {"kind": "classification", "classes": ["a", "b", "c"], "dropout": 0.0}
    labels = torch.tensor([2, 0, 1, 1])
    for smoothing in (0.0, 0.1):
        head = make_head("topic", **options, class_weights=[1.0, 3.0, 0.5], label_smoothing=smoothing)
        output = head(make_input(1))
        each = -output.scores.log_softmax(-1)
        own = (1 - smoothing) * each[torch.arange(4), labels] + smoothing * each.mean(-1)
        torch.testing.assert_close(head.loss(output, labels), (own * torch.tensor([0.5, 1.0, 3.0, 3.0])).mean())
    head.configure(build_task("topic", options).options)
    torch.testing.assert_close(head.loss(output, labels), F.cross_entropy(output.scores, labels))


@pytest.mark.parametrize("loss", ["bce", "cross_entropy", "ordinal"])
def test_class_weights_and_smoothing_of_pairs(loss):
    smoothing = {} if loss == "ordinal" else {"label_smoothing": 0.2}
    head = make_head("paraphrase", loss=loss, dropout=0.0, class_weights=[2.0, 0.5], **smoothing)
    output, labels = head(make_input(2)), torch.tensor([1, 0, 0, 1])
    s = output.scores
    logits = s - head.thresholds if loss == "ordinal" else s
    if loss == "cross_entropy":
        logits = s[:, 1] - s[:, 0]
    t = labels * 0.8 + 0.1 if smoothing else labels
    each = -(t * F.logsigmoid(logits) + (1 - t) * F.logsigmoid(-logits))
    torch.testing.assert_close(head.loss(output, labels), (each * torch.tensor([0.5, 2.0, 2.0, 0.5])).mean())


def test_three_classes_of_pairs_are_a_softmax_over_the_features():
    head = make_head("nli", dropout=0.0)
    u, v = make_input(2).embeddings
    output = head(make_input(2))
    scores = torch.cat([u, v, (u - v).abs()], -1) @ head.output.weight.T + head.output.bias
    torch.testing.assert_close(output.scores, scores)
    labels = torch.tensor([2, 0, 1, 1])
    torch.testing.assert_close(head.loss(output, labels), F.cross_entropy(scores, labels))
    assert head.predict(output).tolist() == scores.argmax(-1).tolist()
    torch.testing.assert_close(head.probabilities(output), scores.softmax(-1))


def test_ordinal_classes_have_one_score_and_thresholds():
    """Each class is the likely one for some score, before any step; predictions are the median class."""
    head = make_head("sentiment", loss="ordinal", dropout=0.0)
    output = HeadOutput(torch.tensor([-6.0, -2.7, 0.0, 2.7, 6.0]))
    assert head.predict(output).tolist() == [0, 1, 2, 3, 4]
    assert (
        head.probabilities(output).diagonal().min() > 0.5
    )  # 0.2: thresholds that moved too slowly cost 6 points on SST
    labels = torch.tensor([0, 2, 2, 4, 1])
    above = torch.sigmoid(output.scores[:, None] - head.thresholds)
    total = [
        sum(-(above[i, k] if label > k else 1 - above[i, k]).log() for k in range(4)) for i, label in enumerate(labels)
    ]
    torch.testing.assert_close(head.loss(output, labels), torch.stack(total).mean())
    assert head.logits(output) is None


def test_a_regression_predicts_on_the_scale_of_its_labels():
    inputs, labels = make_input(1), torch.tensor([1.0, 5.0, 2.0, 3.5])
    x = inputs.embeddings[0]
    for options, function in (
        ({}, lambda s, t: ((s - (t - 1) / 4) ** 2).mean()),
        ({"loss": "l1"}, lambda s, t: (s - (t - 1) / 4).abs().mean()),
        ({"labels": "raw"}, lambda s, t: ((s - t) ** 2).mean()),
        ({"loss": "bce"}, lambda s, t: F.binary_cross_entropy(s.sigmoid(), (t - 1) / 4)),
        ({"loss": "bce", "labels": "raw"}, lambda s, t: F.binary_cross_entropy(s.sigmoid(), (t - 1) / 4)),
    ):
        head = make_head("stars", kind="regression", found_range=[1, 5], dropout=0.0, **options)
        output = head(inputs)
        s = (x @ head.output.weight.T + head.output.bias)[:, 0]
        torch.testing.assert_close(head.loss(output, labels), function(s, labels))
        unit = s.sigmoid() if options.get("loss") == "bce" else s
        torch.testing.assert_close(head.predict(output), s if options == {"labels": "raw"} else 1 + 4 * unit)
    far = HeadOutput(torch.tensor([-3.0, 7.0]))
    assert make_head("stars", kind="regression", range=[1, 5]).predict(far).tolist() == [1.0, 5.0]
    assert make_head("stars", kind="regression", found_range=[1, 5]).predict(far).tolist() == [-11.0, 29.0]
    near = HeadOutput(torch.tensor([0.3, 0.45]))
    rounded = make_head("stars", kind="regression", range=[1, 5], rounded=True)
    assert rounded.predict(near).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("name", ["regression", "pair-regression"])
def test_ordinal_regression_predicts_the_expected_label(name):
    head = make_head("stars", kind=name, found_range=[1, 4], loss="ordinal", dropout=0.0)
    output = head(make_input(1 if name == "regression" else 2))
    above = torch.sigmoid(output.scores[:, None] - head.thresholds)  # [n, 3]
    torch.testing.assert_close(head.predict(output), 1 + above.sum(-1))
    labels = torch.tensor([1.0, 4.0, 2.25, 3.0])
    targets = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0.25, 0], [1, 1, 0]])
    expected = F.binary_cross_entropy(above, targets, reduction="none").sum(-1).mean()
    torch.testing.assert_close(head.loss(output, labels), expected)


def test_raw_labels_are_regressed_as_in_the_file():
    head = make_head("similarity", head="linear", labels="raw", dropout_at=["features"], dropout=0.0)
    output, labels = head(make_input(2)), torch.tensor([5.0, 0.0, 2.5, 4.0])
    s = (torch.cat(make_input(2).embeddings, -1) @ head.output.weight.T + head.output.bias)[:, 0]
    torch.testing.assert_close(head.loss(output, labels), ((s - labels) ** 2).mean())
    torch.testing.assert_close(head.predict(output), s.clamp(0, 5))


def test_scores_beyond_the_labels_are_predicted_where_the_range_was_only_found():
    """A linear score has no bounds, a cosine has those of the training labels, and a given range binds both."""
    far = HeadOutput(torch.tensor([-1.0, 2.0]))
    for head, where, expected in (
        ("linear", {"found_range": [1, 5]}, [-3.0, 9.0]),
        ("linear", {"range": [1, 5]}, [1.0, 5.0]),
        ("cosine", {"found_range": [1, 5]}, [1.0, 5.0]),
    ):
        assert make_head("near", kind="pair-regression", head=head, **where).predict(far).tolist() == expected


@pytest.mark.parametrize("loss", ["hinge", "cosent", "ranking"])
def test_a_cosine_of_0_is_half_way_for_losses_of_the_order_of_cosines(loss):
    head = make_head("similarity", head="cosine", loss=loss)
    assert head.predict(HeadOutput(torch.tensor([-1.0, 0.0, 1.0]))).tolist() == [0.0, 2.5, 5.0]


def test_several_labels_are_independent_probabilities():
    options = {"kind": "multilabel", "classes": ["a", "b", "c"], "dropout": 0.0, "threshold": 0.4}
    head = make_head("tags", **options, class_weights=[1.0, 2.0, 3.0])
    output, labels = head(make_input(1)), torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    p = output.scores.sigmoid()
    expected = -(torch.tensor([1.0, 2, 3]) * labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(head.loss(output, labels), expected)
    torch.testing.assert_close(head.probabilities(output), p)
    predictions = head.predict(output)
    assert torch.equal(predictions, (p >= 0.4).float())
    task = build_task("tags", options | {"metrics": ["micro_f1", "macro_f1", "accuracy", "average_precision", "f1/b"]})
    found = task.evaluate(Results(predictions.numpy(), labels.numpy(), p.detach().numpy()))
    y, z = labels.numpy(), predictions.numpy()
    assert found == pytest.approx(
        {
            "tags_micro_f1": f1_score(y, z, average="micro"),
            "tags_macro_f1": f1_score(y, z, average="macro"),
            "tags_accuracy": accuracy_score(y, z),
            "tags_average_precision": average_precision_score(y, p.detach().numpy(), average="macro"),
            "tags_f1/b": f1_score(y[:, 1], z[:, 1]),
        }
    )
    assert task.as_labels(np.array([[1, 0, 1], [0, 0, 0]])) == ["a,c", ""]


def test_metrics_of_classes_equal_scikit_learns():
    rng = np.random.default_rng(0)
    labels, shares = rng.integers(0, 3, 60), rng.dirichlet(np.ones(3), 60)
    predictions = shares.argmax(1)
    options = {"kind": "classification", "classes": ["x", "y", "z"], "metric": "recall/y"}
    found = build_task("topic", options).evaluate(Results(predictions, labels, shares))
    macro = {"average": "macro"}
    assert found == pytest.approx(
        {
            "topic_accuracy": accuracy_score(labels, predictions),
            "topic_macro_f1": f1_score(labels, predictions, **macro),
            "topic_macro_precision": precision_score(labels, predictions, **macro),
            "topic_macro_recall": recall_score(labels, predictions, **macro),
            "topic_matthews": matthews_corrcoef(labels, predictions),
            "topic_average_precision": average_precision_score(np.eye(3)[labels], shares, **macro),
            "topic_recall/y": recall_score(labels, predictions, labels=[1], average="macro"),
        }
    )
    two = build_task("topic", {"kind": "classification", "classes": ["x", "y"], "metric": "average_precision"})
    labels, shares = rng.integers(0, 2, 60), rng.dirichlet(np.ones(2), 60)
    found = two.evaluate(Results(shares.argmax(1), labels, shares))
    assert found["topic_average_precision"] == pytest.approx(average_precision_score(labels, shares[:, 1]))


# ---- Ranking ---------------------------------------------------------------------------------------------------------


def test_the_number_of_text_columns_is_the_number_of_negatives():
    assert build_task("find", {"kind": "ranking"}).arity == 2
    for columns in (["q", "a"], ["q", "a", "n1", "n2"]):
        task = build_task("find", {"kind": "ranking", "data": {"train": "x.csv", "text": columns}})
        assert (task.num_texts, task.arity, task.rule) == (len(columns), len(columns), None)
    with pytest.raises(ConfigError, match="one source has 2 texts, another 3"):
        build_task("find", {"kind": "ranking", "data": [{"train": "x", "text": ["a", "b"]}, "triplets"]})


def test_ranking_objectives_take_any_number_of_negatives():
    data = {"train": "x.csv", "text": ["q", "a", "n1", "n2"]}
    options = {"contrastive": 1.0, "triplet": 0.5}
    head = make_head("find", kind="ranking", data=data, objectives=options, temperature=1.0, symmetric=True, margin=0.2,
                     distance="cosine")  # fmt: skip
    a, p, m, n = make_input(4).embeddings
    output = head(make_input(4))
    expected = losses.contrastive(a, p, (m, n), 1.0, symmetric=True)
    expected = expected + 0.25 * sum(losses.triplet(a, p, x, 0.2, "cosine") for x in (m, n))
    torch.testing.assert_close(head.loss(output, None), expected)
    cosines = torch.stack([torch.cosine_similarity(a, x) for x in (p, m, n)], -1)
    assert head.predict(output).tolist() == (cosines.argmax(-1) == 0).float().tolist()
    alone = make_head("find", kind="ranking")
    torch.testing.assert_close(alone.predict(alone(make_input(2))), cosines[:, 0])


def test_ranking_is_judged_by_retrieval_among_the_dev_rows():
    rng = np.random.default_rng(1)
    anchors, positives, negatives = (rng.normal(size=(30, 5)) for _ in range(3))
    task = build_task("find", {"kind": "ranking", "data": "triplets"})
    found = task.evaluate(Results(np.ones(30), None, vectors=(anchors, positives, negatives)))

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    scores = unit(anchors) @ np.concatenate([unit(positives), unit(negatives)]).T
    ranks = [1 + sum(scores[i] > scores[i, i]) for i in range(30)]
    assert found == pytest.approx(
        {
            "find_recall_at_1": np.mean([r <= 1 for r in ranks]),
            "find_recall_at_10": np.mean([r <= 10 for r in ranks]),
            "find_mrr": np.mean([1 / r for r in ranks]),
            "find_ndcg_at_10": ndcg_score(np.eye(30, 60), scores, k=10),
        }
    )


def test_equal_texts_do_not_count_against_each_other():
    """Rows 0 and 1 ask the same question, rows 1 and 2 have the same answer; row 3 is another text."""
    sentences = [["q", "q", "r", "s"], ["a", "b", "b", "c"]]
    vectors = {"q": [1.0, 0.0], "r": [0.0, 1.0], "s": [1.0, 1.0], "a": [1.0, 0.1], "b": [1.0, 0.2], "c": [-1.0, 0.0]}
    words = {text: i for i, text in enumerate(vectors)}
    columns = tuple(Tokens.of([[words[text]] for text in column]) for column in sentences)
    table = TokenTable("find", Path(), columns, None, Text.of([""] * 4), np.arange(4), (), "")
    found = tuple(np.array([vectors[text] for text in column]) for column in sentences)
    assert retrieval_ranks(found, table).tolist() == [1, 1, 1, 3]  # row 1: "a" answers it as well; row 2: b before a
    assert retrieval_ranks(found).tolist() == [1, 3, 2, 4]


def test_contrastive_compares_each_text_with_itself():
    task = build_task("embed", {"kind": "contrastive", "text": ["sentiment"], "temperature": 0.1})
    columns = (Tokens.of([[1, 2], [3]]), Tokens.of([[4], [5, 6]]))
    table = TokenTable("pairs", Path("x"), columns, None, Text.of(["", ""]), np.arange(2), (), "")
    rows = task.table([table])
    assert (len(rows), task.arity, task.num_texts, task.predicts) == (4, 2, 1, False)
    assert [[sentence.tolist() for sentence in column] for column in rows.columns] == [[[1, 2], [3], [4], [5, 6]]] * 2
    head = task.build_head(CONFIG, {})
    u, v = make_input(2).embeddings
    torch.testing.assert_close(head.loss(head(make_input(2)), None), losses.contrastive(u, v, (), 0.1))


def _loss_of_last(name: str, options: dict, labels: Tensor) -> Tensor:
    head = make_head(name, **options)
    inputs = make_input(2, n=len(labels))
    return head.loss(head(inputs), labels)


@pytest.mark.parametrize("name", ["paraphrase", "similarity"])
def test_a_batch_of_one_has_a_finite_loss(name):
    for options in ({}, {"head": "cosine", "loss": "cosent"}, {"head": "cosine", "loss": "ranking"}):
        if name == "similarity" and not options:
            options = {"loss": "mse"}
        assert torch.isfinite(_loss_of_last(name, options, torch.ones(1)))


# ---- Prediction files ------------------------------------------------------------------------------------------------


def test_prediction_files_equal_the_courses_byte_for_byte(tmp_path: Path):
    write_predictions(tmp_path / "a" / "s.csv", build_task("sentiment").header, ["x", "y"], np.array([3, 0]))
    assert (tmp_path / "a" / "s.csv").read_bytes() == b"id \t Predicted_Sentiment \nx , 3 \ny , 0 \n"
    write_predictions(tmp_path / "p.csv", build_task("paraphrase").header, ["x"], np.array([1.0], np.float32))
    assert (tmp_path / "p.csv").read_bytes() == b"id \t Predicted_Is_Paraphrase \nx , 1.0 \n"
    write_predictions(tmp_path / "t.csv", build_task("similarity").header, ["x"], np.array([2.5], np.float32))
    assert (tmp_path / "t.csv").read_bytes() == b"id \t Predicted_Similiary \nx , 2.5 \n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "p.csv", "t.csv"]  # no temporary file is left


def test_prediction_files_refuse_unreadable_rows(tmp_path: Path):
    with pytest.raises(ValueError, match="1 ids for 2 predictions"):
        write_predictions(tmp_path / "s.csv", build_task("sentiment").header, ["x"], np.array([3, 0]))
    with pytest.raises(ValueError, match="line break"):
        write_predictions(tmp_path / "s.csv", build_task("sentiment").header, ["x\n"], np.array([3]))
    assert not (tmp_path / "s.csv").exists()


def test_a_kind_with_the_files_of_another_is_refused() -> None:
    """In recipes from before the first release `sentiment` with these data meant `polarity`; it trained five classes."""
    with pytest.raises(ConfigError, match=r"^tasks\.films: data = 'polarity' is of kind 'polarity', not 'sentiment'"):
        build_task("films", {"kind": "sentiment", "data": "polarity"})
