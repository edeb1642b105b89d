# SPDX-License-Identifier: Apache-2.0
"""Heads and losses built from the recipe files, against the formulas of the published experiments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minbert_fast.model.config import BertConfig
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import Head, HeadOutput, TaskInput, build_tasks
from minbert_fast.trainer.job import Options, train
from tests.small import small_data

WIDTH, ROWS = 6, 5
CONFIG = BertConfig(vocab_size=20, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
T = torch.tensor([0.0, 1.0, 2.5, 4.0, 5.0])  # similarities
Y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])  # paraphrases


def head_of(recipe: str, task: str) -> Head:
    """The task's head without dropout; shared layers as in the whole model."""
    torch.manual_seed(3)
    shared: dict[str, nn.Module] = {}
    heads = {name: t.build_head(CONFIG, shared) for name, t in build_tasks(Recipe.load(recipe)).items()}
    return heads[task].eval()


def vectors(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(ROWS, WIDTH, generator=generator) for _ in range(count))


def run(head: Head, *embeddings: Tensor) -> HeadOutput:
    offsets = torch.arange(ROWS * len(embeddings) + 1, dtype=torch.int32)
    return head(TaskInput(embeddings, torch.cat(embeddings), offsets, max_seqlen=1, first=0))


def loss_of(recipe: str, task: str, labels: Tensor | None) -> tuple[Head, float]:
    head = head_of(recipe, task)
    return head, head.loss(run(head, *vectors(3 if labels is None else 2)), labels).item()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([torch.stack([(w * row).sum() for w in layer.weight]) + layer.bias for row in x])


def cosines(u: Tensor, v: Tensor) -> Tensor:
    return torch.stack([(a * b).sum() / (a.norm() * b.norm()) for a, b in zip(u, v, strict=True)])


def bce(s: Tensor, y: Tensor) -> float:
    p = 1 / (1 + torch.exp(-s))
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean().item()


def softmax_loss(scores: Tensor, classes: Tensor) -> float:
    p = scores.exp() / scores.exp().sum(1, keepdim=True)
    return -torch.stack([p[i, int(c)].log() for i, c in enumerate(classes)]).mean().item()


# ---- A Sentence-BERT extension -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["sbert-exp1", "sbert-exp1-each-once", "sbert-exp2", "sbert-exp4"])
def test_sbert_similarity_is_a_projected_cosine_on_labels_from_minus_1_to_1(recipe: str) -> None:
    head, loss = loss_of(recipe, "similarity", T)
    u, v = (linear(head.projection, x) for x in vectors(2))
    assert loss == pytest.approx((cosines(u, v) - (2 * T / 5 - 1)).square().mean().item(), rel=1e-5)


def test_sbert_paraphrase_is_a_linear_layer_on_both_embeddings() -> None:
    head, loss = loss_of("sbert-exp1", "paraphrase", Y)
    assert loss == pytest.approx(bce(linear(head.output, torch.cat(vectors(2), 1))[:, 0], Y), rel=1e-5)


def test_sbert_exp3_paraphrase_is_the_cosine_of_projections() -> None:
    head, loss = loss_of("sbert-exp3", "paraphrase", Y)
    u, v = (linear(head.projection, x) for x in vectors(2))
    assert loss == pytest.approx(bce(cosines(u, v), Y), rel=1e-5)


def test_sbert_exp4_drops_before_the_similarity_projection_and_exp1_does_not() -> None:
    """Vectors after dropout differ between two calls."""
    for recipe, differs in (("sbert-exp1", False), ("sbert-exp4", True)):
        head = head_of(recipe, "similarity").train()
        first, second = (run(head, *vectors(2)).vectors[0] for _ in range(2))
        assert bool((first != second).any()) == differs


@pytest.mark.parametrize("task", ["paraphrase", "similarity"])
def test_sbert_baselines_compare_embeddings_of_one_dimension(task: str) -> None:
    head = head_of("sbert-baseline-full", task)
    u, v = (linear(head.projection, x) for x in vectors(2))
    assert u.shape == (ROWS, 1)
    torch.testing.assert_close(run(head, *vectors(2)).scores, (u * v).sign()[:, 0])


