# SPDX-License-Identifier: Apache-2.0
"""Encoder weights from and to files: Hugging Face directories, hub names and course `.pt` files.

weight_files.py reads the files. A tensor that is missing or unexpected is an error that names it; a task's head is left out
with a warning.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import save
from torch import Tensor

from minbert_fast.common.errors import first_line
from minbert_fast.common.schema import ConfigError, check
from minbert_fast.common.storage import inside, write_bytes, write_text
from minbert_fast.model.config import FIXED, BertConfig
from minbert_fast.model.weight_files import WeightsError, check_names, read_tensors, some

CONFIG = "config.json"
# The files of a hub repository that are downloaded; this package writes the last one, and heads.safetensors.
_WANTED = [
    CONFIG, "*.safetensors", "pytorch_model*.bin", "*.index.json", "tokenizer*", "vocab.txt", "special_tokens_map.json",
    "modules.json", "*_Pooling/*", "*_Dense/*", "*sentence_bert_config.json", "config_sentence_transformers.json",
    "recipe.toml",
]  # fmt: skip

# Hugging Face name -> the course's name. `N` stands for the layer's number.
_LAYER = {
    "attention.self.query": "self_attention.query",
    "attention.self.key": "self_attention.key",
    "attention.self.value": "self_attention.value",
    "attention.output.dense": "attention_dense",
    "attention.output.LayerNorm": "attention_layer_norm",
    "intermediate.dense": "interm_dense",
    "output.dense": "out_dense",
    "output.LayerNorm": "out_layer_norm",
}
_NAMES = {
    "embeddings.word_embeddings": "word_embedding",
    "embeddings.position_embeddings": "pos_embedding",
    "embeddings.token_type_embeddings": "tk_type_embedding",
    "embeddings.LayerNorm": "embed_layer_norm",
    "pooler.dense": "pooler_dense",
    **{f"encoder.layer.N.{theirs}": f"bert_layers.N.{ours}" for theirs, ours in _LAYER.items()},
}
_NAMES_BACK = {ours: theirs for theirs, ours in _NAMES.items()}

# Tensors of published files that are no part of the encoder: index buffers, and the heads of BERT's own pre-training.
_BESIDE_THE_ENCODER = re.compile(r"(.+\.)?position_ids|cls\.(predictions|seq_relationship)\..+")
POSITIONS = "position_ids"  # a buffer of old and new models; files in the Hugging Face layout lack it
# Module names that wrappers add: DataParallel and its kin, torch.compile, activation checkpointing, FSDP.
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_WORDS = ("word_embedding.weight", "embeddings.word_embeddings.weight")  # every encoder has one of the two
_PUBLISHED = (128, 256, 512, 768, 1024)  # hidden sizes of Google's BERTs


def from_stock_name(key: str) -> str:
    """The course's name of a Hugging Face tensor (legacy `gamma`/`beta` included); other names pass through."""
    key = key.removeprefix("bert.")
    key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))
    return _renamed(key, _NAMES) or key


def to_stock_name(key: str) -> str:
    """The Hugging Face name of one of our parameters."""
    name = _renamed(key, _NAMES_BACK)
    assert name is not None, key
    return name


def _renamed(key: str, names: Mapping[str, str]) -> str | None:
    stem, _, kind = key.rpartition(".")
    number = re.search(r"\.\d+\.", stem)
    name = names.get(stem.replace(number[0], ".N.", 1) if number else stem)
    return name and f"{name.replace('.N.', number[0]) if number else name}.{kind}"


