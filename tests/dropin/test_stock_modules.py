# SPDX-License-Identifier: Apache-2.0
"""Every module of the tree works on its own, with the course's names, signatures, shapes and numbers."""

from __future__ import annotations

import copy
import pickle
import re
import types
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from minbert_fast import BertConfig, BertLayer, BertModel, BertSelfAttention
from minbert_fast.common.schema import ConfigError
from tests.dropin.cases import WIDTH, attend, batch, close, course, course_embed, course_layer, small


def test_self_attention_alone() -> None:
    model, (ids, mask) = small(), batch()
    attention = model.bert_layers[0].self_attention
    assert isinstance(attention, BertSelfAttention)
    hidden, extended = model.embed(ids), model.get_extended_attention_mask(mask, model.dtype)
    assert extended.shape == (5, 1, 1, 11)
    close(attention(hidden, extended), attend(model.bert_layers[0], hidden, extended))
    key = attention.transform(hidden, attention.key)
    assert key.shape == (5, attention.num_attention_heads, 11, attention.attention_head_size)
    assert attention.all_head_size == 48
    assert attention.attention(key, key, key, extended).shape == hidden.shape


def test_a_layer_alone_and_stacked_on_top() -> None:
    model, (ids, mask) = small(), batch()
    extra = BertLayer(model.config).eval()
    extended = model.get_extended_attention_mask(mask)
    hidden = model(ids, mask)["last_hidden_state"]
    close(extra(hidden, extended), course_layer(extra, hidden, extended))
    normed = extra.add_norm(hidden, hidden, extra.attention_dense, extra.attention_dropout, extra.attention_layer_norm)
    close(normed, extra.attention_layer_norm(hidden + extra.attention_dense(hidden)))


def test_embed_and_encode_are_forward() -> None:
    model, (ids, mask) = small(), batch()
    embedded = model.embed(input_ids=ids)
    close(embedded, course_embed(model, ids))
    hidden = model.encode(embedded, attention_mask=mask)
    close(hidden, course(model, ids, mask))
    out = model(ids, mask)
    close(out["last_hidden_state"], hidden)
    close(out["pooler_output"], model.pooler_af(model.pooler_dense(hidden[:, 0])))
    close(model.stock(ids, mask), hidden)


@pytest.mark.parametrize("way", ["forward", "encode", "stock"])
def test_masked_positions_give_zeros_and_influence_nothing(way: str) -> None:
    model, (ids, mask) = small(), batch()
    run: Any = {
        "forward": lambda ids: model(ids, mask)["last_hidden_state"],
        "encode": lambda ids: model.encode(model.embed(ids), mask),
        "stock": lambda ids: model.stock(ids, mask),
    }[way]
    hidden = run(ids)
    assert (hidden[mask == 0] == 0).all()
    assert hidden.isfinite().all()
    assert torch.equal(hidden, run(torch.where(mask == 1, ids, torch.randint(1, 97, ids.shape))))