@pytest.mark.usefixtures("one_thread")
def test_sbert_baselines_evaluate_heads_that_no_stage_trains(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    values = {
        "data": {"directory": str(data), "cache": str(data / "cache")},
        "training": {"max_steps": 2, "batch_size": 4, "evaluate_train": 5},
    }
    recipe = Recipe.load("sbert-baseline-full").with_values(values, "test")
    output = train(recipe, Options(tmp_path / "run", device="cpu"))
    scores = json.loads((output / "summary.json").read_text())
    assert {"sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson"} <= set(scores["dev"])
    assert "sentiment_accuracy" in scores["train"]
    assert "paraphrase_accuracy" not in scores["train"]
    assert {path.name for path in (output / "predictions").glob("*.csv")} == {
        f"{n}-dev-output.csv" for n in ("sst", "para", "sts")
    }


# ---- Siamese minBERT -----------------------------------------------------------------------------------------------------

MEETINGS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "siamese": lambda u, v: [u, v, (u - v).abs()],
    "siamese-baseline": lambda u, v: [u * v],
    "siamese-paraphrase-u-v-abs-diff": lambda u, v: [u, v, (u - v).abs()],
    "siamese-paraphrase-u-v-product": lambda u, v: [u, v, u * v],
    "siamese-paraphrase-product": lambda u, v: [u * v],
    "siamese-paraphrase-abs-diff": lambda u, v: [(u - v).abs()],
    "siamese-paraphrase-abs-diff-product": lambda u, v: [(u - v).abs(), u * v],
    "siamese-paraphrase-u-v": lambda u, v: [u, v],
    "siamese-paraphrase-u-v-abs-diff-product": lambda u, v: [u, v, (u - v).abs(), u * v],
}


