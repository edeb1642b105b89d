# SPDX-License-Identifier: Apache-2.0
"""The one-pass step: its J against T separate fp64 backwards, its ten steps against the naive step's."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minbert_fast import BertConfig, BertModel
from minbert_fast.common.schema import ConfigError, build
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.packing import pack
from minbert_fast.model.passes import Pass
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.runs import TRAINING_PARTS
from minbert_fast.step.backends import make_step
from minbert_fast.step.naive import ReferenceStep
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel, build_tasks

CONFIG = BertConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
PLAIN: dict[str, Any] = {"sentiment": {"dropout": 0.0}, "paraphrase": {"dropout": 0.0}, "similarity": {}}


def recipe(**sections: Any) -> Recipe:
    return build(Recipe, {"tasks": PLAIN, "optimizer": {"lr": 1e-3}} | sections, "test")


def make_model(chosen: Recipe, encoder: type[BertModel] = BertModel) -> MultitaskModel:
    torch.manual_seed(0)
    return MultitaskModel(encoder(CONFIG), build_tasks(chosen), chosen.model.pooling)


def make_batch(
    model: MultitaskModel,
    sizes: Mapping[str, int],
    seed: int = 0,
    lowest_word: int = 1,
    longest: int = 19,
    **capacities: int,
) -> MultitaskBatch:
    rng = np.random.default_rng(seed)
    arity = {name: model.tasks[name].arity for name in sizes}
    sentences = [
        [rng.integers(lowest_word, 61, rng.integers(1, longest + 1)).tolist() for _ in range(n * arity[name])]
        for name, n in sizes.items()
    ]
    labels: dict[str, Tensor] = {}
    for name, n in sizes.items():
        high = {"sentiment": 5, "polarity": 2, "paraphrase": 2, "similarity": 6}[model.tasks[name].preset]
        drawn = torch.from_numpy(rng.integers(0, high, n))
        labels[name] = drawn if high == 5 else drawn.float()
    rows = {name: np.arange(n) for name, n in sizes.items()}
    return MultitaskBatch(pack(sentences, **capacities), tuple(sizes), arity, labels, rows)


def four_steps(backend: Any, chosen: Recipe, cut: bool) -> tuple[MultitaskModel, Any]:
    """A model and its step after four steps; with `cut`, new objects take the last two from the states of the first."""
    model = make_model(chosen)
    step = make_step(backend, model, chosen, torch.float32)
    for index in range(4):
        if cut and index == 2:
            saved, weights = copy.deepcopy(step.state_dict()), copy.deepcopy(model.state_dict())
            model = make_model(chosen)
            model.load_state_dict(weights)
            step = make_step(backend, model, chosen, torch.float32)
            step.load_state_dict(saved)
            torch.manual_seed(99)
        step(make_batch(model, SIZES, seed=index), 1.0)
    return model, step


def separate_backwards(model: MultitaskModel, batch: MultitaskBatch) -> list[dict[str, Tensor]]:
    """Each task's own fp64 gradients, by name, through the naive padded encoder."""
    twin = copy.deepcopy(model).double().train()
    gradients = []
    for name in batch.tasks:
        twin.zero_grad()
        loss = twin.losses_padded(batch)[name]
        if batch.num_examples(name):
            loss.backward()
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters()})
    return gradients


def check_j(model: MultitaskModel, chosen: Recipe, batch: MultitaskBatch, tolerance: float = 2e-4) -> OnePassStep:
    expected = separate_backwards(model, batch)
    step = OnePassStep(model, chosen, torch.float32)
    step.model.train()
    step._backward(batch, step._losses(batch, step._encode(batch)))
    for name, p in model.named_parameters():
        if step.gradients.owns(p):
            found = step.gradients.view(p)
            for row in range(len(expected)):
                torch.testing.assert_close(
                    found[row].double(), expected[row][name], atol=tolerance, rtol=tolerance, msg=f"{name}, task {row}"
                )
        elif p is step.flat.words:
            rows, ids = step._word_rows(batch), batch.packed.word_ids[: batch.packed.num_words].long()
            for row in range(len(expected)):
                dense = torch.zeros_like(p).index_add(0, ids, rows[row])
                torch.testing.assert_close(dense.double(), expected[row][name], atol=tolerance, rtol=tolerance)
        elif p in step.flat and p.grad is not None:
            torch.testing.assert_close(
                p.grad.double(), sum(e[name] for e in expected), atol=tolerance, rtol=tolerance, msg=name
            )
    return step