def resolve(name: str, *, subfolder: str = "", **hub: Any) -> Path:
    """The directory or file that `name` means: a path if one exists, else a model on the Hugging Face hub.

    `subfolder` is a folder inside it; `hub` are arguments of `huggingface_hub.snapshot_download`. Offline mode
    (HF_HUB_OFFLINE, `local_files_only`) is honoured. Raises WeightsError where nothing is found.
    """
    path = Path(name)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
            raise WeightsError(f"model {name!r}: no such file or directory")
        wanted = [f"{subfolder}/{file}" if subfolder else file for file in _WANTED]
        try:
            path = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, **hub))
        except Exception as error:  # the hub's own error classes differ between its major versions
            why = f"no such directory, and the hub does not give it ({first_line(error)})"
            raise WeightsError(f"model {name!r}: {why}") from None
    try:
        path = inside(path, subfolder)
    except ValueError as error:
        raise WeightsError(f"model {name!r}: subfolder {error}") from None
    if not path.exists():
        raise WeightsError(f"model {name!r}: no subfolder {subfolder!r}")
    check_place(path)
    return path


def check_place(path: Path) -> None:
    """Raises WeightsError, naming the likely right path, for a directory of a run's other output or of data files."""
    if not path.is_dir() or any((path / file).exists() for file in (CONFIG, "modules.json")):
        return
    for run, what in ((path, "the directory"), (path.parent, "part of the directory")):
        if (run / "best" / CONFIG).exists():
            raise WeightsError(f"{path}: {what} of a training run; its model is {run / 'best'}")
    if any(path.glob("*.[ct]sv")):
        raise WeightsError(f"{path}: holds data files, expected the directory of a model")


def read(path: Path, state: Mapping[str, Tensor] | None) -> tuple[BertConfig | None, dict[str, Tensor], list[str]]:
    """Configuration and `encoder_of` a model directory, a course `.pt` file or a `.safetensors` file.

    The configuration of a file comes from a `config.json` in the same folder, else it is None. The tensors of `state`
    replace the stored ones. Raises WeightsError or ConfigError.
    """
    config = (path.parent if path.is_file() else path) / CONFIG
    found = None if path.is_file() and not config.is_file() else BertConfig.from_file(config)
    return found, *(encoder_of(read_tensors(path), str(path)) if state is None else encoder_of(state, "state_dict"))


