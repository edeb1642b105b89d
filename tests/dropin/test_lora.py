# SPDX-License-Identifier: Apache-2.0
"""LoRA, by peft and by hand: computed, trained alone by either training step, and saved merged or refused by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minbert_fast import BertModel
from minbert_fast.common.schema import ConfigError, build
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.packing import pack
from minbert_fast.model.weight_files import WeightsError
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.backends import make_step
from minbert_fast.step.flat_pass import OnePass
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel, build_tasks
from tests.dropin.cases import WIDTH, batch, close, course, small

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class LoRALinear(nn.Linear):
    """y = x (W + B A)^T + b, as students write it."""

    def __init__(self, plain: nn.Linear, rank: int = 4) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.load_state_dict(plain.state_dict())
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, plain.in_features) * 0.1)
        self.B = nn.Parameter(torch.randn(plain.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.A.T @ self.B.T


class Wrapper(nn.Module):
    """The same around a frozen Linear."""

    def __init__(self, plain: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.plain = plain.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, plain.in_features) * 0.1)
        self.B = nn.Parameter(torch.randn(plain.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + x @ self.A.T @ self.B.T


def by_hand(model: BertModel, kind: Callable[[nn.Linear], nn.Module]) -> None:
    torch.manual_seed(2)
    model.requires_grad_(False)
    for layer in model.bert_layers:
        attention = layer.self_attention
        attention.query, attention.value = kind(attention.query), kind(attention.value)


def by_peft(model: BertModel) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False))


WAYS = {"peft": by_peft, "subclass": lambda m: by_hand(m, LoRALinear), "wrapper": lambda m: by_hand(m, Wrapper)}


@pytest.mark.parametrize("way", WAYS)
def test_lora_changes_outputs_and_gets_gradients(way: str) -> None:
    model, (ids, mask) = small(), batch()
    before = model(ids, mask)["last_hidden_state"]
    WAYS[way](model)
    model.eval()
    with pytest.warns(UserWarning, match=r"bert_layers\.0\.self_attention\.query is a"):
        got = model(ids, mask)["last_hidden_state"]
    assert (got - before).abs().max() > 1e-2
    close(got, course(model, ids, mask))
    got.square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 12
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_merging_makes_a_plain_fused_model(fused_layers: list[Any]) -> None:
    peft = pytest.importorskip("peft")
    model, (ids, mask) = small(), batch()
    config = peft.LoraConfig(target_modules=["query", "value", "out_dense"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    with pytest.warns(UserWarning, match="query is a"):
        expected = tuned(ids, mask)["last_hidden_state"]
    assert all(layer.foreign == ("query", "value", "out_dense") for layer in fused_layers)
    del fused_layers[:]
    merged = tuned.merge_and_unload()
    close(merged(ids, mask)["last_hidden_state"], expected)
    assert [layer.foreign for layer in fused_layers] == [()] * 3


# ---- Files ---------------------------------------------------------------------------------------------------------------


def test_adapters_of_peft_are_saved_merged(tmp_path: Path) -> None:
    model, (ids, mask) = small(), batch()
    by_peft(model)
    model.eval()
    with pytest.warns(UserWarning, match="query is a"):
        expected = model(ids, mask)["last_hidden_state"]
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path)
    close(loaded(ids, mask)["last_hidden_state"], expected)
    assert torch.equal(model(ids, mask)["last_hidden_state"], expected)  # it keeps its adapters
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_parameters_that_are_not_berts_are_never_lost_in_silence(tmp_path: Path) -> None:
    model = small()
    by_hand(model, LoRALinear)
    with pytest.raises(
        WeightsError, match=r"bert_layers\.0\.self_attention\.query\.A is not a weight of BERT .*nor are 11"
    ):
        model.save_pretrained(tmp_path)
    model = small()
    model.bert_layers[1].out_dense = nn.Linear(80, 48, bias=False)
    with pytest.raises(WeightsError, match=r"bert_layers\.1\.out_dense\.bias is missing"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def more_positions(model: BertModel) -> None:
    model.pos_embedding = nn.Embedding(60, WIDTH)
    model.position_ids = torch.arange(60)[None]


def more_types(model: BertModel) -> None:
    model.tk_type_embedding = nn.Embedding(3, WIDTH)


def narrower(model: BertModel) -> None:
    for layer in model.bert_layers:
        layer.interm_dense, layer.out_dense = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)


def cut(model: BertModel) -> None:
    model.bert_layers = model.bert_layers[:2]


def one_layer_twice(model: BertModel) -> None:
    model.bert_layers[2] = model.bert_layers[0]


def one_weight_twice(model: BertModel) -> None:
    model.bert_layers[1].self_attention.key.weight = model.bert_layers[1].self_attention.query.weight


@pytest.mark.parametrize("change", [more_positions, more_types, narrower, cut, one_layer_twice, one_weight_twice])
def test_other_shapes_and_shared_weights_are_saved(change: Callable[[BertModel], None], tmp_path: Path) -> None:
    """Once config.json told the sizes of the model as built, and safetensors refused shared tensors with a traceback."""
    model, (ids, mask) = small(), batch()
    change(model)
    model.save_pretrained(tmp_path)
    close(BertModel.from_pretrained(tmp_path)(ids, mask)["last_hidden_state"], model(ids, mask)["last_hidden_state"])


def test_what_config_json_cannot_say_is_not_saved(tmp_path: Path) -> None:
    model = small()
    model.bert_layers[1].interm_dense, model.bert_layers[1].out_dense = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
    with pytest.raises(WeightsError, match=r"save_pretrained: bert_layers.1.interm_dense.weight has shape \[20, 48\]"):
        model.save_pretrained(tmp_path)
    model = small()
    model.position_ids = model.position_ids.roll(1, 1)
    with pytest.raises(
        WeightsError, match="BertModel has position_ids that do not count from 0, and no file can say so"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- The training step ---------------------------------------------------------------------------------------------------

TASKS: dict[str, Any] = {"sentiment": {"dropout": 0.0}, "paraphrase": {"dropout": 0.0}, "similarity": {}}


def recipe(**sections: Any) -> Recipe:
    return build(Recipe, {"tasks": TASKS, "optimizer": {"lr": 1e-3}} | sections, "test")


def multitask(chosen: Recipe, change: Callable[[BertModel], None]) -> MultitaskModel:
    encoder = small(**QUIET, initializer_range=0.05)
    change(encoder)
    torch.manual_seed(3)
    return MultitaskModel(encoder, build_tasks(chosen), chosen.model.pooling)


def examples(model: MultitaskModel, sizes: Mapping[str, int], seed: int) -> MultitaskBatch:
    rng = np.random.default_rng(seed)
    arity = {name: model.tasks[name].arity for name in sizes}
    sentences = [
        [rng.integers(1, 97, rng.integers(1, 20)).tolist() for _ in range(n * arity[name])] for name, n in sizes.items()
    ]
    high = {"sentiment": 5, "paraphrase": 2, "similarity": 6}
    labels = {name: torch.from_numpy(rng.integers(0, high[name], n)) for name, n in sizes.items()}
    labels = {name: t if name == "sentiment" else t.float() for name, t in labels.items()}
    packed = pack(sentences, token_capacity=400, sentence_capacity=30)
    return MultitaskBatch(packed, tuple(sizes), arity, labels, {name: np.arange(n) for name, n in sizes.items()})


def wrapped_layer(model: BertModel) -> None:
    """A foreign layer, all of it trained: the layer itself runs by ordinary autograd too."""

    class Scaled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer
            self.scale = nn.Parameter(torch.ones(48))

        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            assert hidden.dim() == 3
            assert mask.shape[1:3] == (1, 1)
            return self.layer(hidden, mask) * self.scale

    model.bert_layers[1] = Scaled(model.bert_layers[1])


def relu(model: BertModel) -> None:
    model.bert_layers[0].interm_af = torch.relu


def hooked(model: BertModel) -> None:
    model.bert_layers[2].out_dense.register_forward_hook(lambda module, args, out: out * 1.5)


def appended(model: BertModel) -> None:
    model.bert_layers.append(copy.deepcopy(model.bert_layers[0]))


CHANGES = WAYS | {"wrapped layer": wrapped_layer, "relu": relu, "hooked": hooked, "appended": appended}


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
@pytest.mark.parametrize(
    ("change", "surgery"), [*((change, "pcgrad") for change in CHANGES), ("peft", "none"), ("wrapped layer", "none")]
)
def test_four_steps_equal_the_reference_path(change: str, surgery: str) -> None:
    chosen = recipe(surgery={"method": surgery})
    fast_model = multitask(chosen, CHANGES[change])
    slow_model = multitask(chosen, CHANGES[change])
    start = {name: p.detach().clone() for name, p in fast_model.named_parameters()}
    may_move = {name for name, p in fast_model.named_parameters() if p.requires_grad}
    steps = [
        make_step("fast", fast_model, chosen, torch.float32),
        make_step("reference", slow_model, chosen, torch.float32),
    ]
    sizes = [{"sentiment": 5, "paraphrase": 4, "similarity": 3}, {"sentiment": 3, "paraphrase": 0, "similarity": 5}]
    for index in range(4):
        given = examples(fast_model, sizes[index % 2], index)
        a, b = (step(given, 1.0) for step in steps)
        torch.testing.assert_close(a.losses, b.losses, atol=3e-4, rtol=3e-4)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, atol=1e-4, rtol=1e-3)
    moved = set()
    for (name, p), q in zip(fast_model.named_parameters(), slow_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=5e-4, rtol=1e-3, msg=name)
        if not torch.equal(p, start[name]):
            moved.add(name)
    assert moved <= may_move
    assert moved >= {name for name in may_move if "pooler" not in name}
    if change in WAYS:
        assert len([name for name in moved if "encoder" in name]) == 12


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
def test_bf16_products_stay_close() -> None:
    chosen = recipe(surgery={"method": "pcgrad"})
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = multitask(chosen, by_peft)
        step = make_step("fast", model, chosen, dtype)
        sizes = {"sentiment": 5, "paraphrase": 4, "similarity": 3}
        losses.append(torch.stack([step(examples(model, sizes, index), 1.0).losses for index in range(5)]))
    torch.testing.assert_close(losses[0], losses[1], atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
def test_a_lora_run_saves_its_merged_encoder(tmp_path: Path) -> None:
    chosen = recipe()
    model = multitask(chosen, by_peft)
    step = make_step("fast", model, chosen, torch.float32)
    step(examples(model, {"sentiment": 5, "paraphrase": 4, "similarity": 3}, 0), 1.0)
    model.save(tmp_path, "tasks = { sentiment = { dropout = 0.0 }, paraphrase = { dropout = 0.0 }, similarity = {} }\n")
    loaded = MultitaskModel.load(tmp_path)
    ids, mask = batch()
    close(loaded.encoder(ids, mask)["last_hidden_state"], model.eval().encoder(ids, mask)["last_hidden_state"])


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
def test_foreign_embeddings_are_refused_by_name() -> None:
    def noisy(model: BertModel) -> None:
        model.word_embedding.register_forward_hook(lambda module, args, out: out + 1)

    chosen = recipe()
    model = multitask(chosen, noisy)
    step = make_step("fast", model, chosen, torch.float32)
    with pytest.raises(ConfigError, match=r"word_embedding has hooks: the fast backend .* use --backend reference"):
        step(examples(model, {"sentiment": 2, "paraphrase": 2, "similarity": 2}, 0), 1.0)


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_over_constants_has_the_same_outputs(change: str) -> None:
    """The pass of SMART's adversary: no parameter gets a gradient, the noise does."""
    chosen = recipe()
    model = multitask(chosen, CHANGES[change]).train()
    step = OnePassStep(model, chosen, torch.float32)
    packed = examples(model, {"sentiment": 5, "paraphrase": 4, "similarity": 3}, 0).packed
    noise = torch.zeros(400, 48, requires_grad=True)
    hidden = model.encoder.encode_packed(OnePass(step.flat, None, packed, packed.task_tokens, step.seed, noise), packed)
    close(hidden[: packed.num_tokens], model.encoder(packed)["last_hidden_state"][: packed.num_tokens])
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    hidden[: packed.num_tokens].square().sum().backward()
    assert noise.grad is not None
    assert noise.grad[: packed.num_tokens].any()
    for name, p in model.named_parameters():
        kept = before[name]
        assert (p.grad is None) == (kept is None), name
        assert kept is None or (p.grad is not None and torch.equal(p.grad, kept)), name


