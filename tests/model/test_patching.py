# SPDX-License-Identifier: Apache-2.0
"""`minbert_fast.patch`: transformers' models made fast in place, same weights, same outputs, training included."""

from __future__ import annotations

import copy
import pickle
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import minbert_fast
from minbert_fast.common.schema import ConfigError
from minbert_fast.data import sample_directory
from minbert_fast.model import passes, patching

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


def stock(cls: Any = transformers.BertModel, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=40, initializer_range=0.2, **changes,
    )  # fmt: skip
    return cls(config).eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[1, :4] = 0  # left padding
    return {
        "input_ids": torch.randint(1, 97, (3, 11), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (3, 11), generator=generator),
    }


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call that goes the fast way."""
    calls: list[int] = []
    original = patching._fast

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(patching, "_fast", counted)
    return calls


def test_outputs_are_the_stock_models(fast_calls: list[int]) -> None:
    model, inputs = stock(), batch()
    expected = model(**inputs)
    names = list(model.state_dict())
    assert minbert_fast.patch(model) is model
    got = model(**inputs)
    assert len(fast_calls) == 1
    assert type(got) is type(expected)
    attended = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        got.last_hidden_state[attended], expected.last_hidden_state[attended], rtol=1e-4, atol=1e-4
    )
    assert (got.last_hidden_state[~attended] == 0).all()
    torch.testing.assert_close(got.pooler_output[[0, 2]], expected.pooler_output[[0, 2]], rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names
    assert len(list(model.parameters())) == len(names)
    as_tuple = model(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"], return_dict=False)
    assert torch.equal(as_tuple[0], got.last_hidden_state)
    assert torch.equal(as_tuple[1], got.pooler_output)


def test_what_a_call_leaves_out_is_what_the_stock_model_takes_for_it(fast_calls: list[int]) -> None:
    """No mask attends to every position, the padding word too; the configuration chooses the form of the output."""
    twin, model, ids = stock(), minbert_fast.patch(stock()), batch()["input_ids"]
    ids[0, 3] = 0
    changes = [
        ("return_dict", True),
        ("return_dict", False),
        ("output_hidden_states", True),
        ("output_hidden_states", False),
    ]
    for (field, value), calls in zip(changes, (1, 2, 2, 3), strict=True):  # transformers 5 leaves hooks after the third
        for each in (twin, model):
            setattr(each.config, field, value)
        expected, got = twin(ids), model(ids)
        assert (type(got), len(got)) == (type(expected), len(expected))
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
        assert len(fast_calls) == calls
    for each in (twin, model):
        with pytest.raises((IndexError, RuntimeError)):
            each(torch.ones(1, 41, dtype=torch.int64))  # of 40 positions
    assert len(fast_calls) == 3


def test_training_has_the_stock_gradients(fast_calls: list[int]) -> None:
    """Every parameter's gradient, without dropout; a few steps of an optimizer that was made before the patch."""
    inputs, labels = batch(), torch.tensor([0, 1, 1])
    inputs["attention_mask"][1] = 1  # behind left padding, the stock pooler would read what stands for nothing
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    ours, theirs = (stock(transformers.BertForSequenceClassification, **options).train() for _ in range(2))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (ours, theirs)]
    minbert_fast.patch(ours)
    for step in range(3):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if step == 0:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    assert len(fast_calls) == 3


def test_dropout_acts_in_training_and_follows_the_seed() -> None:
    model, inputs = minbert_fast.patch(stock()).train(), batch()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model(**inputs).last_hidden_state)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(model.eval()(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_gradient_checkpointing_computes_layers_again_and_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = minbert_fast.patch(stock()).train(), batch()
    original, layers = passes.fused_layer, list[int]()

    def counted(*arguments: Any) -> Any:
        layers.append(1)
        return original(*arguments)

    monkeypatch.setattr(passes, "fused_layer", counted)
    gradients, computed = [], []
    for again in (False, True):
        if again:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        layers.clear()
        torch.manual_seed(3)
        hidden = model(**inputs).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        computed.append(len(layers))
    assert computed == [2, 4]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    "asked",
    [{"output_hidden_states": True}, {"position_ids": torch.arange(11)[None].flip(1)}, {"output_attentions": True}],
    ids=str,
)
def test_what_the_fast_path_lacks_goes_the_stock_way(asked: dict[str, Any], fast_calls: list[int]) -> None:
    model, inputs = stock(attn_implementation="eager"), batch()
    expected = model(**inputs, **asked)
    got = minbert_fast.patch(model)(**inputs, **asked)
    assert not fast_calls
    assert got.keys() == expected.keys()
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def test_weights_loaded_moved_or_resized_later_are_seen(fast_calls: list[int]) -> None:
    model, inputs = minbert_fast.patch(stock()), batch()
    other = stock()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    model.load_state_dict(other.state_dict())
    model.resize_token_embeddings(120, mean_resizing=False)
    other.resize_token_embeddings(120, mean_resizing=False)
    other.embeddings.word_embeddings.load_state_dict(model.embeddings.word_embeddings.state_dict())
    inputs["input_ids"][2, 3] = 119
    torch.testing.assert_close(
        model(**inputs).last_hidden_state[2], other(**inputs).last_hidden_state[2], rtol=1e-4, atol=1e-4
    )
    halved = model.to(torch.bfloat16)(**inputs).last_hidden_state
    assert halved.dtype == torch.bfloat16
    assert len(fast_calls) == 2


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_patched_and_has_its_own_weights(how: Callable[[Any], Any], fast_calls: list[int]) -> None:
    model, inputs = minbert_fast.patch(stock()), batch()
    twin = how(model)
    before = model(**inputs).last_hidden_state
    assert torch.equal(minbert_fast.patch(twin)(**inputs).last_hidden_state, before)
    with torch.no_grad():
        twin.encoder.layer[0].intermediate.dense.weight.zero_()
    assert torch.equal(model(**inputs).last_hidden_state, before)
    assert not torch.equal(twin(**inputs).last_hidden_state, before)
    assert len(fast_calls) == 4


def test_a_patched_model_saves_as_before(tmp_path: Path) -> None:
    model = minbert_fast.patch(stock())
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == ["BertModel"]
    loaded = transformers.AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_autocast_keeps_the_stock_dtype() -> None:
    model, inputs = stock(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).last_hidden_state
        got = minbert_fast.patch(model)(**inputs).last_hidden_state
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got[2], expected[2], atol=0.1, rtol=0.1)


def test_sentence_transformers_are_patched_inside(fast_calls: list[int], tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(sample_directory().model), device="cpu")
    sentences = ["a film", "the girl eats an apple in the park", "a very good film"]
    expected = model.encode(sentences, convert_to_tensor=True)
    got = minbert_fast.patch(model).encode(sentences, convert_to_tensor=True)
    assert fast_calls
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_what_is_no_bert_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear: holds no"):
        minbert_fast.patch(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="hidden_act = 'relu'"):
        minbert_fast.patch(stock(hidden_act="relu"))
    with pytest.raises(ConfigError, match="is_decoder"):
        minbert_fast.patch(stock(is_decoder=True))
    model = minbert_fast.patch(stock())
    forward = model.forward
    assert minbert_fast.patch(model).forward == forward


@pytest.mark.ci
def test_the_trainer_example_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_calls: list[int]) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--output", str(tmp_path), "--steps", "120"])
    scores = runpy.run_path(str(ROOT / "docs" / "examples" / "trainer.py"), run_name="__main__")["scores"]
    assert len(fast_calls) > 120
    assert scores["eval_accuracy"] > 0.5  # five classes