@pytest.mark.parametrize("recipe", MEETINGS)
def test_siamese_pairs_are_classified_by_a_softmax(recipe: str) -> None:
    head, loss = loss_of(recipe, "paraphrase", Y)
    scores = linear(head.output, torch.cat(MEETINGS[recipe](*vectors(2)), 1))
    assert scores.shape == (ROWS, 2)
    assert loss == pytest.approx(softmax_loss(scores, Y), rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "formula"),
    [
        ("siamese", lambda c, t: (c - t).square()),
        ("siamese-similarity-l1", lambda c, t: (c - t).abs()),
        ("siamese-similarity-hinge", lambda c, t: (1 - (2 * t - 1) * c).clamp(min=0)),
    ],
)
def test_siamese_similarity_losses(recipe: str, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    _, loss = loss_of(recipe, "similarity", T)
    assert loss == pytest.approx(formula(cosines(*vectors(2)), T / 5).mean().item(), rel=1e-5)


def test_siamese_similarity_over_six_classes() -> None:
    labels = torch.tensor([0.0, 1.0, 2.4, 3.6, 5.0])
    head, loss = loss_of("siamese-similarity-cross-entropy", "similarity", labels)
    u, v = vectors(2)
    scores = linear(head.output, torch.cat([u, v, (u - v).abs()], 1))
    assert scores.shape == (ROWS, 6)
    assert loss == pytest.approx(softmax_loss(scores, torch.tensor([0, 1, 2, 4, 5])), rel=1e-5)


def test_siamese_draws_a_quarter_of_quora_by_inverse_class_frequency() -> None:
    options = build_tasks(Recipe.load("siamese"))["paraphrase"].options
    assert (options.fraction, options.balanced, options.replacement) == (0.25, True, True)
    assert {Recipe.load(f"siamese{end}").model.pooling for end in ("", "-max", "-cls")} == {"mean", "max", "cls"}


# ---- BERTology -----------------------------------------------------------------------------------------------------------


def test_bertology_baseline_similarity_is_linear_on_raw_labels() -> None:
    head, loss = loss_of("bertology-baseline", "similarity", T)
    score = linear(head.output, torch.cat(vectors(2), 1))[:, 0]
    assert loss == pytest.approx((score - T).square().mean().item(), rel=1e-5)
    torch.testing.assert_close(head.predict(run(head, *vectors(2))), score.clamp(0, 5))


def test_bertology_pair_tasks_share_one_stack() -> None:
    shared: dict[str, nn.Module] = {}
    tasks = build_tasks(Recipe.load("bertology-shared"))
    paraphrase, similarity = (tasks[name].build_head(CONFIG, shared).eval() for name in ("paraphrase", "similarity"))
    assert paraphrase.stack is similarity.stack
    assert len(paraphrase.stack.layers) == 2

    def tower(x: Tensor) -> Tensor:
        for layer in paraphrase.stack.layers:
            x = linear(layer, x).clamp(min=0)
        return x

    expected = linear(paraphrase.output, torch.cat([tower(x) for x in vectors(2)], 1))[:, 0]
    torch.testing.assert_close(run(paraphrase, *vectors(2)).scores, expected)


def test_bertology_head_mods() -> None:
    u, v = vectors(2)
    features = {
        "bertology-head-mod": torch.cat([u, v, (u - v).abs()], 1),
        "bertology-head-mod-1": torch.cat([u, v, cosines(u, v)[:, None]], 1),
    }
    for recipe, x in features.items():
        head, loss = loss_of(recipe, "paraphrase", Y)
        assert loss == pytest.approx(bce(linear(head.output, x)[:, 0], Y), rel=1e-5)
        _, loss = loss_of(recipe, "similarity", T)
        assert loss == pytest.approx((cosines(u, v) - T / 5).square().mean().item(), rel=1e-5)


def regression(a: Tensor, p: Tensor, n: Tensor) -> float:
    neutral = cosines(a, torch.cat([p[-1:], p[:-1]]))
    return ((cosines(a, p) - 1).square() + cosines(a, n).square() + (neutral - 0.5).square()).mean().item() / 3


def contrastive(a: Tensor, p: Tensor, n: Tensor, temperature: float = 0.05) -> float:
    total = 0.0
    for i in range(ROWS):
        every = [(cosines(a[i : i + 1], c[None]) / temperature).exp().item() for c in (*p, *n)]
        total -= torch.tensor(every[i] / sum(every)).log().item()
    return total / ROWS


def triplet(a: Tensor, p: Tensor, n: Tensor) -> float:
    return ((a - p).square().sum(1).sqrt() - (a - n).square().sum(1).sqrt() + 1).clamp(min=0).mean().item()


@pytest.mark.parametrize("task", ["snli", "mnli"])
def test_bertology_nli_regression_is_the_squared_error_of_the_cosine(task: str) -> None:
    labels = torch.tensor([0.0, 0.5, 1.0, 0.5, 1.0])
    _, loss = loss_of("bertology-nli-regression", task, labels)
    assert loss == pytest.approx((cosines(*vectors(2)) - labels).square().mean().item(), rel=1e-5)


def test_bertology_nli_objectives_alone_and_together() -> None:
    parts = {f.__name__: f(*vectors(3)) for f in (regression, contrastive, triplet)}
    alone = {
        "contrastive": contrastive(*vectors(3), temperature=1.0),  # the report's has none
        "triplet": parts["triplet"],
        "regression-triplets": parts["regression"],
    }
    for name, part in alone.items():
        _, loss = loss_of(f"bertology-nli-{name}", "nli", None)
        assert loss == pytest.approx(part, rel=1e-4)
    _, loss = loss_of("bertology-nli-all", "nli", None)
    assert loss == pytest.approx(sum(parts.values()), rel=1e-4)


@pytest.mark.parametrize("recipe", ["bertology-freeze-sst", "bertology-sst-to-sts"])
def test_bertology_sentiment_trains_on_a_frozen_encoder(recipe: str) -> None:
    pairs, sentiment = Recipe.load(recipe).resolved_stages()
    assert (set(pairs.tasks), pairs.model.freeze) == ({"paraphrase", "similarity"}, False)
    assert (set(sentiment.tasks), sentiment.model.freeze) == ({"sentiment"}, True)


# ---- Fine-tuning BERT, and enhancing minBERT embeddings ------------------------------------------------------------------


def test_finetune_all_is_the_cosine_after_a_stage_on_similarity() -> None:
    first, main = Recipe.load("finetune-all").resolved_stages()
    assert (list(first.tasks), len(main.tasks)) == (["similarity"], 3)
    _, loss = loss_of("finetune-all", "similarity", T)
    assert loss == pytest.approx((cosines(*vectors(2)) - T / 5).square().mean().item(), rel=1e-5)


def test_enhancing_final_losses() -> None:
    """Paraphrase: binary cross-entropy of the cosine's sigmoid. Similarity: cosine embedding loss without a margin."""
    c = cosines(*vectors(2))
    _, loss = loss_of("enhancing-final", "paraphrase", Y)
    assert loss == pytest.approx(bce(c, Y), rel=1e-5)
    _, loss = loss_of("enhancing-final", "similarity", T)
    assert loss == pytest.approx((T / 5 * (1 - c) + (1 - T / 5) * c.clamp(min=0)).mean().item(), rel=1e-5)


def test_enhancing_classes_predicts_whole_similarities_and_paraphrases_from_one_half() -> None:
    head = head_of("enhancing-classes", "similarity")
    expected = (cosines(*vectors(2)).clamp(0, 1) * 5).round()
    torch.testing.assert_close(head.predict(run(head, *vectors(2))), expected)
    head = head_of("enhancing-classes", "paraphrase")
    u = vectors(1)[0]
    around = torch.linspace(0.45, 0.55, ROWS)  # cosines on both sides of one half
    v = u / u.norm(dim=1, keepdim=True)
    across = torch.linalg.qr(torch.cat([v[:, :, None], torch.randn(ROWS, WIDTH, 1)], 2)).Q[:, :, 1]
    w = around[:, None] * v + (1 - around.square()).sqrt()[:, None] * across
    torch.testing.assert_close(head.predict(run(head, u, w)), (around > 0.5).float(), atol=0, rtol=0)


def test_enhancing_mlm_predicts_words_with_the_word_embedding() -> None:
    head = head_of("enhancing-final", "mlm")
    (hidden,) = vectors(1)
    labels = torch.tensor([[0, 3], [2, 17], [4, 0], [0, -100]])  # the last one is ignored
    offsets = torch.arange(ROWS + 1, dtype=torch.int32)
    loss = head.loss(head(TaskInput((hidden,), hidden, offsets, max_seqlen=1, first=0, labels=labels)), labels)
    x = linear(head.dense, hidden[[0, 2, 4]])
    x = x * (1 + torch.erf(x / 2**0.5)) / 2
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + CONFIG.layer_norm_eps).sqrt()
    scores = (x * head.norm.weight + head.norm.bias) @ head.words.weight.T + head.bias
    assert scores.shape == (3, CONFIG.vocab_size)
    assert loss.item() == pytest.approx(softmax_loss(scores, torch.tensor([3, 17, 0])), rel=1e-5)


