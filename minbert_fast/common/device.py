# SPDX-License-Identifier: Apache-2.0
"""Chooses a command's device and precision, sends tensors to a device, and measures the memory that a command used."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minbert_fast.common.schema import ConfigError, check

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
OLDEST_CAPABILITY = (7, 5)  # the oldest compute capability that kernels are compiled for: Turing, the T4
BF16_CAPABILITY = (8, 0)  # the oldest compute capability that multiplies in bf16


class _WithoutSlowImports(TorchFunctionMode):
    """Spares imports of a second or more: on "meta" torch needs its compiler for `normal_`, and sympy for `arange`."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__name__", "") == "normal_":
            return args[0] if args else named["tensor"]
        if func is torch.arange and named.get("device") is None:
            return torch.empty_like(torch.arange(*args, **{**named, "device": "cpu"}), device="meta")
        return func(*args, **named)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Modules made in this block have shapes and no numbers: on "meta", without memory or random draws."""
    with torch.device("meta"), _WithoutSlowImports():
        yield


def choose_device(name: str) -> torch.device:
    """The device called `auto` (a supported GPU, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises ConfigError if the device does not exist or the GPU is too old.
    """
    if name == "auto":
        usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= OLDEST_CAPABILITY
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    where = f"device {name!r}"
    check(device.type in ("cpu", "cuda"), f"{where}: expected auto, cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        check(torch.cuda.is_available(), f"{where}: PyTorch {torch.__version__} finds no CUDA device")
        check((device.index or 0) < count, f"{where}: there are {count} CUDA devices")
        if (found := torch.cuda.get_device_capability(device)) < OLDEST_CAPABILITY:
            oldest = _version(OLDEST_CAPABILITY)
            raise ConfigError(f"{where}: compute capability {_version(found)}, expected {oldest} (T4) or newer")
    return device


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """The precision of matrix products. `auto` is bf16 if the device multiplies it natively, else fp32.

    Raises ConfigError for another name, and for bf16 on a GPU without bf16 products. A CPU without them emulates them.
    """
    check(name in ("auto", *DTYPES), f"precision {name!r}: expected auto, {' or '.join(DTYPES)}")
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        native = found >= BF16_CAPABILITY
        without = f"precision 'bf16': expected fp32 or auto, compute capability {_version(found)} has no bf16"
        check(native or name != "bf16", without)
    else:
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if name != "auto":
        return name
    return "bf16" if native else "fp32"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. The host does not wait for the work that a GPU has queued, as it does in a plain copy.

    The way leads through page-locked memory. PyTorch keeps it until the copy is over.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