SIZES = {"sentiment": 5, "paraphrase": 4, "similarity": 3}
SURGERY = {"surgery": {"method": "pcgrad"}}
BOTH = {"encoder": "both", "calibrated": True}


def test_j_equals_separate_fp64_backwards() -> None:
    chosen = recipe(**SURGERY)
    model = make_model(chosen)
    step = check_j(model, chosen, make_batch(model, SIZES))
    assert step.flat.words is model.encoder.word_embedding.weight
    assert not step.others


def test_the_padding_word_in_a_text_gets_no_gradient() -> None:
    """nn.Embedding gives the row of `padding_idx` no gradient; the one-pass step did, if a text contained `[PAD]`."""
    chosen = recipe(**SURGERY)
    model = make_model(chosen)
    batch = make_batch(model, SIZES, lowest_word=0)
    assert batch.packed.word_ids[0] == model.encoder.word_embedding.padding_idx == 0
    step = check_j(model, chosen, batch)
    assert not step._word_rows(batch)[:, 0].any()
    assert step._word_rows(batch)[:, 1].any()


@pytest.mark.parametrize("pooling", ["cls", "max", "pooler"])
def test_j_for_every_pooling(pooling: str) -> None:
    chosen = recipe(model={"pooling": pooling}, **SURGERY)
    model = make_model(chosen)
    step = check_j(model, chosen, make_batch(model, SIZES))
    assert bool(step.others) == (pooling == "pooler")


def test_j_with_an_empty_task() -> None:
    chosen = recipe(**SURGERY)
    model = make_model(chosen)
    step = check_j(model, chosen, make_batch(model, SIZES | {"paraphrase": 0}))
    assert (step.gradients.J[1] == 0).all()


def test_j_of_one_task_alone() -> None:
    chosen = recipe(tasks={"similarity": {}}, **SURGERY)
    model = make_model(chosen)
    check_j(model, chosen, make_batch(model, {"similarity": 4}))


def test_j_with_two_data_sets_for_one_kind_of_task() -> None:
    tasks = PLAIN | {"cfimdb": {"kind": "polarity", "dropout": 0.0}}
    chosen = recipe(tasks=tasks, **SURGERY)
    model = make_model(chosen)
    batch = make_batch(model, SIZES | {"cfimdb": 2})
    batch.labels["cfimdb"].clamp_(max=1)
    check_j(model, chosen, batch)


def test_j_beside_heads_with_single_numbers_for_parameters() -> None:
    calibrated = {"head": "cosine", "calibrated": True, "scale": 4.0}
    chosen = recipe(tasks=PLAIN | {"similarity": calibrated}, **SURGERY)
    model = make_model(chosen)
    step = check_j(model, chosen, make_batch(model, SIZES))
    step(make_batch(model, SIZES), 1.0)


@pytest.mark.parametrize("encoder", ["cross", "both"])
def test_j_of_pairs_read_as_one_sequence(encoder: str) -> None:
    chosen = recipe(tasks=PLAIN | {"paraphrase": {"encoder": encoder, "dropout": 0.0}, "similarity": BOTH}, **SURGERY)
    model = make_model(chosen)
    torch.nn.init.normal_(model.heads["similarity"].together.weight)
    check_j(model, chosen, make_batch(model, SIZES))


def test_j_with_frozen_parameters() -> None:
    chosen = recipe(**SURGERY)
    model = make_model(chosen)
    frozen = [model.encoder.word_embedding.weight, *model.encoder.bert_layers[0].parameters()]
    frozen.append(model.encoder.bert_layers[1].self_attention.key.bias)
    for p in frozen:
        p.requires_grad_(False)
    step = check_j(model, chosen, make_batch(model, SIZES))
    assert not any(step.gradients.owns(p) for p in frozen)
    before = [p.clone() for p in frozen]
    step(make_batch(model, SIZES), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))


