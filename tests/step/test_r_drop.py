# SPDX-License-Identifier: Apache-2.0
"""R-Drop: examples packed twice, divergences written out, losses of both copies, shares of several processes."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minbert_fast.common.schema import ConfigError
from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.data.buckets import choose_buckets
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.collate import Collator
from minbert_fast.data.sampling import Sampler
from minbert_fast.data.tokens import Encoder, TokenTable
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import BertConfig
from minbert_fast.model.packing import pack
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.backends import make_step
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import ConsistencyLoss, HeadOutput, MultitaskModel, build_task, build_tasks
from minbert_fast.tasks.consistency import divergence
from tests.step.test_graph import strangers
from tests.step.test_step import CONFIG, SIZES, make_batch, make_model, recipe

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- How far two answers are apart ---------------------------------------------------------------------------------------


def written_out(p: list[float], q: list[float]) -> float:
    """(KL(p | q) + KL(q | p)) / 2."""
    return sum(a * math.log(a / b) + b * math.log(b / a) for a, b in zip(p, q, strict=True)) / 2


def softmax(row: Tensor) -> list[float]:
    return (row.double().exp() / row.double().exp().sum()).tolist()


def sigmoid(x: Tensor) -> list[float]:
    return [1 / (1 + math.exp(x)), 1 / (1 + math.exp(-x))]


@pytest.mark.parametrize(
    ("kind", "options", "columns"),
    [
        ("sentiment", {}, 5),
        ("paraphrase", {"loss": "cross_entropy"}, 2),
        ("paraphrase", {}, 0),
        ("similarity", {}, 0),
        ("nli-triplets", {}, 2),
    ],
)
def test_divergences_are_their_formulas(kind: str, options: dict[str, Any], columns: int) -> None:
    head = build_task(kind, options).build_head(CONFIG, {})
    first, second = (torch.randn(4, columns) if columns else torch.randn(4) for _ in range(2))
    found = divergence(head, HeadOutput(first), HeadOutput(second)).item()
    if kind in ("similarity", "nli-triplets"):
        expected = (first - second).square().mean().item()
    else:
        shares = softmax if columns else sigmoid
        expected = np.mean([written_out(shares(a), shares(b)) for a, b in zip(first, second, strict=True)])
    assert found == pytest.approx(expected, rel=1e-5)
    assert divergence(head, HeadOutput(first), HeadOutput(first)).item() == pytest.approx(0, abs=1e-7)


def test_divergences_of_certain_answers_are_finite() -> None:
    head = build_task("sentiment").build_head(CONFIG, {})
    p, q = torch.tensor([[1000.0, 0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 0, 1000.0]], requires_grad=True)
    found = divergence(head, HeadOutput(p), HeadOutput(q))
    found.backward()
    assert found.item() == pytest.approx(1000.0)
    assert q.grad is not None
    assert q.grad.isfinite().all()


# ---- Losses of twins -----------------------------------------------------------------------------------------------------


def unlike_twins(model: MultitaskModel, sizes: Mapping[str, int], seed: int = 0) -> tuple[MultitaskBatch, ...]:
    """A batch whose second copies are other sentences, as if perturbed, with the first and second copies' own batches.

    Without dropout, this gives twins something to differ in.
    """
    parts = [make_batch(model, sizes, seed=2 * seed + i) for i in range(2)]
    sentences = []
    for part in parts:
        offsets = part.packed.cu_seqlens.tolist()
        sentences.append([part.packed.tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)])
    both: list[list[list[int]]] = []
    first = 0
    for name, n in sizes.items():
        both.append([])
        for _ in range(model.tasks[name].arity):
            both[-1] += sentences[0][first : first + n] + sentences[1][first : first + n]
            first += n
    labels = {name: torch.cat([label, label]) for name, label in parts[0].labels.items()}
    rows = {name: np.tile(each, 2) for name, each in parts[0].rows.items()}
    twins = MultitaskBatch(pack(both), tuple(sizes), parts[0].arity, labels, rows, duplicated=frozenset(sizes))
    return twins, parts[0], replace(parts[1], labels=parts[0].labels)


RANKED: dict[str, Any] = {
    "sentiment": {"dropout": 0.0},
    "paraphrase": {"dropout": 0.0, "auxiliary": {"ranking": 0.5, "cosent": 0.3}},
    "similarity": {"weight": 2.0},
}


@pytest.mark.parametrize("both", [True, False])
def test_the_loss_of_twins_is_that_of_either_and_their_divergence(both: bool) -> None:
    """Also for losses that compare examples: a copy is never its twin's negative."""
    model = make_model(recipe(tasks=RANKED))
    twins, *parts = unlike_twins(model, SIZES | {"paraphrase": 3})
    found = model.losses(
        twins, model.encoder(twins.packed)["last_hidden_state"], consistency=ConsistencyLoss(0.7, both)
    )
    padded = model.losses_padded(twins, ConsistencyLoss(0.7, both))
    hidden = [model.encoder(part.packed)["last_hidden_state"] for part in parts]
    one, other = (model.losses(part, h) for part, h in zip(parts, hidden, strict=True))
    answers = [model.outputs(part, h) for part, h in zip(parts, hidden, strict=True)]
    for name in SIZES:
        apart = divergence(model.head(name), answers[0][name], answers[1][name])
        expected = (one[name] + other[name]) / 2 if both else one[name]
        expected = expected + model.tasks[name].weight * 0.7 * apart
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded[name], expected, rtol=1e-4, atol=1e-5)
        assert apart > 1e-4


