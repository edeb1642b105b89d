# SPDX-License-Identifier: Apache-2.0
"""Encoder weights from and to files: Hugging Face directories, hub names and course `.pt` files.

No pickle is ever executed: `.safetensors` first, else `.bin` and `.pt` through `weights_only=True`. Every key of a
file is accounted for; a missing or unexpected one is an error that names it.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import regular
from minbert_fast.model.config import BertConfig


class WeightsError(ConfigError):
    """A weights file is missing, damaged, or holds other tensors than the model's; one line for the user."""


# Hugging Face name -> the course's name. `N` stands for the layer's number.
_LAYER_NAMES = {
    "attention.self.query": "self_attention.query",
    "attention.self.key": "self_attention.key",
    "attention.self.value": "self_attention.value",
    "attention.output.dense": "attention_dense",
    "attention.output.LayerNorm": "attention_layer_norm",
    "intermediate.dense": "interm_dense",
    "output.dense": "out_dense",
    "output.LayerNorm": "out_layer_norm",
}
_OUTER_NAMES = {
    "embeddings.word_embeddings": "word_embedding",
    "embeddings.position_embeddings": "pos_embedding",
    "embeddings.token_type_embeddings": "tk_type_embedding",
    "embeddings.LayerNorm": "embed_layer_norm",
    "pooler.dense": "pooler_dense",
}
_LAYER_NAMES_BACK = {ours: theirs for theirs, ours in _LAYER_NAMES.items()}
_OUTER_NAMES_BACK = {ours: theirs for theirs, ours in _OUTER_NAMES.items()}

# Tensors that published files hold beside the encoder: index buffers, and the heads of BERT's own pre-training.
_BESIDE_THE_ENCODER = re.compile(r"(bert\.)?(embeddings\.)?position_ids|cls\.(predictions|seq_relationship)\..+")
_HEAD_OF_A_COURSE_MODEL = re.compile(r"(?!bert\.).+")


def from_stock_name(key: str) -> str:
    """The course's name of a Hugging Face tensor (legacy `gamma`/`beta` included); other names pass through."""
    key = key.removeprefix("bert.")
    key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))
    stem, _, kind = key.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem)
    if layer and layer[2] in _LAYER_NAMES:
        return f"bert_layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
    return key


def to_stock_name(key: str) -> str:
    """The Hugging Face name of one of our parameters."""
    stem, _, kind = key.rpartition(".")
    if stem in _OUTER_NAMES_BACK:
        return f"{_OUTER_NAMES_BACK[stem]}.{kind}"
    layer = re.fullmatch(r"bert_layers\.(\d+)\.(.+)", stem)
    assert layer is not None, key
    return f"encoder.layer.{layer[1]}.{_LAYER_NAMES_BACK[layer[2]]}.{kind}"


def resolve(name: str, *, local_files_only: bool = False) -> Path:
    """The directory or file that `name` means: a path if one exists, else a model on the Hugging Face hub.

    Raises WeightsError where neither is found; offline mode (HF_HUB_OFFLINE, `local_files_only`) is honoured.
    """
    path = Path(name)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise WeightsError(f"model {name!r}: no such file or directory")
    wanted = ["config.json", "*.safetensors", "pytorch_model.bin", "tokenizer*", "vocab.txt", "special_tokens_map.json"]
    wanted += [
        "modules.json",
        "*_Pooling/*",
        "*_Dense/*",
        "*sentence_bert_config.json",
        "config_sentence_transformers.json",
    ]
    wanted += ["recipe.toml"]  # of a model exported by this package, whose heads.safetensors the second pattern takes
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=local_files_only))
    except Exception as error:  # the hub's own error classes differ between its major versions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"model {name!r}: no such directory, and not to be had from the hub ({reason})") from None


def read(path: Path) -> tuple[BertConfig | None, dict[str, Tensor]]:
    """Configuration and encoder tensors (under our names) of a model directory or a course `.pt` file.

    A `.pt` file's configuration is that of a `config.json` beside it, else None. Raises WeightsError or ConfigError.
    """
    if path.is_file():
        beside = path.parent / "config.json"
        return BertConfig.from_file(beside) if beside.is_file() else None, _encoder_of_course_file(path)
    config = BertConfig.from_file(path / "config.json")
    tensors = _stock_tensors(path)
    return config, {from_stock_name(k): t for k, t in tensors.items() if not _BESIDE_THE_ENCODER.fullmatch(k)}


