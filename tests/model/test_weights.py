# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: every layout a user has, every key accounted for, no pickle executed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minbert_fast import BertConfig, BertModel
from minbert_fast.common.schema import ConfigError
from minbert_fast.model.weight_files import WeightsError
from minbert_fast.model.weights import from_stock_name, to_stock_name

TINY = BertConfig(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=12,
)  # fmt: skip


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    return BertModel(TINY)


def same(a: BertModel, b: BertModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_names_round_trip(model: BertModel) -> None:
    for key, _ in model.named_parameters():
        assert from_stock_name(to_stock_name(key)) == key
        assert from_stock_name("bert." + to_stock_name(key)) == key


def test_save_and_load_are_bit_exact_both_ways(model: BertModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    assert same(model, BertModel.from_pretrained(tmp_path / "ours"))
    stock = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "theirs")
    assert same(model, BertModel.from_pretrained(tmp_path / "theirs"))


def test_reads_a_pickled_state_dict_with_legacy_names_and_pretraining_heads(model: BertModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    state = {}
    for key, tensor in load_file(tmp_path / "model.safetensors").items():
        legacy = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state["bert." + legacy] = tensor
    state["cls.predictions.bias"] = torch.zeros(31)
    state["bert.embeddings.position_ids"] = torch.arange(12)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert same(model, BertModel.from_pretrained(tmp_path))


def test_a_configuration_beside_a_course_checkpoint_says_how_wide_its_heads_are(
    model: BertModel, tmp_path: Path
) -> None:
    """Shapes cannot: MiniLM's heads of 32 were taken for heads of 64 without a word."""
    torch.save(model.state_dict(), tmp_path / "course.pt")
    with pytest.raises(
        WeightsError, match=r"course\.pt: the shapes of an encoder 16 wide do not tell the number of its"
    ):
        BertModel.from_pretrained(tmp_path / "course.pt")
    google = BertModel(BertConfig(vocab_size=31, hidden_size=128, num_hidden_layers=1, num_attention_heads=2))
    torch.save(google.state_dict(), tmp_path / "google.pt")
    assert BertModel.from_pretrained(tmp_path / "google.pt").config.num_attention_heads == 2
    (tmp_path / "config.json").write_text(model.config.to_json())
    loaded = BertModel.from_pretrained(tmp_path / "course.pt")
    assert loaded.config == model.config
    assert same(model, loaded)


def test_what_is_no_pytorch_file_is_not_answered_with_advice_to_unpickle_it(model: BertModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"config\.json: no PyTorch file") as caught:
        BertModel.from_pretrained(tmp_path / "config.json")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_git_left_without_its_content_says_so(model: BertModel, tmp_path: Path, name: str) -> None:
    """`git clone` without Git LFS leaves a text of three lines in place of the weights."""
    (tmp_path / "config.json").write_text(model.config.to_json())
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(WeightsError, match=rf"{name}: a pointer of Git LFS, not the weights; `git lfs pull`"):
        BertModel.from_pretrained(tmp_path)


def test_missing_and_unexpected_keys_are_named(model: BertModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["encoder.layer.7.output.dense.bias"] = torch.zeros(16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing bert_layers\.1\.out_dense\.bias; unexpected bert_layers\.7"):
        BertModel.from_pretrained(tmp_path)


def test_a_wrong_shape_is_named(model: BertModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["pooler.dense.bias"] = torch.zeros(17)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"pooler_dense\.bias has shape \[17\]: expected \[16\]"):
        BertModel.from_pretrained(tmp_path)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "course.pt"])
def test_a_malicious_pickle_does_not_run(model: BertModel, tmp_path: Path, name: str) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": model.state_dict(), "x": _Payload(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(WeightsError, match=rf"{name}.* refers to \w+\.system, which would run commands") as caught:
        BertModel.from_pretrained(tmp_path / name if name.endswith(".pt") else tmp_path)
    assert "weights_only" not in str(caught.value)  # no advice to trust it
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu': expected 'gelu'"),
        ({"hidden_size": 15}, "hidden_size = 15 is no multiple of num_attention_heads = 2"),
        ({"vocab_size": -4}, "vocab_size = -4: expected a positive size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two': expected a whole number"),
        ({"model_type": "roberta"}, "model_type = 'roberta': expected 'bert'"),
    ],
)
def test_an_impossible_configuration_is_one_line(
    model: BertModel, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as caught:
        BertModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\xff" * 8 + b"{}", b"{"])
def test_damaged_files_are_one_line(model: BertModel, tmp_path: Path, content: bytes) -> None:
    for name in ("model.safetensors", "config.json"):
        model.save_pretrained(tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name) as caught:
            BertModel.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)


def test_neither_path_nor_hub_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="no such file or directory"):
        BertModel.from_pretrained("./nowhere/at/all")
    with pytest.raises(WeightsError, match="the hub does not give it"):
        BertModel.from_pretrained("nobody/nothing", local_files_only=True)