@pytest.mark.parametrize("recipe", ["enhancing-mlm-nsp", "wish-nsp"])
def test_next_sentence_prediction_is_a_linear_layer_on_the_pooler(recipe: str) -> None:
    head = head_of(recipe, "nsp")
    assert build_tasks(Recipe.load(recipe))["nsp"].pooling == "pooler"
    answers = torch.tensor([0, 1, 1, 0, 1])
    loss = head.loss(run(head, *vectors(1)), answers).item()
    assert loss == pytest.approx(softmax_loss(linear(head.output, vectors(1)[0]), answers), rel=1e-5)


# ---- Future work of the reports ------------------------------------------------------------------------------------------


def test_wish_cosent() -> None:
    _, loss = loss_of("wish-cosent", "similarity", T)
    c = cosines(*vectors(2)) / 0.05
    total = 1 + sum((c[j] - c[i]).exp() for i in range(ROWS) for j in range(ROWS) if T[i] > T[j])
    assert loss == pytest.approx(torch.as_tensor(total).log().item(), rel=1e-5)


def test_wish_ranking_is_added_to_the_paraphrase_loss() -> None:
    head, loss = loss_of("wish-ranking", "paraphrase", Y)
    u, v = vectors(2)
    own = bce(linear(head.output, torch.cat([u, v, (u - v).abs()], 1))[:, 0], Y)
    picks = []
    for i in range(ROWS):
        every = torch.stack([cosines(u[i : i + 1], v[j : j + 1])[0] / 0.05 for j in range(ROWS)])
        picks.append(every.exp().sum().log() - every[i])
    ranking = (torch.stack(picks) * Y).sum() / Y.sum()
    assert loss == pytest.approx(own + 0.5 * ranking.item(), rel=1e-5)
