# SPDX-License-Identifier: Apache-2.0
"""Single ops of the encoder, a file each, at the sizes of MiniLM-L6 and BERT-base. On a GPU with cold and warm L2."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from benchmarks import device_time, harness
from benchmarks.harness import Ceilings, Row
from benchmarks.kernels.case import Case

#: Each is a module of this folder with `cases(device) -> Iterator[Case]`. The one with most cases comes last.
OPS = ("linear", "product", "gram", "combine", "adamw", "add_norm", "bias_gelu", "embedding", "attention")


def run(device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """Every case of every op."""
    timers: dict[str, harness.Timer] = {"": harness.measure}
    stream: AbstractContextManager[object] = nullcontext()
    if device.type == "cuda":
        timers = {f"{how} L2": partial(device_time.measure, cold=how == "cold") for how in ("cold", "warm")}
        # Cases are made where they are captured: a backward runs on its forward's stream.
        stream = torch.cuda.stream(torch.cuda.Stream(device))
    with stream:
        for case in itertools.chain.from_iterable(_cases(op, device) for op in OPS):
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


def _cases(op: str, device: torch.device) -> Iterator[Case]:
    cases: Iterator[Case] = importlib.import_module(f"benchmarks.kernels.{op}").cases(device)
    return cases