class WithAdapter(BertModel):
    """An encoder with a module that the one-pass ops know nothing about."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.adapter = nn.Linear(config.hidden_size, config.hidden_size)

    def encode_packed(self, run: Pass, batch: Any) -> Tensor:
        hidden = super().encode_packed(run, batch)
        return hidden + torch.tanh(self.adapter(hidden.float())).to(hidden.dtype)

    def stock(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Tensor:
        hidden = super().stock(ids, mask, types)
        return hidden + torch.tanh(self.adapter(hidden))


def test_an_unknown_module_falls_back_to_autograd_task_by_task() -> None:
    chosen = recipe(**SURGERY)
    model = make_model(chosen, WithAdapter)
    step = check_j(model, chosen, make_batch(model, SIZES))
    assert {id(p) for p in step.others} == {id(p) for p in model.encoder.adapter.parameters()}


OPTIMIZERS: list[dict[str, Any]] = [
    {"lr": 1e-3},
    {"lr": 1e-3, "weight_decay": 3.0, "clip": 0.5, "layer_decay": 0.8},
    {"lr": 1e-2, "betas": [0.7, 0.9], "eps": 0.1, "correct_bias": False},
]
CONTINUOUS = ["gradvac", "imtl_g", "nash_mtl", "torchjd:UPGrad"]  # no rounding of G makes their weights jump


@pytest.mark.parametrize(
    ("surgery", "optimizer"),
    [("none", OPTIMIZERS[1]), ("none", OPTIMIZERS[2]), *((method, OPTIMIZERS[0]) for method in CONTINUOUS),
     ("pcgrad", OPTIMIZERS[0]), ("pcgrad", OPTIMIZERS[1])],  # whose norm for clipping comes from the Gram matrix
)  # fmt: skip
def test_ten_steps_equal_the_reference_path(surgery: str, optimizer: dict[str, Any]) -> None:
    if surgery.startswith("torchjd:"):
        pytest.importorskip("torchjd.aggregation")
    chosen = recipe(surgery={"method": surgery}, optimizer=optimizer)
    fast_model = make_model(chosen)
    slow_model = copy.deepcopy(fast_model)
    start = [p.clone() for p in fast_model.parameters()]
    fast = make_step("fast", fast_model, chosen, torch.float32)
    slow = make_step("reference", slow_model, chosen, torch.float32)
    sizes: list[dict[str, int]] = [SIZES, SIZES | {"paraphrase": 0}, {"sentiment": 2, "paraphrase": 6, "similarity": 1}]
    for index in range(10):
        batch = make_batch(fast_model, sizes[index % 3], seed=index)
        a, b = fast(batch, 1.0 - index / 20), slow(batch, 1.0 - index / 20)
        torch.testing.assert_close(a.losses, b.losses, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, atol=1e-4, rtol=1e-3)
    moved = 0.0
    for (name, p), q, s in zip(fast_model.named_parameters(), slow_model.parameters(), start, strict=True):
        torch.testing.assert_close(p, q, atol=3e-4, rtol=1e-3, msg=name)
        moved = max(moved, float((p - s).detach().abs().max()))
    assert moved > 3e-3


def three_steps_on_both_backends(chosen: Recipe) -> list[float]:
    """Compares the parameters after three steps, the second without examples of a task; all gradient norms."""
    models, norms = [make_model(chosen), make_model(chosen)], []
    for backend, model in zip(("fast", "reference"), models, strict=True):
        step = make_step(backend, model, chosen, torch.float32)  # type: ignore[arg-type]
        for seed, sizes in enumerate((SIZES, SIZES | {"paraphrase": 0}, SIZES)):
            norms.append(float(step(make_batch(model, sizes, seed), 1.0).grad_norm))
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-3, msg=name)
    return norms


@pytest.mark.parametrize("method", ["none", "pcgrad"])
def test_the_mean_over_tasks_leaves_heads_alone_on_both_backends(method: str) -> None:
    """The reference step divided the heads' gradients too, where tasks were added without surgery."""
    chosen = recipe(surgery={"method": method, "reduction": "mean"}, optimizer={"lr": 1e-3, "clip": 0.1})
    norms = three_steps_on_both_backends(chosen)  # the mean is over the tasks of the recipe
    assert all(norm > 0.1 for norm in norms)  # so that clipping tells lengths apart


