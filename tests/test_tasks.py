# SPDX-License-Identifier: Apache-2.0
"""Tasks built from options: errors are one line, heads equal their formulas, prediction files match byte for byte."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minbert_fast.common.schema import ConfigError
from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import HeadOutput, TaskInput, build_task
from minbert_fast.tasks.predictions import write_predictions

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
        ("sentiment", {"data": "quora"}, "tasks.sentiment.data = 'quora': expected one of sentiment, polarity"),
        ("mood", {}, "tasks.mood.kind = 'mood': expected one of"),
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
        ("nli", {"objectives": {"contrastive": -1.0}}, "expected 0 or more"),
        ("nli", {"objectives": {}}, "expected at least one"),
        ("paraphrase", {"weight": math.inf}, "weight = inf"),
        ("paraphrase", {"batch_size": 0}, "batch_size = 0"),
        ("paraphrase", {"fraction": 0.0}, "fraction = 0.0"),
    ]
    for name, options, message in wrong:
        with pytest.raises(ConfigError, match=message.replace("[]", r"\[\]")) as caught:
            build_task(name, options)
        assert "\n" not in str(caught.value)


def test_a_tasks_kind_is_its_name_or_its_option():
    cfimdb = build_task("cfimdb", {"kind": "sentiment", "data": "polarity"})
    assert (cfimdb.kind, cfimdb.dataset, cfimdb.primary) == ("sentiment", "polarity", "cfimdb_accuracy")
    assert cfimdb.prediction_file("test") == "cfimdb-test-output.csv"
    assert cfimdb.build_head(CONFIG, {}).output.out_features == 2
    names = [build_task(name).prediction_file("dev") for name in ("sentiment", "paraphrase", "similarity")]
    assert names == ["sst-dev-output.csv", "para-dev-output.csv", "sts-dev-output.csv"]


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
    from minbert_fast.tasks import losses

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
    from minbert_fast.tasks import losses

    head = make_head("nli", objectives={"regression": 1.0, "contrastive": 0.5, "triplet": 2.0})
    inputs = make_input(3)
    a, p, n = inputs.embeddings
    expected = losses.entailment_regression(a, p, n) + 0.5 * losses.contrastive(a, p, n, 0.05)
    expected = expected + 2.0 * losses.triplet(a, p, n, 1.0)
    output = head(inputs)
    torch.testing.assert_close(head.loss(output, None), expected)
    follows = torch.cosine_similarity(a, p) > torch.cosine_similarity(a, n)
    assert head.predict(output).tolist() == follows.float().tolist()
    task = build_task("nli")
    assert task.evaluate(head.predict(output).numpy(), None) == {"nli_accuracy": follows.float().mean().item()}


def test_the_threshold_sets_the_decision():
    scores = torch.tensor([-2.0, 0.0, 2.0])
    for threshold, expected in ((0.05, [1.0, 1.0, 1.0]), (0.6, [0.0, 0.0, 1.0]), (0.99, [0.0, 0.0, 0.0])):
        head = make_head("paraphrase", threshold=threshold)
        assert head.predict(HeadOutput(scores)).tolist() == expected


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
