# SPDX-License-Identifier: Apache-2.0
"""`BertModel.from_pretrained`: its keywords do what transformers' do, and every file of a BERT encoder loads."""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import pickle
import re
import shutil
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minbert_fast import BertConfig, BertModel
from minbert_fast.common.schema import ConfigError
from minbert_fast.model.weight_files import WeightsError
from minbert_fast.model.weights import pretraining_heads

TINY = BertConfig(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=12,
)  # fmt: skip


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    return BertModel(TINY).eval()


@pytest.fixture
def folder(model: BertModel, tmp_path: Path) -> Path:
    """A model directory."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def replaced(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Writes the directory's tensors again, changed."""
    save_file(dict(change(load_file(folder / "model.safetensors"))), folder / "model.safetensors")


# ---- Keywords -----------------------------------------------------------------------------------------------------------


def test_a_given_state_dict_replaces_the_stored_tensors(model: BertModel, folder: Path) -> None:
    """It was ignored: the file's tensors were loaded."""
    other = BertModel(TINY)
    assert same(BertModel.from_pretrained(folder, state_dict=other.state_dict()), other)
    (folder / "model.safetensors").unlink()
    stock = transformers.BertModel(transformers.BertConfig(**json.loads((folder / "config.json").read_text())))
    prefixed = {f"bert.{key}": tensor for key, tensor in stock.state_dict().items()}
    loaded = BertModel.from_pretrained(folder, state_dict=prefixed)
    torch.testing.assert_close(loaded.pooler_dense.weight.data, stock.pooler.dense.weight.data, rtol=0, atol=0)
    with pytest.raises(WeightsError, match=r"^state_dict: missing pooler_dense\.bias$"):
        BertModel.from_pretrained(
            folder, state_dict={k: t for k, t in model.state_dict().items() if k != "pooler_dense.bias"}
        )


def test_the_loading_info_is_the_second_of_two(model: BertModel, folder: Path) -> None:
    """It was taken for a value of the configuration and ignored."""
    replaced(
        folder,
        lambda t: {f"bert.{k}": v for k, v in t.items() if "pooler" not in k} | {"classifier.bias": torch.zeros(2)},
    )
    with pytest.warns(UserWarning, match="has no pooler|left out") as warned:
        loaded, info = BertModel.from_pretrained(folder, output_loading_info=True)
    _, stock = transformers.BertModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, BertModel)
    assert info["missing_keys"] == {"pooler_dense.weight", "pooler_dense.bias"}
    assert info["unexpected_keys"] == set(stock["unexpected_keys"]) == {"classifier.bias"}
    assert info.keys() >= {"mismatched_keys", "error_msgs"}
    assert len(warned) == 2


class WithLayers(BertModel):
    """A student's model: BERT, and layers of its own."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.projected = torch.nn.Linear(config.hidden_size, 4)
        for layer in self.bert_layers:
            layer.adapter = torch.nn.Linear(config.hidden_size, 2)


def test_the_layers_that_a_subclass_adds_start_as_it_draws_them(model: BertModel, folder: Path) -> None:
    """They were reported as missing, and such a model could not be loaded; BERT's own weights must be there."""
    with pytest.warns(
        UserWarning, match=r"has no bert_layers\.0\.adapter\.weight, .* as WithLayers draws them$"
    ) as warned:
        loaded, info = WithLayers.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, WithLayers)
    assert len(warned) == 1
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert info["missing_keys"] == state.keys() - model.state_dict().keys()
    assert loaded.projected.weight.any()
    replaced(folder, lambda t: {k: v for k, v in t.items() if "layer.0.output.dense" not in k})
    with pytest.raises(
        WeightsError, match=r"missing bert_layers\.0\.out_dense\.weight, bert_layers\.0\.out_dense\.bias$"
    ):
        WithLayers.from_pretrained(folder)


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("hidden_droput_prob", "did you mean 'hidden_dropout_prob'?"),
        ("local_file_only", "did you mean 'local_files_only'?"),
        ("zebra", "a configuration has vocab_size, "),
    ],
)
def test_an_unknown_keyword_is_an_error_that_names_it(folder: Path, keyword: str, hint: str) -> None:
    """It was ignored: the model trained with the dropout it had."""
    with pytest.raises(ConfigError, match=rf"^from_pretrained: unknown keyword '{keyword}'; {re.escape(hint)}"):
        BertModel.from_pretrained(folder, **{keyword: 0.5})
    assert BertModel.from_pretrained(folder, hidden_dropout_prob=0.5).config.hidden_dropout_prob == 0.5
    with pytest.raises(ConfigError, match="hidden_dropout_prob = None: leave it out"):  # it became the class's default
        BertModel.from_pretrained(folder, hidden_dropout_prob=None)
    with pytest.raises(ConfigError, match="hidden_act = 'relu'"):
        BertModel.from_pretrained(folder, hidden_act="relu")


