# SPDX-License-Identifier: Apache-2.0
"""The fused path computes the untouched model, and never what was changed: outputs and gradients say what modules say."""

from __future__ import annotations

import copy
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from minbert_fast import BertLayer, BertModel
from minbert_fast.model.packing import pack
from minbert_fast.model.rows import PackedRows
from minbert_fast.model.snapshot import Snapshot
from tests.dropin.cases import WIDTH, batch, close, course, course_layer, dropouts, replicate, small


def packed(ids: Tensor, mask: Tensor) -> Any:
    """Packs the first and the fourth sentence, which are padded on the right; the batch has unused capacity."""
    rows = [ids[i][mask[i].bool()].numpy() for i in (0, 3)]
    return pack([[rows[0]], [rows[1]]], token_capacity=20, sentence_capacity=4)


def everywhere(model: BertModel, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The hidden states of sentences 0 and 3 [17, H] by every way into the model."""
    chosen = torch.zeros_like(mask).bool()
    chosen[0, :6] = chosen[3] = True
    rows = packed(ids, mask)
    return [
        model(ids, mask)["last_hidden_state"][chosen],
        model.encode(model.embed(ids), mask)[chosen],
        model(rows)["last_hidden_state"][:17],
        Snapshot(model, torch.float32).hidden(PackedRows.of(rows))[:17],
    ]


# ---- The untouched model is fused ----------------------------------------------------------------------------------------


def test_the_untouched_model_is_fused(fused_layers: list[Any]) -> None:
    model, (ids, mask) = small(), batch()
    assert model.plan().reasons == ()
    model(ids, mask)
    model(packed(ids, mask))
    copy.deepcopy(model)(ids, mask)
    model.train()(ids, mask)
    assert len(fused_layers) == 12


def test_a_data_parallel_replica_is_fused(fused_layers: list[Any]) -> None:
    """As torch.nn.parallel.replicate makes it: shallow copies whose weights are plain tensors, not parameters."""
    model, (ids, mask) = small(), batch()
    expected = model(ids, mask)
    del fused_layers[:]
    copies = replicate(model)
    got = copies[model](ids, mask)
    assert len(fused_layers) == 3
    for name, value in expected.items():
        close(got[name], value)
    with torch.no_grad():
        copies[model.bert_layers[0].interm_dense].weight.zero_()
    assert not torch.allclose(copies[model](ids, mask)["last_hidden_state"], expected["last_hidden_state"])


def test_torch_compile_keeps_the_fused_ops() -> None:
    model, (ids, mask) = small(num_hidden_layers=2), batch()
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]  # autograd functions nest
        names.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    close(compiled(ids, mask)["last_hidden_state"], model(ids, mask)["last_hidden_state"])
    assert sum("add_norm_forward" in name for name in names) == 4
    del names[:]
    model.bert_layers[1] = Doubled(model.bert_layers[1])
    with pytest.warns(UserWarning, match="is a Doubled"):
        got = compiled(ids, mask)["last_hidden_state"]
    close(got, model(ids, mask)["last_hidden_state"])
    assert sum("add_norm_forward" in name for name in names) == 2
    torch._dynamo.reset()


def test_the_decision_is_cheap() -> None:
    """Twelve layers in 0.1 ms where the machine is idle; ten times as much fails."""
    model = small(num_hidden_layers=12)
    model.plan()
    began = time.process_time()
    for _ in range(100):
        model.plan()
    assert (time.process_time() - began) / 100 < 1e-3


# ---- Whatever is changed has its say -------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A wrapper around any module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any) -> Tensor:
        return 2 * self.inner(*arguments)


class ShiftedLinear(nn.Linear):
    """A subclass with another forward and one more parameter."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.load_state_dict(plain.state_dict())
        self.shift = nn.Parameter(torch.full((plain.out_features,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def relu(model: BertModel) -> None:
    for layer in model.bert_layers:
        layer.interm_af = torch.relu


def without_bias(model: BertModel) -> None:
    model.bert_layers[1].interm_dense = nn.Linear(WIDTH, 80, bias=False)


def subclassed(model: BertModel) -> None:
    model.bert_layers[0].self_attention.query = ShiftedLinear(model.bert_layers[0].self_attention.query)


def wrapped_linear(model: BertModel) -> None:
    model.bert_layers[1].out_dense = Doubled(model.bert_layers[1].out_dense)


def wrapped_embedding(model: BertModel) -> None:
    model.word_embedding = Doubled(model.word_embedding)


def another_norm(model: BertModel) -> None:
    model.bert_layers[2].out_layer_norm = nn.RMSNorm(WIDTH)


def appended(model: BertModel) -> None:
    model.bert_layers.append(BertLayer(model.config).eval())


def shared(model: BertModel) -> None:
    """One layer, used twice."""
    model.bert_layers.append(model.bert_layers[0])


def cut(model: BertModel) -> None:
    model.bert_layers = model.bert_layers[1:]


def parametrized(model: BertModel) -> None:
    nn.utils.parametrizations.weight_norm(model.bert_layers[0].attention_dense)
    with torch.no_grad():
        model.bert_layers[0].attention_dense.parametrizations.weight.original0 *= 2


def pruned(model: BertModel) -> None:
    prune.l1_unstructured(model.bert_layers[0].interm_dense, "weight", amount=0.5)


def own_forward(model: BertModel) -> None:
    linear = model.bert_layers[1].attention_dense
    linear.forward = lambda x: 3 * nn.functional.linear(x, linear.weight, linear.bias)


def hooked_output(model: BertModel) -> None:
    model.bert_layers[0].attention_layer_norm.register_forward_hook(lambda module, args, out: out * 1.5)


def hooked_in_a_new_dict(model: BertModel) -> None:
    """As code that clears all hooks does first."""
    model.bert_layers[0].attention_layer_norm._forward_hooks = OrderedDict()
    hooked_output(model)


def initialised_again(model: BertModel) -> None:
    """All dictionaries of the module are new ones."""
    nn.Linear.__init__(model.bert_layers[1].interm_dense, WIDTH, 80, bias=False)


CHANGES = [
    relu, without_bias, subclassed, wrapped_linear, wrapped_embedding, another_norm, appended, shared, cut,
    parametrized, pruned, own_forward, hooked_output, hooked_in_a_new_dict, initialised_again,
]  # fmt: skip
STAYS_FUSED = (appended, shared, cut)


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "after a call"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_model_computes_what_its_modules_say(change: Callable[[BertModel], None], before: bool) -> None:
    model, (ids, mask) = small(), batch()
    unchanged = (
        model(ids, mask)["last_hidden_state"] if before else copy.deepcopy(model)(ids, mask)["last_hidden_state"]
    )
    torch.manual_seed(5)
    change(model)
    expected = course(model, ids, mask, torch.relu if change is relu else nn.functional.gelu)
    assert (expected - unchanged).abs().max() > 1e-2
    if change in STAYS_FUSED:
        assert model.plan().reasons == ()
    else:
        with pytest.warns(UserWarning, match="runs as plain modules"):
            model.plan()
    rows = torch.cat((expected[0, :6], expected[3]))
    for got in everywhere(model, ids, mask):
        close(got, rows)
    close(model(ids, mask)["last_hidden_state"], expected)
    cotangent = torch.sin(torch.arange(expected.numel())).view_as(expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(ids, mask)["last_hidden_state"], parameters, cotangent, allow_unused=True)
    for got, want in zip(found, torch.autograd.grad(expected, parameters, cotangent, allow_unused=True), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_a_wrapped_layer_is_part_of_the_computation(fused_layers: list[Any]) -> None:
    """The others stay fused; the wrapped one gets [B, S, H] and the course's mask."""
    model, (ids, mask) = small(), batch()
    model.bert_layers[1] = Doubled(model.bert_layers[1])
    extended = model.get_extended_attention_mask(mask)
    with torch.no_grad():
        expected = course_layer(model.bert_layers[0], model.embed(ids), extended)
        expected = 2 * course_layer(model.bert_layers[1].inner, expected, extended)
        expected = course_layer(model.bert_layers[2], expected, extended)
    with pytest.warns(UserWarning, match=r"bert_layers\.1 is a Doubled: this part runs as plain modules"):
        close(model(ids, mask)["last_hidden_state"][mask == 1], expected[mask == 1])
    assert len(fused_layers) == 2
    rows = torch.cat((expected[0, :6], expected[3]))
    for got in everywhere(model, ids, mask):
        close(got, rows)


def test_every_hook_is_called_with_the_shapes_of_the_course() -> None:
    model, (ids, mask) = small(), batch()
    expected = model(ids, mask)["last_hidden_state"]
    layer = model.bert_layers[1]
    seen: dict[str, list[tuple[int, ...]]] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen.setdefault(name, []).append(tuple(output.shape))

        return module.register_forward_hook(hook)

    places = {
        "words": model.word_embedding, "norm": model.embed_layer_norm, "layer": layer,
        "attention": layer.self_attention, "query": layer.self_attention.query, "out": layer.out_dense,
        "drop": layer.out_dropout, "pooler": model.pooler_dense, "tanh": model.pooler_af,
    }  # fmt: skip
    handles = [watch(name, module) for name, module in places.items()]
    with pytest.warns(UserWarning, match="has hooks"):
        close(model(ids, mask)["last_hidden_state"], expected)
    wide = (5, 11, WIDTH)
    assert seen == {name: [wide] for name in places} | {"pooler": [(5, WIDTH)], "tanh": [(5, WIDTH)]}
    for handle in handles:
        handle.remove()
    assert model.plan().reasons == ()
    assert torch.equal(model(ids, mask)["last_hidden_state"], expected)


def test_pre_hooks_and_backward_hooks_are_called() -> None:
    model, (ids, mask) = small(), batch()
    seen: list[str] = []
    linear = model.bert_layers[0].interm_dense
    linear.register_forward_pre_hook(lambda *_: seen.append("before"))
    linear.register_full_backward_hook(lambda *_: seen.append("backward"))
    with pytest.warns(UserWarning, match=r"bert_layers\.0\.interm_dense has hooks"):
        model(ids, mask)["last_hidden_state"].sum().backward()
    assert seen == ["before", "backward"]


def test_a_global_hook_sees_every_module() -> None:
    model, (ids, mask) = small(), batch()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with pytest.warns(UserWarning, match="has global hooks"):
            model(ids, mask)
    finally:
        handle.remove()
    called = {id(module) for module in seen}
    assert all(id(m) in called for m in model.modules() if not isinstance(m, nn.ModuleList))


def test_one_warning_for_one_reason() -> None:
    model, (ids, mask) = small(), batch()
    for layer in model.bert_layers:
        layer.interm_dense = Doubled(layer.interm_dense)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            model(ids, mask)
        model.bert_layers[0].out_dense = nn.Linear(80, WIDTH, bias=False)
        model.bert_layers[0].interm_dense = model.bert_layers[0].interm_dense.inner
        model(ids, mask)
    said = [str(w.message).split(":")[0] for w in found]
    assert said[0] == "bert_layers.0.interm_dense is a Doubled"
    assert "bert_layers.0.out_dense has no bias" in said
    assert len(said) == len(set(said)) <= 3


def test_a_lambda_in_every_layer_is_one_reason() -> None:
    """The warning once held each function's address: twelve lines for twelve layers."""
    model = small()
    for layer in model.bert_layers:
        layer.interm_af = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    with pytest.warns(UserWarning, match=r"bert_layers\.0 has another activation than gelu \(.*<lambda>\)") as warned:
        model(*batch())
    assert len(warned) == 1


def test_a_replaced_pooler_is_called() -> None:
    model, (ids, mask) = small(), batch()
    hidden = model(ids, mask)["last_hidden_state"]
    model.pooler_af = nn.ReLU()
    model.pooler_dense = nn.Sequential(nn.Linear(WIDTH, 7), nn.LayerNorm(7))
    assert torch.equal(model(ids, mask)["pooler_output"], torch.relu(model.pooler_dense(hidden[:, 0])))
    assert model.plan().reasons == ()


def test_overridden_methods_are_called() -> None:
    class Noisy(BertModel):
        def embed(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().embed(input_ids) + 1.0

    class Scaled(BertModel):
        def encode(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
            return 2 * super().encode(hidden_states, attention_mask)

    plain, (ids, mask) = small(), batch()
    noisy, scaled = Noisy(plain.config).eval(), Scaled(plain.config).eval()
    for model in (noisy, scaled):
        model.load_state_dict(plain.state_dict())
    with pytest.warns(UserWarning, match="has its own embed"):
        close(noisy(ids, mask)["last_hidden_state"], plain.encode(plain.embed(ids) + 1.0, mask))
    with pytest.warns(UserWarning, match="has its own encode"):
        close(scaled(ids, mask)["last_hidden_state"], 2 * plain(ids, mask)["last_hidden_state"])
    rows = packed(ids, mask)
    close(scaled(rows)["last_hidden_state"][:17], 2 * plain(rows)["last_hidden_state"][:17])


def test_replaced_class_methods_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = small(), batch()
    before = model(ids, mask)["last_hidden_state"]
    monkeypatch.setattr(BertLayer, "forward", lambda self, hidden, extended: hidden + 1)
    with pytest.warns(UserWarning, match="methods were replaced"):
        got = model(ids, mask)["last_hidden_state"]
    close(got, (model.embed(ids) + 3) * mask[:, :, None])
    monkeypatch.undo()
    assert torch.equal(model(ids, mask)["last_hidden_state"], before)


@pytest.mark.parametrize("name", ["embed", "encode"])
def test_replaced_methods_of_the_model_are_called(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """`BertModel.embed = ...` was compared with itself, and ignored."""
    model, (ids, mask) = small(), batch()
    before, original = model(ids, mask)["last_hidden_state"], getattr(BertModel, name)
    expected = model.encode(2 * model.embed(ids), mask) if name == "embed" else 2 * before
    monkeypatch.setattr(BertModel, name, lambda self, *arguments: 2 * original(self, *arguments))
    with pytest.warns(UserWarning, match=f"has its own {name}"):
        close(model(ids, mask)["last_hidden_state"], expected)
    monkeypatch.undo()
    assert torch.equal(model(ids, mask)["last_hidden_state"], before)


@pytest.mark.parametrize("cls", [nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout])
def test_replaced_methods_of_torch_s_classes_are_called(monkeypatch: pytest.MonkeyPatch, cls: Any) -> None:
    """`nn.Linear.forward = ...` acted on every model but ours."""
    model, (ids, mask) = small(), batch()
    before, original = model(ids, mask)["last_hidden_state"], cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: original(self, x).sin())
    with pytest.warns(UserWarning, match="methods were replaced"):
        got = model(ids, mask)["last_hidden_state"]
    expected = model.embed(ids)
    for layer in model.bert_layers:
        expected = layer(expected, model.get_extended_attention_mask(mask))
    close(got, expected * mask[:, :, None])
    monkeypatch.undo()
    assert (got - before).abs().max() > 1e-2
    assert torch.equal(model(ids, mask)["last_hidden_state"], before)


def test_a_replaced_gelu_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers built after `F.gelu = ...` have the new function, and were computed with the old one."""
    plain, (ids, mask) = small(), batch()
    monkeypatch.setattr(nn.functional, "gelu", torch.relu)
    model = small()
    with pytest.warns(UserWarning, match=r"another activation than gelu \(.*relu\)"):
        close(model(ids, mask)["last_hidden_state"], course(plain, ids, mask, torch.relu))


def test_layers_in_a_plain_list_follow_their_changes() -> None:
    """Layers that the model does not own were looked at once: their later changes were ignored, or an error in zip."""
    model, (ids, mask) = small(), batch()
    layers = list(model.bert_layers)
    del model.bert_layers
    model.bert_layers = layers  # type: ignore[assignment]
    close(model(ids, mask)["last_hidden_state"], course(model, ids, mask))
    layers.pop()
    close(model(ids, mask)["last_hidden_state"], course(model, ids, mask))
    layers[0].self_attention.query = Doubled(layers[0].self_attention.query)
    with pytest.warns(UserWarning, match="Doubled is a Doubled"):
        close(model(ids, mask)["last_hidden_state"], course(model, ids, mask))


def test_other_positions_are_respected() -> None:
    model, (ids, mask) = small(), batch()
    model.position_ids += 2
    expected = course_after_shift(model, ids, mask)
    model.position_ids.clamp_(max=39)
    with pytest.warns(UserWarning, match="position_ids"):
        close(model(ids, mask)["last_hidden_state"], expected)


def course_after_shift(model: BertModel, ids: Tensor, mask: Tensor) -> Tensor:
    twin = copy.deepcopy(model)
    twin.position_ids.copy_(torch.arange(40)[None])
    with torch.no_grad():
        twin.pos_embedding.weight.copy_(twin.pos_embedding.weight.roll(-2, 0))
    return course(twin, ids, mask)


def test_dynamic_quantization_runs() -> None:
    model, (ids, mask) = small(), batch()
    quantize: Any = torch.ao.quantization.quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: where this function moves to
        quantized = quantize(model, {nn.Linear}, torch.qint8)
        got = quantized(ids, mask)["last_hidden_state"]
    expected = model(ids, mask)["last_hidden_state"]
    assert 0 < (got - expected).abs().max() < 0.5
    assert "Linear" in quantized.plan().reasons[0]


# ---- Dropout: each module's own p and mode -------------------------------------------------------------------------------


def draws(model: BertModel) -> Tensor:
    """Hidden states of four runs [4, S H]."""
    ids, mask = batch()
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.stack([model(ids, mask)["last_hidden_state"][3].flatten() for _ in range(4)])


def random(model: BertModel) -> bool:
    rows = draws(model)
    return not torch.equal(rows[0], rows[1])


def test_dropout_modules_mean_what_they_say(fused_layers: list[Any]) -> None:
    model = small().train()
    assert random(model)
    for dropout in dropouts(model):
        dropout.p = 0.0
    assert not random(model)
    model.bert_layers[1].out_dropout.p = 0.4
    assert random(model)
    model.bert_layers[1].out_dropout.eval()
    assert not random(model)
    assert model.plan().reasons == ()
    assert len(fused_layers) == 4 * 4 * 3


def test_dropouts_alone_in_training_mode_draw() -> None:
    """Monte Carlo dropout: the model in eval(), its dropouts in train()."""
    model = small().eval()
    assert not random(model)
    for dropout in dropouts(model):
        dropout.train()
    assert random(model)
    model.train()
    for dropout in dropouts(model):
        dropout.eval()
    assert not random(model)


def test_a_part_in_evaluation_mode_keeps_it() -> None:
    model = small().train()
    model.bert_layers.eval()
    model.embed_dropout.eval()
    assert not random(model)
    model.bert_layers[0].self_attention.train()
    assert random(model)


def test_the_share_dropped_is_p_where_it_was_changed() -> None:
    """One dropout at p = 0.5, seen through a linear layer that only copies."""
    model = small(num_hidden_layers=1)
    layer = model.bert_layers[0]
    layer.out_dropout.p = 0.5
    layer.out_dropout.train()
    branch: list[Tensor] = []
    layer.out_layer_norm.register_forward_pre_hook(lambda _, args: branch.append(args[0]))
    ids, mask = torch.randint(1, 97, (4, 30)), torch.ones(4, 30)
    with pytest.warns(UserWarning, match="has hooks"):
        model(ids, mask)
    layer.out_dropout.eval()
    model(ids, mask)
    assert (branch[0] != branch[1]).any()
    layer.out_dropout.p, layer.out_dropout.training = 1.0, True
    layer.out_layer_norm._forward_pre_hooks.clear()
    with pytest.warns(UserWarning, match=r"drops with p = 1\.0"):
        hidden = model(ids, mask)["last_hidden_state"]
    assert hidden.isfinite().all()