def encoder_of(stored: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's tensors under the course's names, and the names of the others: a head, or another module.

    The encoder may be part of a model (`bert.`, `model.bert.`, ...) and wrapped (`module.`, `_orig_mod.`) at any depth.
    Raises WeightsError where `stored` holds two encoders or anything but floating-point tensors.
    """
    plain = {".".join(part for part in key.split(".") if part not in _WRAPPERS): key for key in stored}
    if len(plain) < len(stored):
        twice = sorted(set(stored) - set(plain.values()))
        raise WeightsError(f"{where}: holds a tensor twice, wrapped and not: {some(twice)}")
    prefixes = {key.removesuffix(word) for key in plain for word in _WORDS if f".{key}".endswith(f".{word}")}
    if len(prefixes) > 1:
        raise WeightsError(f"{where}: holds {len(prefixes)} encoders: {some(sorted(prefixes))}; expected one")
    prefix = prefixes.pop() if prefixes else ""
    tensors, left = {}, []
    for key, original in plain.items():
        if _BESIDE_THE_ENCODER.fullmatch(key):
            continue
        if not key.startswith(prefix):
            left.append(original)
            continue
        tensor = stored[original]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise WeightsError(f"{where}: {original} is {kind}: expected a floating-point tensor")
        tensors[from_stock_name(key.removeprefix(prefix))] = tensor
    return tensors, left


def pretraining_heads(path: Path) -> dict[str, Tensor]:
    """The tensors of BERT's pre-training heads in a file, `cls.predictions.*` and `cls.seq_relationship.*`.

    `path` is a model directory or a course `.pt` file (which has none). Raises WeightsError.
    """
    if path.is_file():
        return {}
    return {from_stock_name(k): t for k, t in read_tensors(path).items() if k.startswith("cls.")}


def check_keys(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Raises WeightsError naming missing or unexpected tensors and wrong shapes."""
    check_names(wanted, found, where)
    for key, tensor in found.items():
        if tensor.shape != wanted[key].shape:
            expected = list(wanted[key].shape)
            raise WeightsError(f"{where}: {key} has shape {list(tensor.shape)}: expected {expected}")


def check_encoder(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> set[str]:
    """`check_keys` for an encoder, whose pooler may be absent: returns the names of the pooler's tensors if it is."""
    pooler = {key for key in wanted if key.startswith("pooler_dense.")}
    absent = pooler if pooler.isdisjoint(found) else set()
    check_keys({k: t for k, t in wanted.items() if k not in absent and k != POSITIONS}, found, where)
    return absent


def write(directory: Path, config: BertConfig, tensors: Mapping[str, Tensor]) -> None:
    """`config.json` and `model.safetensors` in the Hugging Face layout; each file replaced in one step."""
    stock: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        if name != POSITIONS:
            tensor = tensor.detach().contiguous().cpu()
            # safetensors refuses a tensor that has two names, as those of a layer that stands in two places.
            stock[to_stock_name(name)] = tensor.clone() if tensor.data_ptr() in places else tensor
            places.add(tensor.data_ptr())
    write_bytes(directory / "model.safetensors", save(stock, metadata={"format": "pt"}))
    write_text(directory / CONFIG, config.to_json())


# ---- Keywords of from_pretrained ---------------------------------------------------------------------------------------


def check_overrides(overrides: Mapping[str, Any], keywords: Iterable[str]) -> None:
    """Raises ConfigError for a name that is no field of the configuration, and for None; hints may name `keywords`."""
    fields = [*BertConfig.__dataclass_fields__, *FIXED]
    for name, value in overrides.items():
        if name not in fields:
            close = difflib.get_close_matches(name, [*fields, *keywords], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"a configuration has {', '.join(fields)}"
            raise ConfigError(f"from_pretrained: unknown keyword {name!r}; {hint}")
        check(
            value is not None or name in FIXED, f"from_pretrained: {name} = None: leave it out to keep the file's value"
        )


def chosen_dtype(
    dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None, tensors: Mapping[str, Tensor]
) -> torch.dtype:
    """The parameters' dtype: `dtype`, else its older name `torch_dtype`, else fp32; "auto" is that of `tensors`.

    Raises ConfigError for anything but fp32, fp64, bf16 and fp16.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ConfigError(f"dtype = {dtype} and torch_dtype = {torch_dtype}: expected one of the two")
    wanted = torch_dtype if dtype is None else dtype
    if wanted == "auto":
        wanted = next((t.dtype for t in tensors.values()), None)
    known = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
    name = "float32" if wanted is None else str(wanted).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"dtype = {wanted}: expected {', '.join(known)} or 'auto'")
    return known[name]


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a configuration that the shapes of an encoder's tensors imply."""
    vocab, hidden = tensors["word_embedding.weight"].shape
    layers = 1 + max((int(k.split(".")[1]) for k in tensors if k.startswith("bert_layers.")), default=-1)
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": tensors["bert_layers.0.interm_dense.weight"].shape[0] if layers else 4 * hidden,
        "max_position_embeddings": tensors["pos_embedding.weight"].shape[0],
        "type_vocab_size": tensors["tk_type_embedding.weight"].shape[0],
    }


def infer_config(tensors: Mapping[str, Tensor], where: str, heads_given: bool) -> BertConfig:
    """The configuration that a course `.pt` file's shapes imply, with heads 64 wide as in every BERT that Google published.

    Raises WeightsError for a file of another size, unless the heads are given and replace these.
    """
    try:
        sizes = sizes_of(tensors)
        width = sizes["hidden_size"]
        published = width in _PUBLISHED
        config = BertConfig(num_attention_heads=width // 64 if published else 1, **sizes)
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{where}: holds no BERT encoder ({error})") from None
    if not (published or heads_given):
        raise WeightsError(
            f"{where}: the shapes of an encoder {width} wide do not tell the number of its attention heads; put the "
            "config.json of its original weights into the same folder, or pass num_attention_heads"
        )
    return config