def test_what_the_hub_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    wanted = {
        "revision": "v1",
        "cache_dir": "/cache",
        "token": "secret",
        "force_download": True,
        "local_files_only": True,
    }
    BertModel.from_pretrained("someone/bert", subfolder="model", **wanted)
    assert asked.items() >= (wanted | {"name": "someone/bert"}).items()
    assert {"model/config.json", "model/*.safetensors", "model/*.index.json"} <= set(asked["allow_patterns"])


def test_a_subfolder_of_a_directory(model: BertModel, folder: Path) -> None:
    assert same(BertModel.from_pretrained(folder.parent, subfolder="model"), model)
    with pytest.raises(WeightsError, match="no subfolder 'mode'"):
        BertModel.from_pretrained(folder.parent, subfolder="mode")
    with pytest.raises(WeightsError, match="leads out of the directory"):
        BertModel.from_pretrained(folder, subfolder="../model")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_parameters(model: BertModel, folder: Path, dtype: torch.dtype) -> None:
    """It was ignored: the parameters were fp32."""
    name = str(dtype).removeprefix("torch.")
    for asked in ({"dtype": dtype}, {"torch_dtype": dtype}, {"dtype": name}):
        loaded = BertModel.from_pretrained(folder, **asked)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert torch.equal(loaded.pooler_dense.weight, model.pooler_dense.weight.to(dtype))
    assert loaded(torch.tensor([[1, 2, 3]]))["pooler_output"].isfinite().all()
    replaced(folder, lambda t: {k: v.to(dtype) for k, v in t.items()})
    assert BertModel.from_pretrained(folder, dtype="auto").pooler_dense.weight.dtype == dtype
    assert BertModel.from_pretrained(folder).pooler_dense.weight.dtype == torch.float32


def test_another_dtype_is_one_line(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^dtype = torch.int8: expected float32, float64, bfloat16, float16 or 'auto'$"
    ):
        BertModel.from_pretrained(folder, dtype=torch.int8)
    with pytest.raises(ConfigError, match="expected one of the two"):
        BertModel.from_pretrained(folder, dtype="float16", torch_dtype="float32")