def test_shared_layers_are_refused_by_name() -> None:
    def shared(model: BertModel) -> None:
        model.bert_layers.append(model.bert_layers[0])

    chosen = recipe()
    with pytest.raises(ConfigError, match=r"bert_layers\.0\.self_attention\.query\.weight is used in two places"):
        make_step("fast", multitask(chosen, shared), chosen, torch.float32)
    make_step("reference", multitask(chosen, shared), chosen, torch.float32)


def _pooler_of_a_layer(model: MultitaskModel) -> None:
    model.encoder.pooler_dense.weight = model.encoder.bert_layers[1].attention_dense.weight


def _adapter_in_a_head(model: MultitaskModel) -> None:
    model.encoder.bert_layers[0].attention_dense = adapter = Wrapper(model.encoder.bert_layers[0].attention_dense)
    model.heads["sentiment"].extra = adapter.A


def _layer_in_a_head(model: MultitaskModel) -> None:
    model.heads["sentiment"].extra = model.encoder.bert_layers[1].out_layer_norm


def _words_as_positions(model: MultitaskModel) -> None:
    model.encoder.pos_embedding.weight = model.encoder.word_embedding.weight


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    ("share", "name"),
    [
        (_pooler_of_a_layer, "bert_layers.1.attention_dense.weight"),
        (_adapter_in_a_head, "bert_layers.0.attention_dense.A"),
        (_layer_in_a_head, "bert_layers.1.out_layer_norm.weight"),
        (_words_as_positions, "word_embedding.weight"),
    ],
)
def test_a_parameter_of_the_encoder_with_a_second_use_is_refused_by_name(
    share: Callable[[MultitaskModel], None], name: str, freeze: bool
) -> None:
    """The gradient of the pooler or of the head was lost without a word."""
    chosen = recipe(model={"freeze": freeze})
    model = multitask(chosen, lambda _: None)
    share(model)
    with pytest.raises(ConfigError, match=f"^{re.escape(name)} is used in two places: use --backend reference$"):
        make_step("fast", model, chosen, torch.float32)
    make_step("reference", model, chosen, torch.float32)


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
def test_a_tree_that_changes_between_steps_is_refused() -> None:
    chosen = recipe()
    model = multitask(chosen, lambda _: None)
    step = OnePassStep(model, chosen, torch.float32)
    given = examples(model, {"sentiment": 2, "paraphrase": 2, "similarity": 2}, 0)
    step(given, 1.0)
    model.encoder.bert_layers[0].out_dropout.p = 0.1  # no change to the tree
    step(given, 1.0)
    layer = model.encoder.bert_layers[0]
    for name, changed in (("interm_af", torch.relu), ("out_dense", nn.Linear(80, 48))):
        before = getattr(layer, name)
        setattr(layer, name, changed)
        with pytest.raises(ConfigError, match="changed after its training step was made"):
            step(given, 1.0)
        setattr(layer, name, before)
        step(given, 1.0)
