# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers directories: how they say that tokens become one vector, read and written.

`modules.json` lists the encoder, a pooling, perhaps a dense layer (BERT's pooler) and perhaps the scaling to length 1, each
with its folder (sbert.net, "Creating Custom Models"). Versions 3.4 to 6.2 read the files written here, which have the module
names and `pooling_mode_*` keys of the oldest version.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import inside, read_json, write_bytes, write_json
from minbert_fast.model.config import Pooling
from minbert_fast.model.weight_files import read_safetensors
from minbert_fast.ops.pooling import Mode

MODULES = "modules.json"

# The keys of a pooling's config.json: those of versions before 6, each a flag; newer ones have one `pooling_mode`.
_FLAGS: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}
_TANH = "torch.nn.modules.activation.Tanh"


@dataclass(frozen=True)
class SentenceModules:
    """The settings of a sentence-transformers directory that are not in the encoder's files."""

    encoder: Path  # the folder of the encoder and its tokenizer
    pooling: Pooling
    normalize: bool = False
    max_length: int | None = None  # tokens; None: as the tokenizer says
    prompt: str = ""  # put before every text
    pooler: dict[str, Tensor] | None = None  # weight and bias of the dense layer behind the first token
    truncate_dim: int | None = None  # the first so many numbers of a vector are kept; None: all
    lowercase: bool = False  # texts are lower-cased before a tokenizer that keeps case sees them


def read(directory: Path) -> SentenceModules | None:
    """The settings of a directory, or None if it has no `modules.json`.

    Raises ConfigError naming the file for damage, and for modules or poolings that have no counterpart here.
    """
    path = directory / MODULES
    if not path.is_file():
        return None
    listed = read_json(path, list)
    try:
        modules = [(str(entry["type"]).rpartition(".")[2], inside(directory, entry["path"])) for entry in listed]
    except (TypeError, KeyError):
        raise ConfigError(f"{path}: expected a list of modules with type and path") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    kinds = [kind for kind, _ in modules if kind != "Dropout"]  # does nothing outside training
    folders = dict(modules)
    if kinds not in (_chain(dense, scaled) for dense in (False, True) for scaled in (False, True)):
        raise ConfigError(f"{path}: modules {', '.join(kinds)}: expected Transformer, Pooling, perhaps Normalize")
    mode = _pooling(folders["Pooling"] / "config.json")
    pooler = _pooler(folders["Dense"], mode) if "Dense" in folders else None
    pooling: Pooling = mode if pooler is None else "pooler"
    settings = folders["Transformer"] / "sentence_bert_config.json"
    prompts = directory / "config_sentence_transformers.json"
    length, lowercase = _option(settings, "max_seq_length", int, 2), _option(settings, "do_lower_case", bool, 0)
    width = _option(prompts, "truncate_dim", int, 1)
    return SentenceModules(
        folders["Transformer"], pooling, "Normalize" in kinds, length, _prompt(prompts), pooler, width, bool(lowercase)
    )


def write(directory: Path, modules: SentenceModules, width: int) -> None:
    """Writes modules.json and the files it names into the encoder's `directory`; vectors are `width` wide."""
    names = _chain(modules.pooler is not None, modules.normalize)
    folders = ["", *(f"{number}_{name}" for number, name in enumerate(names[1:], start=1))]
    for folder in folders:
        (directory / folder).mkdir(parents=True, exist_ok=True)
    mode = "cls" if modules.pooling == "pooler" else modules.pooling
    flags: dict[str, Any] = {key: flag == mode for key, flag in _FLAGS.items()}
    flags |= {"word_embedding_dimension": width, "pooling_mode_mean_sqrt_len_tokens": False}
    contents: dict[str, Any] = {
        MODULES: [
            {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{name}"}
            for index, (name, folder) in enumerate(zip(names, folders, strict=True))
        ],
        "sentence_bert_config.json": {"max_seq_length": modules.max_length, "do_lower_case": modules.lowercase},
        f"{folders[1]}/config.json": flags,
    }
    prompts = {"prompts": {"default": modules.prompt}, "default_prompt_name": "default"} if modules.prompt else {}
    width_kept = {} if modules.truncate_dim is None else {"truncate_dim": modules.truncate_dim}
    if prompts or width_kept:
        contents["config_sentence_transformers.json"] = prompts | width_kept
    if modules.pooler is not None:
        contents[f"{folders[2]}/config.json"] = {
            "in_features": width, "out_features": width, "bias": True, "activation_function": _TANH,
        }  # fmt: skip
        tensors = {f"linear.{name}": tensor.detach().contiguous().cpu() for name, tensor in modules.pooler.items()}
        write_bytes(directory / folders[2] / "model.safetensors", save(tensors))
    if modules.normalize:
        contents[f"{folders[-1]}/config.json"] = {}  # a folder without a file would get lost on the hub
    for name, content in contents.items():
        write_json(directory / name, content)


def _chain(dense: bool, scaled: bool) -> list[str]:
    return ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if scaled else [])]


def _pooling(path: Path) -> Mode:
    config = read_json(path)
    mode = config.get("pooling_mode")
    if mode is None:
        chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        mode = _FLAGS.get(chosen[0], chosen[0]) if len(chosen) == 1 else chosen or "mean"
    if mode not in ("mean", "cls", "max"):
        raise ConfigError(f"{path}: pooling {mode!r}: expected mean, cls or max")
    if config.get("include_prompt") is False:
        raise ConfigError(f"{path}: include_prompt = false is not supported")
    return mode  # type: ignore[no-any-return]  # one of the three, as just seen


def _pooler(folder: Path, pooling: Mode) -> dict[str, Tensor]:
    """The weights of a dense layer that is a BERT pooler: tanh behind the first token."""
    config = read_json(folder / "config.json")
    if pooling != "cls" or config.get("activation_function") != _TANH or config.get("use_residual"):
        raise ConfigError(f"{folder}: a dense layer other than BERT's pooler (first token, tanh) is not supported")
    found = read_safetensors(folder / "model.safetensors")
    if set(found) != {"linear.weight", "linear.bias"}:
        raise ConfigError(f"{folder / 'model.safetensors'}: expected linear.weight and linear.bias")
    return {name.removeprefix("linear."): tensor.float() for name, tensor in found.items()}


def _prompt(path: Path) -> str:
    config = read_json(path) if path.is_file() else {}
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise ConfigError(f"{path}: no prompt {name!r} among the prompts")
    return str(prompts[name])


def _option(path: Path, key: str, kind: type[int], least: int) -> Any:
    """A value of a file that may be absent, None where it says nothing. Raises ConfigError for one below `least`."""
    value: Any = read_json(path).get(key) if path.is_file() else None
    if value is not None and (type(value) is not kind or int(value) < least):
        expected = "true or false" if kind is bool else f"a whole number from {least}"
        raise ConfigError(f"{path}: {key} = {value!r}: expected {expected}")
    return value