# ---- Directories --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "PreTraining"],
)
def test_a_directory_with_a_task_head_loads_its_encoder(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    """The heads' tensors were unexpected: an error."""
    config = transformers.BertConfig(**json.loads(TINY.to_json()))
    stock = getattr(transformers, f"BertFor{kind}")(config).eval()
    stock.save_pretrained(tmp_path)
    recwarn.clear()
    ours = BertModel.from_pretrained(tmp_path)
    left = [str(w.message) for w in recwarn if "left out" in str(w.message)]
    heads = {"MaskedLM": [], "PreTraining": [], "QuestionAnswering": ["qa_outputs.bias", "qa_outputs.weight"]}
    names = heads.get(kind, ["classifier.bias", "classifier.weight"])
    assert left == ([f"{tmp_path}: the encoder alone is loaded; left out: {', '.join(names)}"] if names else [])
    ids = torch.tensor([[2, 7, 9, 3]])
    expected = stock.bert(ids).last_hidden_state
    torch.testing.assert_close(ours(ids)["last_hidden_state"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_weights(model: BertModel, folder: Path, name: str) -> None:
    """They were said to be no weights at all."""
    tensors = load_file(folder / "model.safetensors") | {"cls.predictions.bias": torch.ones(31)}
    (folder / "model.safetensors").unlink()
    stem, suffix = name.rsplit(".", 1)
    places = {key: f"{stem}-0000{1 + number % 3}-of-00003.{suffix}" for number, key in enumerate(tensors)}
    for file in set(places.values()):
        part = {key: tensors[key].contiguous() for key in tensors if places[key] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert same(BertModel.from_pretrained(folder), model)
    assert list(pretraining_heads(folder)) == ["cls.predictions.bias"]
    for places_now, problem in (
        (places | {"pooler.dense.gain": file}, "missing pooler.dense.gain"),
        (places | {"pooler.dense.bias": "none.bin"}, "shard 'none.bin' cannot be read"),
        (places | {"pooler.dense.bias": "../x.bin"}, "leads out of the directory"),
        ([], "expected a weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": places_now}))
        with pytest.raises(WeightsError, match=problem) as caught:
            BertModel.from_pretrained(folder)
        assert str(caught.value).startswith(str(index))
        assert "\n" not in str(caught.value)


def test_shards_that_transformers_wrote(tmp_path: Path) -> None:
    stock = transformers.BertModel(transformers.BertConfig(**json.loads(TINY.to_json()))).eval()
    stock.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(BertModel.from_pretrained(tmp_path).pooler_dense.weight, stock.pooler.dense.weight)


def test_quantized_weights_are_refused(folder: Path) -> None:
    """Integers were taken for the weights themselves."""
    replaced(folder, lambda t: t | {"pooler.dense.weight": t["pooler.dense.weight"].to(torch.int8)})
    with pytest.raises(WeightsError, match=r"pooler\.dense\.weight is torch\.int8: expected a floating-point tensor"):
        BertModel.from_pretrained(folder)


def test_gelu_by_its_older_name(model: BertModel, folder: Path) -> None:
    """`gelu_python`, of configurations from 2019, is GELU's exact form; it was refused."""
    values = json.loads((folder / "config.json").read_text())
    ids = torch.tensor([[2, 7, 9, 3]])
    for name in ("gelu", "gelu_python"):
        (folder / "config.json").write_text(json.dumps(values | {"hidden_act": name}))
        expected = transformers.BertModel.from_pretrained(folder)(ids).last_hidden_state
        torch.testing.assert_close(
            BertModel.from_pretrained(folder)(ids)["last_hidden_state"], expected, rtol=1e-4, atol=1e-5
        )
    for name in ("gelu_new", "gelu_pytorch_tanh"):
        (folder / "config.json").write_text(json.dumps(values | {"hidden_act": name}))
        with pytest.raises(ConfigError, match=f"config.json: hidden_act = '{name}': expected 'gelu'"):
            BertModel.from_pretrained(folder)


class _WithPositions(BertModel):
    """As the course's model: position ids are a buffer of its state dict."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])


@pytest.mark.parametrize("cls", [BertModel, _WithPositions])
@pytest.mark.parametrize("key", [None, "position_ids", "embeddings.position_ids"])
def test_position_ids_load_both_ways(folder: Path, tmp_path: Path, cls: type[BertModel], key: str | None) -> None:
    before = (folder / "model.safetensors").read_bytes()
    if key is not None:
        replaced(folder, lambda t: t | {key: torch.arange(12)[None]})
    loaded = cls.from_pretrained(folder)
    assert type(loaded) is cls
    assert loaded.state_dict().get("position_ids", torch.arange(12)[None]).tolist() == [list(range(12))]
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before
    torch.save({"model": {f"bert.{k}": t for k, t in loaded.state_dict().items()}}, tmp_path / "course.pt")
    assert same(cls.from_pretrained(tmp_path / "course.pt", num_attention_heads=2), loaded)


# ---- Files of torch.save ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("module.", None),
        ("_orig_mod.", "state_dict"),
        ("module._orig_mod.", "model_state_dict"),
        ("bert.", "model"),
        ("bert.", None),
        ("module.bert.", ("model", "state_dict")),
        ("model.bert._orig_mod.", None),
        ("bert.module.", "state_dict"),
    ],
)
def test_wrapped_and_nested_checkpoints(
    model: BertModel, tmp_path: Path, prefix: str, key: str | tuple[str, ...] | None
) -> None:
    """DataParallel, torch.compile and Lightning: each was refused."""
    content: Any = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    if "bert" in prefix:
        content["classifier.weight"] = torch.zeros(2, 16)
    for name in reversed((key,) if isinstance(key, str) else key or ()):
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "course.pt")
    if "bert" in prefix:
        with pytest.warns(UserWarning, match=r"left out: classifier\.weight$"):
            loaded = BertModel.from_pretrained(tmp_path / "course.pt", num_attention_heads=2)
    else:
        loaded = BertModel.from_pretrained(tmp_path / "course.pt", num_attention_heads=2)
    assert same(loaded, model)


RAN = []


def _made() -> _Settings:
    RAN.append("made")
    return _Settings()


class _Settings:
    """A class of the project's own, whose copies a function of the project makes."""

    def __reduce__(self) -> Any:
        return _made, ()


def test_what_else_a_checkpoint_holds_does_not_matter(model: BertModel, tmp_path: Path) -> None:
    """NumPy scalars, paths and classes of the project made the file unreadable; they are never looked up."""
    content = {
        "model": model.state_dict(),
        "best": np.float64(0.5),
        "steps": np.int64(7),
        "scores": np.arange(3.0),
        "path": Path("runs") / "best.pt",
        "args": argparse.Namespace(output=Path("x"), rate=np.float32(0.1)),
        "settings": _Settings(),
        "device": torch.device("cpu"),
        "kind": np.dtype("float32"),
        "rng": torch.random.get_rng_state(),
        "ordered": collections.OrderedDict(a=Path("y")),
    }
    torch.save(content, tmp_path / "course.pt")
    assert same(BertModel.from_pretrained(tmp_path / "course.pt", num_attention_heads=2), model)
    assert not RAN


def test_numpy_values_of_another_version(model: BertModel, tmp_path: Path) -> None:
    """NumPy 1 writes other module names than NumPy 2, and neither read the other's."""
    torch.save({"model": model.state_dict(), "best": np.float64(0.5)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for info in new.infolist():
            old.writestr(info, new.read(info).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert same(BertModel.from_pretrained(tmp_path / "old.pt", num_attention_heads=2), model)


PROJECT = """
import torch
from minbert_fast import BertConfig, BertModel
class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = BertModel(BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                         intermediate_size=24, max_position_embeddings=12))
"""


@pytest.mark.parametrize("key", [None, "model"])
def test_a_pickled_model_names_its_class_and_the_line_that_converts_it(
    tmp_path: Path, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as its_process:  # the project's own, which finds the project's modules
        its_process.syspath_prepend(tmp_path)
        project = importlib.import_module("project")
        torch.manual_seed(0)
        torch.save({key: project.Classifier()} if key else project.Classifier(), "whole.pt")
        del sys.modules["project"]
    with pytest.raises(
        WeightsError, match=r"whole\.pt: its weights lie inside an object of class project\.Classifier,"
    ) as caught:
        BertModel.from_pretrained(tmp_path / "whole.pt")
    assert "project" not in sys.modules
    assert "\n" not in str(caught.value)
    command = re.search(r'python -c "(.+)"$', str(caught.value))
    assert command is not None
    with monkeypatch.context() as its_process:
        its_process.syspath_prepend(tmp_path)
        exec(command[1], {})
        del sys.modules["project"]
    converted = BertModel.from_pretrained(tmp_path / "whole-tensors.pt", num_attention_heads=2)
    torch.manual_seed(0)
    assert same(converted, BertModel(TINY))


def test_a_class_that_stands_in_the_way_is_named(model: BertModel, tmp_path: Path) -> None:
    content = {"model": model.state_dict(), "counts": collections.defaultdict(int, a=1)}
    torch.save(content, tmp_path / "course.pt")
    with pytest.raises(
        WeightsError, match=r"course\.pt: .* of class .*collections\.defaultdict.*\['model'\]"
    ) as caught:
        BertModel.from_pretrained(tmp_path / "course.pt")
    assert "add_safe_globals" not in str(caught.value)
    torch.save(
        {"model": model.state_dict(), "path": Path("x")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    with pytest.raises(WeightsError, match=r"old\.pt: .* of class pathlib\.\S*PosixPath, "):
        BertModel.from_pretrained(tmp_path / "old.pt")


def test_two_encoders_in_one_file_are_named(model: BertModel, tmp_path: Path) -> None:
    """Which of the two would have loaded was chance."""
    content = {f"{name}.{k}": t for name in ("teacher", "student") for k, t in model.state_dict().items()}
    torch.save(content, tmp_path / "course.pt")
    with pytest.raises(WeightsError, match=r"holds 2 encoders: student\., teacher\.; expected one"):
        BertModel.from_pretrained(tmp_path / "course.pt")
    torch.save({**model.state_dict(), "module.pooler_dense.bias": torch.ones(16)}, tmp_path / "course.pt")
    with pytest.raises(WeightsError, match=r"holds a tensor twice, wrapped and not: pooler_dense\.bias"):
        BertModel.from_pretrained(tmp_path / "course.pt", num_attention_heads=2)


def test_a_file_of_no_weights_says_where_they_are_looked_for(tmp_path: Path) -> None:
    for content in ({"epoch": 3}, [1, 2], {"net": {"a": torch.zeros(1)}}):
        torch.save(content, tmp_path / "course.pt")
        with pytest.raises(
            WeightsError, match="holds no dictionary of tensors, alone or under model, model_state_dict"
        ):
            BertModel.from_pretrained(tmp_path / "course.pt")


def test_a_safetensors_file_by_its_name(model: BertModel, folder: Path, tmp_path: Path) -> None:
    assert same(BertModel.from_pretrained(folder / "model.safetensors"), model)
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    assert same(BertModel.from_pretrained(tmp_path / "alone.safetensors", num_attention_heads=2), model)


def test_the_line_that_mends_the_course_s_own_load(model: BertModel, tmp_path: Path) -> None:
    """docs/course.md: what torch refuses since 2.6, the line that the page gives, and no line at all here."""
    info = {
        "model": model.state_dict(),
        "args": argparse.Namespace(lr=1e-5),
        "model_config": types.SimpleNamespace(hidden_size=16),
        "numpy_rng": np.random.get_state(),
    }
    torch.save(info, tmp_path / "course.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "course.pt")
    page = (Path(__file__).parents[2] / "docs" / "course.md").read_text(encoding="utf-8")
    line = re.search(r"^    (saved = torch\.load.+)$", page, re.MULTILINE)
    assert line is not None
    names: dict[str, Any] = {"torch": torch, "args": argparse.Namespace(filepath=tmp_path / "course.pt")}
    exec(line[1], names)
    assert names["saved"]["model_config"].hidden_size == 16
    assert same(BertModel.from_pretrained(tmp_path / "course.pt", num_attention_heads=2), model)
