# SPDX-License-Identifier: Apache-2.0
"""A patched transformers model follows changes of its modules before and after the patch."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import minbert_fast
from minbert_fast.common.schema import ConfigError
from tests.dropin.cases import batch, close, dropouts, replicate

ARGUMENTS = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 80, "max_position_embeddings": 40, "initializer_range": 0.2}  # fmt: skip


def stock() -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**ARGUMENTS)).eval()


def inputs() -> dict[str, Tensor]:
    ids, mask = batch()
    return {"input_ids": ids[:4], "attention_mask": mask[:4]}


class Adapter(nn.Module):
    """A layer with a bottleneck behind it; transformers passes more arguments from version to version."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.up = nn.Linear(48, 48)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        out = self.layer(*arguments, **options)
        return (out[0] + torch.tanh(self.up(out[0])), *out[1:]) if isinstance(out, tuple) else out + self.up(out).tanh()


def wrapped(model: Any) -> None:
    torch.manual_seed(1)
    model.encoder.layer[1] = Adapter(model.encoder.layer[1])


def cut(model: Any) -> None:
    model.encoder.layer = model.encoder.layer[:1]


def another_activation(model: Any) -> None:
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def own_forward(model: Any) -> None:
    dense = model.encoder.layer[2].output.dense
    dense.forward = lambda x: -nn.functional.linear(x, dense.weight, dense.bias)


def linear_pooler(model: Any) -> None:
    model.pooler.activation = nn.Identity()


def other_positions(model: Any) -> None:
    model.embeddings.position_ids = model.embeddings.position_ids.roll(3, 1)


def other_types(model: Any) -> None:
    model.embeddings.token_type_ids = torch.ones_like(model.embeddings.token_type_ids)


@pytest.mark.parametrize("when", ["before the patch", "after the patch", "after a call"])
@pytest.mark.parametrize(
    "change",
    [wrapped, cut, another_activation, own_forward, linear_pooler, other_positions, other_types],
    ids=lambda f: f.__name__,
)
def test_changes_are_computed(change: Callable[[Any], None], when: str, fused_layers: list[Any]) -> None:
    model, given = stock(), inputs()
    expected_model = copy.deepcopy(model)
    unchanged = expected_model(**given)
    change(expected_model)
    expected = expected_model(**given)
    if when == "before the patch":
        change(model)
        minbert_fast.patch(model)
    else:
        minbert_fast.patch(model)
        if when == "after a call":
            model(**given)
        change(model)
    del fused_layers[:]
    if change in (cut, linear_pooler):
        got = model(**given)
        assert len(fused_layers) == len(model.encoder.layer)
    else:
        with pytest.warns(UserWarning, match="patched BertModel: .* runs the stock forward"):
            got = model(**given)
        assert not fused_layers
    attended = given["attention_mask"].bool()
    close(got.last_hidden_state[attended], expected.last_hidden_state[attended])
    first = attended[:, 0]
    close(got.pooler_output[first], expected.pooler_output[first])
    apart = expected.pooler_output[first] - unchanged.pooler_output[first]
    assert apart.abs().max() > 1e-2


@pytest.mark.parametrize("when", ["before the patch", "after a call"])
@pytest.mark.parametrize("change", ["scaling", "function"])
def test_other_attention_is_computed(
    change: str, when: str, monkeypatch: pytest.MonkeyPatch, fused_layers: list[Any]
) -> None:
    """A temperature, and a function registered with transformers' AttentionInterface: both were once ignored."""
    masking = pytest.importorskip("transformers.masking_utils", reason="transformers 4.53 or newer")

    def sharper(*arguments: Any, scaling: float, **options: Any) -> Any:
        return attend["sdpa"](*arguments, scaling=3 * scaling, **options)

    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(attend, "sharper", sharper)
    monkeypatch.setitem(masking.ALL_MASK_ATTENTION_FUNCTIONS, "sharper", masking.sdpa_mask)
    model, given = stock(), inputs()
    unchanged = model(**given).last_hidden_state[0, 0]

    def changed(model: Any) -> Any:
        if change == "function":
            model.set_attn_implementation("sharper")
        else:
            model.encoder.layer[1].attention.self.scaling *= 3
        return model

    expected = changed(copy.deepcopy(model))(**given).last_hidden_state[0, 0]
    if when == "after a call":
        minbert_fast.patch(model)(**given)
    minbert_fast.patch(changed(model))
    del fused_layers[:]
    with pytest.warns(UserWarning, match=r"another scaling|calls .*sharper in the place"):
        close(model(**given).last_hidden_state[0, 0], expected)
    assert not fused_layers
    assert (expected - unchanged).abs().max() > 1e-2