@pytest.mark.parametrize("shape", [(5, 10), (5, 12), (4, 11), (5, 1), (5, 11, 11)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """A mask of another length once chose tokens of other positions and sentences, without a word."""
    model, (ids, _) = small(), batch()
    message = re.escape(f"attention_mask has shape {list(shape)}, expected [5, 11]")
    with pytest.raises(ValueError, match=message):
        model(ids, torch.ones(shape))
    if len(shape) == 2:
        with pytest.raises(ValueError, match=message):
            model.encode(model.embed(ids), torch.ones(shape))


def test_one_mask_for_all_sentences() -> None:
    model, (ids, mask) = small(), batch()
    one = mask[:1]
    hidden = model.stock(ids, one)
    assert hidden.shape[0] == 5
    close(model(ids, one)["last_hidden_state"], hidden)
    close(model.encode(model.embed(ids), one), hidden)


def test_a_mask_that_is_learned_gets_the_course_s_gradient() -> None:
    """Rationales: a mask that requires a gradient once got none, in silence."""
    model, (ids, mask) = small(), batch()
    ids, first = ids[:1], mask[:1].float()
    got, expected = first.clone().requires_grad_(), first.clone().requires_grad_()
    model(ids, got)["last_hidden_state"][0, 0].square().sum().backward()
    hidden, extended = course_embed(model, ids), (1.0 - expected[:, None, None, :]) * -10000.0
    for layer in model.bert_layers:
        hidden = course_layer(layer, hidden, extended)
    hidden[0, 0].square().sum().backward()
    assert got.grad is not None
    assert got.grad.any()
    torch.testing.assert_close(got.grad, expected.grad, atol=1e-2, rtol=1e-3)


def test_numbers_that_are_no_word_ids_are_refused() -> None:
    model, (ids, mask) = small(), batch()
    with pytest.raises(ValueError, match=r"input_ids has dtype torch.float32, expected integers"):
        model(ids + 0.5, mask)
    with pytest.raises(ValueError, match=r"token_type_ids has dtype torch.float32, expected integers"):
        model(ids, mask, torch.full(ids.shape, 0.7))


@pytest.mark.parametrize(("beyond", "named"), [(2**32, 2**31 - 1), (-(2**32), -(2**31))])
def test_ids_that_are_no_int32_do_not_become_those_of_other_words(beyond: int, named: int) -> None:
    """2 ** 32 + 5 was word 5."""
    model, (ids, mask) = small(), batch()
    with pytest.raises(ValueError, match=rf"tokens holds {named}, which is not in \[0, "):
        model(ids + beyond, mask)
    with pytest.raises(ValueError, match=rf"types holds {named}, which is not in \[0, 2\)"):
        model(ids, mask, torch.full_like(ids, beyond))


def test_padding_gets_no_gradient() -> None:
    """The word embedding's row of padding_idx, attended or not, on every path."""
    model, (ids, _) = small(num_hidden_layers=1), batch()
    ids[:, 7] = 0
    mask = torch.ones_like(ids)
    found = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for hidden in (
        model(ids, mask)["last_hidden_state"],
        compiled(ids, mask)["last_hidden_state"],
        model.stock(ids, mask),
    ):
        (gradient,) = torch.autograd.grad(hidden.square().sum() + hidden[:, 3].sum(), model.word_embedding.weight)
        assert not gradient[0].any()
        assert gradient[ids[0, 0]].any()
        found.append(gradient)
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], atol=1e-3, rtol=1e-3)


def test_attributes_of_the_course() -> None:
    model = small()
    layer = model.bert_layers[1]
    assert layer.interm_af is F.gelu
    assert isinstance(model.pooler_af, nn.Tanh)
    drops = (model.embed_dropout, layer.attention_dropout, layer.out_dropout, layer.self_attention.dropout)
    assert [d.p for d in drops] == [0.1] * 4
    assert model.dtype == torch.float32
    assert model.name_or_path == model.config.name_or_path == ""
    assert torch.equal(model.position_ids, torch.arange(40)[None])


def test_init_weights_draws_again() -> None:
    model = small()
    before = model.bert_layers[2].interm_dense.weight.clone()
    nn.init.constant_(model.bert_layers[2].out_layer_norm.weight, 3.0)
    model.bert_layers[2].apply(model._init_weights)
    weight = model.bert_layers[2].interm_dense.weight
    assert not torch.equal(weight, before)
    assert weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert (model.bert_layers[2].out_layer_norm.weight == 1).all()
    untouched = model.bert_layers[1].interm_dense.weight.clone()
    model.init_weights()
    assert not torch.equal(model.bert_layers[1].interm_dense.weight, untouched)


def test_checkpoints_load_with_and_without_position_ids() -> None:
    model = small()
    state = model.state_dict()
    assert "position_ids" in state
    older = {name: tensor for name, tensor in state.items() if name != "position_ids"}
    for tensors in (state, older):
        fresh = BertModel(model.config)
        fresh.load_state_dict(tensors)
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    wrapped = nn.ModuleDict({"bert": BertModel(model.config)})
    wrapped.load_state_dict({f"bert.{name}": tensor for name, tensor in older.items()})
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({name: t for name, t in older.items() if name != "pooler_dense.bias"})