def pretraining_heads(path: Path) -> dict[str, Tensor]:
    """Tensors of BERT's own pre-training heads, `cls.predictions.*` and `cls.seq_relationship.*`, as far as they are there.

    `path` is a model directory or a course `.pt` file (which has none). Raises WeightsError.
    """
    if path.is_file():
        return {}
    return {from_stock_name(k): t for k, t in _stock_tensors(path).items() if k.startswith("cls.")}


def _stock_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a model directory, under the names they have there. Raises WeightsError."""
    if (path / "model.safetensors").is_file():
        return read_safetensors(path / "model.safetensors")
    if (path / "pytorch_model.bin").is_file():
        return _tensors_only(_read_pickle(path / "pytorch_model.bin"), path / "pytorch_model.bin")
    raise WeightsError(f"{path}: holds neither model.safetensors nor pytorch_model.bin")


def check_keys(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, optional: str = "") -> None:
    """Raises WeightsError naming missing or unexpected tensors and wrong shapes; `optional` is a prefix."""
    missing = [k for k in wanted if k not in found and not (optional and k.startswith(optional))]
    unexpected = [k for k in found if k not in wanted]
    if missing or unexpected:
        parts = [f"{kind} {_some(keys)}" for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise WeightsError(f"{where}: {'; '.join(parts)}")
    for key, tensor in found.items():
        if tensor.shape != wanted[key].shape:
            shapes = f"shape {list(tensor.shape)}: expected {list(wanted[key].shape)}"
            raise WeightsError(f"{where}: {key} has {shapes}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file; raises WeightsError when it cannot be read or is damaged."""
    try:
        return load_file(regular(path))
    except (SafetensorError, OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]})") from None


def write(directory: Path, config: BertConfig, tensors: Mapping[str, Tensor]) -> None:
    """`config.json` and `model.safetensors` in the Hugging Face layout; each file replaced in one step."""
    directory.mkdir(parents=True, exist_ok=True)
    stock = {to_stock_name(k): t.detach().contiguous().cpu() for k, t in tensors.items()}
    write_atomically(directory / "model.safetensors", save(stock, metadata={"format": "pt"}))
    write_atomically(directory / "config.json", config.to_json().encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_pickle(path: Path) -> Any:
    # What course checkpoints hold besides tensors: their arguments and NumPy's random state. Data, not code.
    allowed = [argparse.Namespace, types.SimpleNamespace, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    reconstruct: Any = np.zeros(1).__reduce__()[0]
    try:
        with torch.serialization.safe_globals([*allowed, reconstruct]):
            return torch.load(regular(path), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        # torch's own words advise to load it with weights_only=False, which runs what the file says.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "" if "weights_only" in reason else f" ({reason[:200]})"
        raise WeightsError(f"{path}: no PyTorch file, or one of more than plain tensors{reason}") from None


def _tensors_only(values: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(values, Mapping) or not all(isinstance(v, Tensor) for v in values.values()):
        raise WeightsError(f"{path}: expected a dictionary of tensors")
    return {str(k): v for k, v in values.items()}


def _encoder_of_course_file(path: Path) -> dict[str, Tensor]:
    values = _read_pickle(path)
    if isinstance(values, Mapping) and isinstance(values.get("model"), Mapping):
        values = values["model"]  # the course saves {"model": state, "optim": ..., "args": ...}
    tensors = {k: t for k, t in _tensors_only(values, path).items() if not _BESIDE_THE_ENCODER.fullmatch(k)}
    if any(k.startswith("bert.") for k in tensors):  # a classifier around the encoder: its heads are not ours
        tensors = {k: t for k, t in tensors.items() if not _HEAD_OF_A_COURSE_MODEL.fullmatch(k)}
    return {from_stock_name(k): t for k, t in tensors.items()}


def infer_config(tensors: Mapping[str, Tensor], where: str, num_attention_heads: int | None = None) -> BertConfig:
    """The configuration that a course `.pt` file's shapes imply, heads 64 wide unless given. Raises WeightsError."""
    try:
        vocab, hidden = tensors["word_embedding.weight"].shape
        layers = 1 + max((int(k.split(".")[1]) for k in tensors if k.startswith("bert_layers.")), default=-1)
        return BertConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=num_attention_heads or max(1, hidden // 64),
            intermediate_size=tensors["bert_layers.0.interm_dense.weight"].shape[0] if layers else 4 * hidden,
            max_position_embeddings=tensors["pos_embedding.weight"].shape[0],
            type_vocab_size=tensors["tk_type_embedding.weight"].shape[0],
        )
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{where}: holds no BERT encoder ({error})") from None


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
