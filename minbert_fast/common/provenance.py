# SPDX-License-Identifier: Apache-2.0
"""Facts that identify a run: commit, machine, library versions, and a digest of the weights it starts from."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minbert_fast.common.storage import raw
from minbert_fast.common.version import __version__


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Device, threads and library versions: together with the recipe they determine a run's results to the last bit."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "minbert_fast": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # the package metadata may lack the build (+cu130)
            **{name: package_version(name) for name in ("numpy", "tokenizers", "safetensors")},
        },
    }


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()


def cores() -> int | None:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def package_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def current_commit(abbreviated: bool = False) -> str | None:
    """The commit of the checkout that this package runs from; None outside a checkout or without git.

    `abbreviated` gives 12 digits, and "-dirty" after them if tracked files have been changed.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        command = ["git", "-C", str(root), *(describe if abbreviated else ["rev-parse", "HEAD"])]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