@pytest.mark.parametrize("surgery", ["none", "pcgrad"])
def test_steps_with_r_drop_equal_the_reference_path(surgery: str) -> None:
    chosen = recipe(surgery={"method": surgery}, regularisation={"r_drop": 3.0})
    fast_model = make_model(chosen)
    slow_model, plain_model = copy.deepcopy(fast_model), copy.deepcopy(fast_model)
    fast = make_step("fast", fast_model, chosen, torch.float32)
    slow = make_step("reference", slow_model, chosen, torch.float32)
    plain = make_step("fast", plain_model, recipe(surgery={"method": surgery}), torch.float32)
    for index in range(5):
        batch, *_ = unlike_twins(fast_model, SIZES | ({"paraphrase": 0} if index == 2 else {}), seed=index)
        a, b, c = fast(batch, 1.0), slow(batch, 1.0), plain(batch, 1.0)
        torch.testing.assert_close(a.losses, b.losses, atol=2e-4, rtol=2e-4)
        if index == 0:  # the same weights still
            assert (a.losses > c.losses).all()
    for (name, p), q in zip(fast_model.named_parameters(), slow_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=3e-4, rtol=1e-3, msg=name)
    assert not torch.equal(fast_model.encoder.word_embedding.weight, plain_model.encoder.word_embedding.weight)