def test_a_shared_layer_without_a_task_in_the_step_moves_equally_on_both_backends() -> None:
    """The pooler of one task: the reference step without surgery left it out, and did not count the step."""
    chosen = recipe(tasks=PLAIN | {"paraphrase": {"dropout": 0.0, "pooling": "pooler"}})
    three_steps_on_both_backends(chosen)


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_heads_have_a_rate_of_their_own_beside_an_encoder_at_rate_0(backend: Any) -> None:
    """`head_lr` was ignored where `lr` is 0."""
    moved = []
    for rates in ({"lr": 0.0, "head_lr": 1e-3}, {"lr": 1e-9, "head_lr": 1e-3}):
        chosen = recipe(optimizer=rates)
        model = make_model(chosen)
        start = copy.deepcopy(model)
        make_step(backend, model, chosen, torch.float32)(make_batch(model, SIZES), 0.5)
        if not rates["lr"]:
            pairs = zip(model.encoder.parameters(), start.encoder.parameters(), strict=True)
            assert all(torch.equal(p, q) for p, q in pairs)
        pairs = zip(model.heads.parameters(), start.heads.parameters(), strict=True)
        moved.append([(p - q).detach() for p, q in pairs])
    torch.testing.assert_close(*moved)
    assert all(change.any() for change in moved[0])


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_a_step_with_nothing_to_train_says_so(backend: Any) -> None:
    """One for evaluation alone, without a step, is made all the same."""
    chosen = recipe(tasks={"similarity": {"head": "cosine"}}, model={"freeze": True})
    model = make_model(chosen)
    step = make_step(backend, model, chosen, torch.float32)
    with pytest.raises(ConfigError, match=r"nothing to train: the encoder is frozen, and no head \(similarity\) has"):
        step(make_batch(model, {"similarity": 2}), 1.0)


def test_bf16_follows_fp32() -> None:
    """Products in bf16: losses of ten steps stay within a few percent, and master weights stay fp32."""
    chosen = recipe(**SURGERY)
    exact, fast = make_model(chosen), make_model(chosen)
    steps = [make_step("fast", exact, chosen, torch.float32), make_step("fast", fast, chosen, torch.bfloat16)]
    for index in range(10):
        a, b = (step(make_batch(exact, SIZES, seed=index), 1.0).losses for step in steps)
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    assert all(p.dtype == torch.float32 for p in fast.parameters())
    flat = steps[1].flat  # type: ignore[attr-defined]
    assert torch.equal(flat.compute[: flat.trainable_end], flat.data[: flat.trainable_end].bfloat16())