def test_config_fields_may_be_set_before_use() -> None:
    config = BertConfig(vocab_size=97, hidden_size=48, num_attention_heads=4, intermediate_size=80)
    config.num_hidden_layers = 1
    config.hidden_dropout_prob = 0.3
    model = BertModel(config)
    assert len(model.bert_layers) == 1
    assert model.embed_dropout.p == model.bert_layers[0].out_dropout.p == 0.3
    config.num_attention_heads = 5
    with pytest.raises(ConfigError, match="hidden_size = 48 is no multiple of num_attention_heads = 5"):
        BertModel(config)
    assert model.config.num_attention_heads == 4  # the model's own copy


def test_a_field_set_too_late_is_said_to_change_nothing() -> None:
    model, (ids, mask) = small(), batch()
    model(ids, mask)
    model.config.hidden_dropout_prob = 0.5
    with pytest.warns(UserWarning, match=r"config.hidden_dropout_prob = 0.5 changes nothing"):
        model(ids, mask)
    model(ids, mask)  # said once
    shorter = small()
    shorter.bert_layers = shorter.bert_layers[:2]
    shorter.config.num_hidden_layers = 2  # agrees with the modules
    shorter.config.name_or_path = "mine"
    shorter(ids, mask)


def test_configurations_of_other_classes() -> None:
    """The starter's own, transformers' and a namespace had no `check`: AttributeError."""
    model, shape = small(), vars(small().config)
    stock = transformers.BertConfig(**{name: value for name, value in shape.items() if name != "name_or_path"})
    for config in (types.SimpleNamespace(**shape, num_labels=5), stock):
        other = BertModel(config)
        assert other.config == model.config
        other.load_state_dict(model.state_dict())
    stock.hidden_act = "relu"
    with pytest.raises(ConfigError, match="BertConfig: hidden_act = 'relu': expected 'gelu'"):
        BertModel(stock)
    with pytest.raises(ConfigError, match="config = 'bert-base-uncased': expected a BertConfig; from_pretrained takes"):
        BertModel("bert-base-uncased")


@pytest.mark.parametrize("config", [types.SimpleNamespace(hidden_size=WIDTH), {"hidden_size": WIDTH}, None])
def test_another_object_may_take_the_configuration_s_place(config: Any) -> None:
    """Every call read its fields: AttributeError or TypeError."""
    model, (ids, mask) = small(), batch()
    expected = model(ids, mask)["last_hidden_state"]
    model.config = config
    assert torch.equal(model(ids, mask)["last_hidden_state"], expected)


def test_a_configuration_may_hold_tensors() -> None:
    """Class weights, say: the next call compared them, and "Boolean value of Tensor is ambiguous" was raised."""
    model, (ids, mask) = small(), batch()
    for weights in (torch.ones(5), torch.zeros(5)):
        model.config.class_weights = weights  # type: ignore[attr-defined]
        model(ids, mask)


def test_encode_refuses_the_mask_that_layers_take() -> None:
    """It was extended a second time: an error in a product, or another attention for a single sentence."""
    model, (ids, mask) = small(), batch()
    with pytest.raises(ValueError, match=r"attention_mask has shape \[5, 1, 1, 11\], expected \[B, S\]: 1 attended"):
        model.encode(model.embed(ids), model.get_extended_attention_mask(mask))


def test_copies_and_pickles_compute_the_same() -> None:
    model, (ids, mask) = small(), batch()
    expected = model(ids, mask)["last_hidden_state"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids, mask)["last_hidden_state"], expected)
        with torch.no_grad():
            other.bert_layers[0].interm_dense.weight.zero_()
        assert not torch.equal(other(ids, mask)["last_hidden_state"], expected)
    assert torch.equal(model(ids, mask)["last_hidden_state"], expected)
