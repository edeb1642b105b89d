# SPDX-License-Identifier: Apache-2.0
"""Tensors from files of weights, under the names that they have there: `.safetensors`, and `.bin` and `.pt` of torch.

No pickle is ever executed: what is no tensor is replaced, and the file's classes and functions are not looked up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minbert_fast.common.errors import first_line
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import inside, read_json, regular

# Functions that act on the machine: the error for a file that names one does not tell how to trust the file.
_RUNS = re.compile(
    r"(ctypes|importlib|nt|os|posix|runpy|shutil|socket|subprocess|sys)\..+|builtins\.(__import__|compile|eval|exec|open)"
)
_POINTER = b"version https://git-lfs"  # how a file begins that `git clone` left without its content
_STATES = ("model_state_dict", "state_dict", "model")  # the keys under which training scripts save their weights


class WeightsError(ConfigError):
    """A weights file is missing, damaged, or holds other tensors than the model's; one line for the user."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or a model directory, under the names they have there. Raises WeightsError."""
    if path.is_file():
        with suppress(OSError), regular(path).open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise WeightsError(
                    f"{path}: a pointer of Git LFS, not the weights; `git lfs pull` in its folder fetches them"
                )
        return read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return read_tensors(path / name)
        if (path / f"{name}.index.json").is_file():
            return _read_shards(path / f"{name}.index.json")
    raise WeightsError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, whole or in shards")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an `*.index.json` lists. Raises WeightsError or ConfigError."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f"{index}: expected a weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        try:
            shard = regular(inside(index.parent, name))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{index}: shard {name!r} cannot be read ({first_line(error)})") from None
        tensors |= read_tensors(shard)
    check_names(places, tensors, str(index))
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file; raises WeightsError when it cannot be read or is damaged."""
    try:
        return load_file(regular(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({first_line(error)})") from None


def check_names(wanted: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raises WeightsError naming missing or unexpected tensors."""
    wanted, found = dict.fromkeys(wanted), dict.fromkeys(found)
    missing, unexpected = [k for k in wanted if k not in found], [k for k in found if k not in wanted]
    if missing or unexpected:
        parts = [f"{kind} {some(keys)}" for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise WeightsError(f"{where}: {'; '.join(parts)}")


# ---- Pickles, without running them -------------------------------------------------------------------------------------


class _Foreign:
    """Replaces an object that is no tensor: remembers the name of its class, takes any argument, runs nothing."""

    name = ""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The weights in a file of `torch.save`: a state dict, alone or under one of the usual keys.

    Every other object in the file (arguments, paths, NumPy scalars, random states) becomes a `_Foreign`; no class or
    function that the file names is looked up. Raises WeightsError.
    """
    names: list[str] = []
    try:
        regular(path)
        with suppress(Exception):  # a format before torch 1.6, or no file of torch's: the load below says which
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = [(type("Foreign", (_Foreign,), {"name": name}), name) for name in names]
        with torch.serialization.safe_globals(foreign):  # type: ignore[arg-type]  # (stand-in, name) pairs
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of many classes
        found = re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error))
        if names or found:
            raise WeightsError(_conversion(path, names or [str(found and found[1])], "['model']")) from None
        # torch's own words advise to load it with weights_only=False, which runs what the file says.
        reason = "" if "weights_only" in str(error) else f" ({first_line(error)[:200]})"
        raise WeightsError(f"{path}: no PyTorch file{reason}") from None
    place = ""
    for _ in _STATES:  # one under another, at most
        key = next((k for k in _STATES if isinstance(values, Mapping) and k in values), None)
        if key is None or not isinstance(values[key], Mapping | _Foreign):
            break
        values, place = values[key], f"{place}['{key}']"
    if isinstance(values, _Foreign):
        raise WeightsError(_conversion(path, [values.name], f"{place}.state_dict()"))
    tensors = {str(k): v for k, v in values.items() if isinstance(v, Tensor)} if isinstance(values, Mapping) else {}
    if not tensors:
        raise WeightsError(f"{path}: holds no dictionary of tensors, alone or under {', '.join(sorted(_STATES))}")
    return tensors


def _conversion(path: Path, names: list[str], place: str) -> str:
    """The message for a file whose weights are, at `place`, inside objects of the classes or functions `names`."""
    running = list(filter(_RUNS.fullmatch, names))
    if running:
        return f"{path}: refers to {some(running)}, which would run commands; it is no file of weights"
    written = path.with_name(f"{path.stem}-tensors.pt")
    line = f"import torch; torch.save(torch.load('{path}', weights_only=False){place}, '{written}')"
    what = f"its weights lie inside an object of class {some(sorted(names))}, whose code loading would run"
    return f'{path}: {what}; if you trust it, convert it in the project that wrote it: python -c "{line}"'


def some(names: Collection[str]) -> str:
    """The first four names, and how many there are beyond."""
    keys = list(names)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
