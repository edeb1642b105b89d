# SPDX-License-Identifier: Apache-2.0
"""Single ops of the encoder, a file each, at the sizes of MiniLM-L6 and BERT-base. On a GPU with cold and warm L2."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import device_time, harness
from benchmarks.harness import Ceilings, Row

#: Each is a module of this folder with `cases(device) -> Iterator[Case]`.
OPS = ("add_norm", "bias_gelu", "embedding", "segment_gradients", "adamw")


def run(device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """Every case of every op."""
    for op in OPS:
        for case in importlib.import_module(f"benchmarks.kernels.{op}").cases(device):
            timers: dict[str, harness.Timer] = {"": harness.measure}
            if device.type == "cuda":
                timers = {f"{how} L2": partial(device_time.measure, cold=how == "cold") for how in ("cold", "warm")}
            for how, timer in timers.items():
                name = ", ".join(filter(None, (case.name, how)))
                yield from harness.case(
                    "kernels",
                    name,
                    case.candidates,
                    device,
                    ceilings,
                    baselines=case.baselines,
                    product=case.product,
                    timer=timer,
                )
