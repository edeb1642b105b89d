# SPDX-License-Identifier: Apache-2.0
"""Where a run takes place, from which code, and a fingerprint of the weights it starts from."""

from __future__ import annotations

import hashlib
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
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """Where a run takes place: what its last bits depend on beside the recipe."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "minbert_fast": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # with the build (+cu130), which the package's metadata may lack
            **{name: metadata.version(name) for name in ("numpy", "tokenizers", "safetensors")},
        },
    }


def commit() -> str | None:
    """The commit of the checkout that this package runs from, if it is one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