def twice(batch: MultitaskBatch) -> MultitaskBatch:
    """The batch with all its examples twice."""
    offsets = batch.packed.cu_seqlens.tolist()
    every = [batch.packed.tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    sentences: list[list[list[int]]] = []
    for name in batch.tasks:
        sentences.append([])
        for _ in range(batch.arity[name]):
            column, every = every[: batch.num_examples(name)], every[batch.num_examples(name) :]
            sentences[-1] += column + column
    labels = {name: torch.cat([label, label]) for name, label in batch.labels.items()}
    rows = {name: np.tile(each, 2) for name, each in batch.rows.items()}
    return replace(batch, packed=pack(sentences), labels=labels, rows=rows, duplicated=frozenset(batch.tasks))


def test_twins_differ_by_their_dropout_alone() -> None:
    dropped = BertConfig(**(vars(CONFIG) | {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}))
    losses: dict[tuple[bool, float], Tensor] = {}
    for config in (CONFIG, dropped):
        for weight in (0.0, 2.0):
            chosen = recipe(regularisation={"r_drop": weight})
            torch.manual_seed(0)
            model = MultitaskModel(BertModel(config), build_tasks(chosen), "mean")
            batch = twice(make_batch(model, SIZES))
            losses[config is dropped, weight] = OnePassStep(model, chosen, torch.float32)(batch, 1.0).losses
    torch.testing.assert_close(losses[False, 0.0], losses[False, 2.0])
    assert (losses[True, 2.0] > losses[True, 0.0] + 1e-6).all()
    once = OnePassStep(make_model(recipe()), recipe(), torch.float32)
    torch.testing.assert_close(losses[False, 0.0], once(make_batch(once.model, SIZES), 1.0).losses)


def test_r_drop_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(regularisation={"r_drop": 1.0}, surgery={"method": "pcgrad"})
    model = make_model(chosen)
    assert strangers(model, chosen, twice(make_batch(model, SIZES)), monkeypatch) == []


# ---- Batches of twins ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> dict[str, TokenTable]:
    sample = sample_directory()
    tokenizer = Tokenizer.from_pretrained(sample.model)
    files: dict[str, Any] = {"sentiment": "ids-sst-train.csv", "paraphrase": "quora-train.csv"}
    return {task: tokenize_table(read_table(sample.data / name, task), tokenizer) for task, name in files.items()}


def sequences(batch: MultitaskBatch) -> list[tuple[int, ...]]:
    offsets = batch.packed.cu_seqlens.tolist()
    return [tuple(batch.packed.tokens[a:b].tolist()) for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize("encoder", ["bi", "cross", "both"])
def test_a_collator_packs_all_examples_then_all_again(tables: dict[str, TokenTable], encoder: Encoder) -> None:
    rows = Sampler.from_tables(tables, 3).rows(0)
    encoders: dict[str, Encoder] = {"paraphrase": encoder}
    plain = Collator(tables, 64, encoders)(rows)
    twins = Collator(tables, 64, encoders, duplicated=frozenset(tables))(rows)
    once, found = sequences(plain), sequences(twins)
    columns = [once[i : i + 3] for i in range(0, len(once), 3)]
    assert found == [sentence for column in columns for sentence in column + column]
    for task in tables:
        assert twins.num_examples(task) == 6
        assert twins.rows[task].tolist() == [*rows[task], *rows[task]]
        assert torch.equal(twins.labels[task], plain.labels[task].repeat(2))
    assert twins.step_tokens == 2 * plain.step_tokens
    assert torch.equal(twins.packed.types, torch.from_numpy(np.concatenate(kinds(plain, columns))))


def kinds(plain: MultitaskBatch, columns: list[list[tuple[int, ...]]]) -> list[np.ndarray]:
    """Token types of the twins, from those of the examples."""
    found, begin = [], 0
    for column in columns:
        end = begin + sum(map(len, column))
        found += [plain.packed.types[begin:end].numpy()] * 2
        begin = end
    return found


def test_both_copies_of_an_example_go_to_one_process(tables: dict[str, TokenTable]) -> None:
    rows = Sampler.from_tables(tables, 5).rows(0)
    whole = Collator(tables, 64, duplicated=frozenset(tables))(rows)
    parts = [Collator(tables, 64, rank=rank, ranks=3, duplicated=frozenset(tables))(rows) for rank in range(3)]
    assert sum(part.packed.num_tokens for part in parts) == whole.packed.num_tokens == parts[0].step_tokens
    for task in tables:
        assert sum(part.loss_fraction(task) for part in parts) == pytest.approx(1)
        for part in parts:
            mine = part.rows[task]
            assert np.array_equal(mine[: len(mine) // 2], mine[len(mine) // 2 :])
    assert sorted(s for part in parts for s in sequences(part)) == sorted(sequences(whole))


def test_shares_of_twins_make_up_the_losses_of_the_step(tables: dict[str, TokenTable]) -> None:
    rows = Sampler.from_tables(tables, 5).rows(0)
    tasks = {"sentiment": {"dropout": 0.0}, "paraphrase": {"dropout": 0.0}}
    encoder = BertModel.from_pretrained(sample_directory().model).eval()
    model = MultitaskModel(encoder, build_tasks(recipe(tasks=tasks))).eval()

    def losses(rank: int, ranks: int) -> Tensor:
        batch = Collator(tables, 64, rank=rank, ranks=ranks, duplicated=frozenset(tables))(rows)
        found = model.losses(batch, encoder(batch.packed)["last_hidden_state"], consistency=ConsistencyLoss(1.0))
        return torch.stack(list(found.values())).detach()

    whole, parts = losses(0, 1), [losses(rank, 2) for rank in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-5)


def test_buckets_have_room_for_twins(tables: dict[str, TokenTable]) -> None:
    sampler = Sampler.from_tables(tables, 4)
    buckets = choose_buckets(sampler, tables, 64, duplicated=frozenset(tables))
    collator = Collator(tables, 64, buckets=buckets, duplicated=frozenset(tables))
    for step in range(5):
        batch = collator(sampler.rows(step))
        assert batch.packed.tokens.numel() in buckets.tokens
        assert batch.packed.cu_seqlens.numel() - 1 == buckets.sentences[0]


# ---- Recipes -------------------------------------------------------------------------------------------------------------


def test_the_wished_for_recipe_drops_twice() -> None:
    assert Recipe.load("wish-r-drop").regularisation.duplicates_examples
    assert not Recipe.load("bertology-head-mod").regularisation.duplicates_examples
    with pytest.raises(ConfigError, match=r"r_drop = -1\.0: expected 0 or more"):
        Recipe().with_values({"regularisation": {"r_drop": -1.0}}, "test")