def test_a_temperature_learns() -> None:
    """A parameter that starts with the stock value got no gradient, and its later values were ignored."""
    model, given = minbert_fast.patch(stock()), inputs()
    attention = model.encoder.layer[1].attention.self
    if not hasattr(attention, "scaling"):
        pytest.skip("transformers of a version whose attention computes its scaling")
    model.set_attn_implementation("eager")  # sdpa takes no tensor
    attention.scaling = nn.Parameter(torch.tensor(attention.scaling, dtype=torch.float64))
    with pytest.warns(UserWarning, match="has another scaling"):
        model(**given).last_hidden_state.square().sum().backward()
    assert attention.scaling.grad


REPLACED = ["BertModel", "BertEmbeddings", "BertEncoder", "BertLayer", "BertAttention", "BertSelfAttention",
            "BertSelfOutput", "BertIntermediate", "BertOutput", "feed_forward_chunk", "eager_attention_forward"]  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_functions_replaced_for_all_models_are_called(
    name: str, monkeypatch: pytest.MonkeyPatch, fused_layers: list[Any]
) -> None:
    """`BertSelfAttention.forward = ...` acted on every model but patched ones."""
    bert = transformers.models.bert.modeling_bert
    places = {"feed_forward_chunk": bert.BertLayer, "eager_attention_forward": bert}
    owner, attribute = (places[name], name) if name in places else (getattr(bert, name), "forward")
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def louder(*arguments: Any, **options: Any) -> Any:
        out = original(*arguments, **options)
        if isinstance(out, Tensor):
            return 2 * out
        if isinstance(out, tuple):
            return 2 * out[0], *out[1:]
        out.last_hidden_state = 2 * out.last_hidden_state
        return out

    model, given = stock(), inputs()
    model.set_attn_implementation("eager")
    unchanged = minbert_fast.patch(model)(**given).last_hidden_state[3]
    del fused_layers[:]
    with monkeypatch.context() as program:
        program.setattr(owner, attribute, louder)
        with pytest.warns(UserWarning, match="in the place of a function of transformers, so it runs the stock"):
            got = model(**given).last_hidden_state[3]
    assert not fused_layers
    assert (got - unchanged).abs().max() > 1e-2
    assert torch.equal(model(**given).last_hidden_state[3], unchanged)
    assert len(fused_layers) == 3


def test_a_decoder_sees_no_later_token(fused_layers: list[Any]) -> None:
    """The configuration is read in each call, as transformers does."""
    expected_model, model, given = stock(), minbert_fast.patch(stock()), inputs()
    model.config.is_decoder = expected_model.config.is_decoder = True
    assert torch.equal(model(**given).last_hidden_state, expected_model(**given).last_hidden_state)
    assert not fused_layers