def test_a_frozen_encoder_trains_heads_alone() -> None:
    chosen = recipe(model={"freeze": True}, **SURGERY)
    model = make_model(chosen)
    before = [p.clone() for p in model.encoder.parameters()]
    head = model.heads["sentiment"]
    start = [p.clone() for p in head.parameters()]
    step = make_step("fast", model, chosen, torch.float32)
    for index in range(3):
        step(make_batch(model, SIZES, seed=index), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.encoder.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(start, head.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_a_loss_that_is_not_finite_changes_nothing(backend: str) -> None:
    chosen = recipe(**SURGERY)
    model = make_model(chosen)
    step = make_step(backend, model, chosen, torch.float32)  # type: ignore[arg-type]
    step(make_batch(model, SIZES), 1.0)
    before = [p.clone() for p in model.parameters()]
    broken = make_batch(model, SIZES, seed=1)
    broken.labels["similarity"][1] = float("nan")
    result = step(broken, 1.0)
    assert result.nonfinite.tolist() == [False, False, True]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step(make_batch(model, SIZES, seed=2), 1.0)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_a_gradient_that_is_not_finite_changes_nothing(backend: Any) -> None:
    """With finite losses."""
    chosen = recipe(**SURGERY)
    model = make_model(chosen)
    step = make_step(backend, model, chosen, torch.float32)
    step(make_batch(model, SIZES), 1.0)
    before = [p.clone() for p in model.parameters()]
    model.heads["sentiment"].output.weight.register_hook(lambda gradient: gradient * torch.inf)
    result = step(make_batch(model, SIZES, seed=1), 1.0)
    assert torch.isfinite(result.losses).all()
    assert not torch.isfinite(result.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "backend"),
    [("pcgrad", "fast"), ("gradvac", "fast"), ("torchjd:PCD", "fast"), ("torchjd:Random", "fast"),
     ("pcgrad", "reference"), ("gradvac", "reference"), ("torchjd:GradVac", "reference")],
)  # fmt: skip
def test_a_restored_step_continues_bit_identically(method: str, backend: str) -> None:
    """The methods' running averages and random numbers too."""
    if method.startswith("torchjd:"):
        pytest.importorskip("torchjd.aggregation")
    tasks = {"sentiment": {"dropout": 0.3}, "paraphrase": {}, "similarity": {}}
    chosen = recipe(surgery={"method": method}, tasks=tasks)

    found = []
    for cut in (True, False):
        model, step = four_steps(backend, chosen, cut)
        found.append([step.state_dict()["tensors"]["surgery/generator"], *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_restored_moments_lie_beside_their_parameters() -> None:
    """A checkpoint is read to main memory; on a GPU the reference step left them there, and its next step failed."""
    chosen = recipe(**SURGERY)
    model = make_model(chosen)
    step = ReferenceStep(model, chosen, torch.float32)
    step(make_batch(model, SIZES), 1.0)
    elsewhere = ReferenceStep(make_model(chosen).to("meta"), chosen, torch.float32)
    elsewhere.load_state_dict(step.state_dict())
    moments = [state[name] for state in elsewhere.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert moments
    assert all(moment.is_meta for moment in moments)


def test_dropout_streams_are_the_steps_own() -> None:
    """Runs with one seed agree bit for bit for any state of torch's global generator; another seed differs."""
    dropped = BertConfig(**(vars(CONFIG) | {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}))

    def run(seed: int) -> Tensor:
        chosen = recipe(training={"seed": seed}, **SURGERY)
        torch.manual_seed(0)
        model = MultitaskModel(BertModel(dropped), build_tasks(chosen), "mean")
        step = make_step("fast", model, chosen, torch.float32)
        torch.rand(seed + 3)
        return torch.stack([step(make_batch(model, SIZES, seed=i), 1.0).losses for i in range(3)])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_a_model_that_was_loaded_or_evaluated_trains_with_dropout(backend: Any) -> None:
    chosen = recipe(tasks=PLAIN | {"sentiment": {"dropout": 0.5}})

    def losses(training: bool) -> Tensor:
        model = make_model(chosen).train(training)
        return make_step(backend, model, chosen, torch.float32)(make_batch(model, SIZES), 1.0).losses

    assert torch.equal(losses(True), losses(False))


@pytest.mark.parametrize("backend", ["fast", "reference"])
@pytest.mark.parametrize("method", ["none", "pcgrad"])
def test_a_step_says_where_its_time_went(backend: Any, method: str) -> None:
    chosen = recipe(surgery={"method": method})
    model = make_model(chosen)
    step, batch = make_step(backend, model, chosen, torch.float32), make_batch(model, SIZES)
    began = time.perf_counter()
    seconds = step(batch, 1.0).seconds
    assert sum(seconds.values()) <= time.perf_counter() - began
    assert {"forward", "backward", "optimizer"} <= seconds.keys() <= set(TRAINING_PARTS)
    assert ("surgery" in seconds) == (method == "pcgrad")
    assert all(value > 0 for value in seconds.values())
