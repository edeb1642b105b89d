# SPDX-License-Identifier: Apache-2.0
"""Prints the facts that a bug report needs: versions, the machine, the build, and what it can use here.

python -m minbert_fast.env            one fact per line
python -m minbert_fast.env --json     one JSON object
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from minbert_fast.common import onednn_cache
from minbert_fast.common.cli import Parser, run
from minbert_fast.common.device import choose_device, choose_precision
from minbert_fast.common.provenance import cores, current_commit, package_version, processor
from minbert_fast.common.version import __version__
from minbert_fast.ops import native
from minbert_fast.ops.backend import triton_available

PACKAGES = (
    "torch", "triton", "numpy", "tokenizers", "safetensors", "huggingface_hub",
    "transformers", "sentence-transformers", "torchjd", "tensorboard", "wandb",
)  # fmt: skip
VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "HF_HUB_OFFLINE"),
    *onednn_cache.VARIABLES,
)


def parser() -> argparse.ArgumentParser:
    flags = Parser("env", __doc__ or "")
    flags.add_argument("--json", action="store_true", help="print one JSON object")
    return flags


def collect_facts() -> dict[str, Any]:
    """All facts by name."""
    device = choose_device("auto")
    found: dict[str, Any] = {
        "minbert_fast": __version__,
        "commit": current_commit(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instruction set": native.instruction_set(),
        "extension": "with CUDA kernels" if native.HAS_CUDA else "CPU only",
        "triton usable": triton_available(),
        "CUDA of torch": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision (auto)": choose_precision("auto", device),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"compute capability": f"{major}.{minor}", "devices": torch.cuda.device_count()}
        found["device memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB"
    found |= {name: package_version(name) for name in PACKAGES}
    found["torch"] = str(torch.__version__)  # names the build (+cu130), which the package's metadata may lack
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    found = collect_facts()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {'-' if value is None else value}")


if __name__ == "__main__":
    sys.exit(run(main))