class Louder(transformers.BertModel):
    """A subclass with a forward of its own."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        out = super().forward(*arguments, **options)
        out.last_hidden_state = 2 * out.last_hidden_state
        return out


def test_a_forward_of_its_own_is_refused() -> None:
    """The patch once replaced the whole of such a forward."""
    with pytest.raises(ConfigError, match="Louder: has a forward of its own"):
        minbert_fast.patch(Louder(stock().config))
    model = stock()
    model.forward = lambda **given: Louder.forward(model, **given)
    with pytest.raises(ConfigError, match="BertModel: has a forward of its own"):
        minbert_fast.patch(model)


@pytest.mark.parametrize("shape", [(1, 11), (4, 10), (4, 11, 11)])
def test_masks_of_other_shapes_go_to_the_stock_forward(shape: tuple[int, ...], fused_layers: list[Any]) -> None:
    """What transformers makes of them differs between versions."""
    model, ids = minbert_fast.patch(stock()), inputs()["input_ids"]
    with contextlib.suppress(IndexError, RuntimeError, ValueError):
        model(ids, torch.ones(shape, dtype=torch.int64))
    assert not fused_layers


@pytest.mark.parametrize(
    "place", ["embeddings", "embeddings.word_embeddings", "encoder", "encoder.layer.0", "encoder.layer.1.attention.self",
              "encoder.layer.1.output.LayerNorm", "pooler", "pooler.dense"]
)  # fmt: skip
def test_hooks_are_called(place: str) -> None:
    model, given = minbert_fast.patch(stock()), inputs()
    expected = model(**given).last_hidden_state
    seen: list[Any] = []
    handle = model.get_submodule(place).register_forward_hook(lambda module, args, out: seen.append(out))
    if place.startswith("pooler"):
        model(**given)
    else:
        with pytest.warns(UserWarning, match="has hooks"):
            got = model(**given).last_hidden_state
        attended = given["attention_mask"].bool()
        close(got[attended], expected[attended])
    assert len(seen) == 1
    handle.remove()
    assert torch.equal(model(**given).last_hidden_state, expected)
    assert len(seen) == 1


def test_attention_maps_once_cost_no_speed_afterwards(fused_layers: list[Any]) -> None:
    """transformers 5 leaves hooks in the model, which do nothing until maps are asked for again."""
    model, given = minbert_fast.patch(stock()), inputs()
    model.set_attn_implementation("eager")
    assert len(model(**given, output_attentions=True, output_hidden_states=True).attentions) == 3
    assert not fused_layers
    model(**given)
    assert len(fused_layers) == 3


def test_a_replica_computes_with_its_own_weights(fused_layers: list[Any]) -> None:
    """As torch.nn.parallel.replicate makes it."""
    model, given = minbert_fast.patch(stock()), inputs()
    expected = model(**given).last_hidden_state
    copies = replicate(model)
    got = copies[model](**given).last_hidden_state
    close(got, expected)
    with torch.no_grad():
        copies[model.encoder.layer[0].output.dense].weight.zero_()
    assert not torch.allclose(copies[model](**given).last_hidden_state, expected)
    assert len(fused_layers) == 9


def random(model: Any) -> bool:
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = (model(**inputs()).last_hidden_state[3] for _ in range(2))
    return not torch.equal(first, second)


def test_dropouts_with_p_0_do_not_draw(fused_layers: list[Any]) -> None:
    model = minbert_fast.patch(stock()).train()
    assert random(model)
    for dropout in dropouts(model):
        dropout.p = 0.0
    assert not random(model)
    assert len(fused_layers) == 4 * 3


def test_monte_carlo_dropout_draws() -> None:
    model = minbert_fast.patch(stock()).eval()
    for dropout in dropouts(model):
        dropout.train()
    with pytest.warns(UserWarning, match="is in another mode than its parent"):
        assert random(model)
    model.train()
    for dropout in dropouts(model):
        dropout.eval()
    for layer in model.encoder.layer:
        layer.attention.self.eval()
    assert not random(model)


def test_a_part_in_evaluation_mode_keeps_it(fused_layers: list[Any]) -> None:
    model = minbert_fast.patch(stock()).train()
    model.encoder.eval()
    assert random(model)  # the embeddings still drop
    model.embeddings.eval()
    assert not random(model)
    assert len(fused_layers) == 4 * 3


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
def test_adapters_of_peft_are_computed_and_merge_back(fused_layers: list[Any]) -> None:
    peft = pytest.importorskip("peft")
    model, given = minbert_fast.patch(stock()), inputs()
    attended = given["attention_mask"].bool()
    before = model(**given).last_hidden_state
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    with pytest.warns(UserWarning, match=r"query is a peft\..*Linear"):
        got = tuned(**given).last_hidden_state
    assert (got - before)[attended].abs().max() > 1e-2
    del fused_layers[:]
    merged = tuned.merge_and_unload()
    close(merged(**given).last_hidden_state[attended], got[attended])
    assert len(fused_layers) == 3
