# SPDX-License-Identifier: Apache-2.0
"""Which device and which precision a command runs with, and the memory that it took."""

from __future__ import annotations

import resource
import sys
from typing import Literal

import torch

from minbert_fast.common.schema import ConfigError

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
OLDEST = (7, 5)  # compute capability that kernels are compiled for: Turing, the T4
BF16 = (8, 0)  # from which a GPU multiplies in bf16


def choose_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one that serves), `cpu`, `cuda` or `cuda:N`.

    Raises ConfigError for what is not there, and for a GPU that is too old.
    """
    if name == "auto":
        usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= OLDEST
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: PyTorch {torch.__version__} finds no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < OLDEST:
        raise ConfigError(
            f"device {name!r}: compute capability {_version(found)}, expected {_version(OLDEST)} (T4) or newer"
        )
    return device


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """The precision of matrix products: `auto` is bf16 where the device multiplies it natively, else fp32.

    Raises ConfigError for bf16 on a GPU that lacks it (a CPU without the instructions emulates them).
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        native = found >= BF16
        if name == "bf16" and not native:
            raise ConfigError(
                f"precision 'bf16': expected fp32 or auto, compute capability {_version(found)} has no bf16"
            )
    else:
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if name != "auto":
        return name
    return "bf16" if native else "fp32"


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, bytes: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
