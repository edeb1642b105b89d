# SPDX-License-Identifier: Apache-2.0
"""The ops of minbert_fast.ops on small inputs, each with its reference, for tests that treat them alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.model.packing import PackedBatch, pack
from minbert_fast.ops.add_norm import reference as add_norm
from minbert_fast.ops.bias_gelu import reference as bias_gelu
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.embedding import reference as embedding

WIDTH, INNER, EPS, SITE = 24, 20, 1e-12, 3
LENGTHS = [[4, 2], [], [3, 5, 1]]  # sentences of three tasks, the second without any
PADDING = 2
WORDS, POSITIONS, TYPES = 9, 7, 2


@dataclass(frozen=True)
class Case:
    """One op: its differentiable inputs, how to call it on them, and where a sink's views belong."""

    inputs: dict[str, Tensor]  # activations and parameters, in the op's own order
    activations: tuple[str, ...]
    call: Callable[..., Tensor]  # (*inputs, into=None)
    formula: Callable[..., Tensor]  # the reference on the same inputs
    sink: Callable[..., Any]  # (bounds, **views by parameter) -> the op's sink
    views: dict[str, tuple[int, ...]]  # shape of each parameter's gradient in a sink, one task

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(n for n in self.inputs if n not in self.activations)


def packed(device: torch.device | str = "cpu") -> PackedBatch:
    """The batch whose rows the cases are on: 15 tokens, 2 rows of padding."""
    generator = torch.Generator().manual_seed(5)
    sentences = [[torch.randint(WORDS, (n,), generator=generator).numpy() for n in task] for task in LENGTHS]
    types = [[torch.randint(TYPES, (n,), generator=generator).numpy() for n in task] for task in LENGTHS]
    return pack(sentences, types, token_capacity=sum(map(sum, LENGTHS)) + PADDING).to(torch.device(device))


def make(name: str, p: float = 0.0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Case:
    """The case of op `name` with dropout p, inputs of `dtype`."""
    batch, seed = packed(device), torch.tensor([77], device=device)
    rows = len(batch.tokens)
    generator = torch.Generator().manual_seed(len(name))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    keep = keep_mask(seed, SITE, torch.arange(rows, device=device), WIDTH, p).to(dtype)
    if name == "add_norm":
        return Case(
            {n: draw(*s) for n, s in zip(
                ("x", "bias", "residual", "gamma", "beta"),
                ((rows, WIDTH), (WIDTH,), (rows, WIDTH), (WIDTH,), (WIDTH,)), strict=True,
            )},
            ("x", "residual"),
            lambda *t, into=None: ops.add_norm(*t, EPS, p, seed, SITE, into),
            lambda *t: add_norm(*t, EPS, keep),
            lambda bounds, **g: ops.AddNormSink(bounds, g.get("gamma"), g.get("beta"), g.get("bias")),
            dict.fromkeys(("bias", "gamma", "beta"), (WIDTH,)),
        )  # fmt: skip
    if name == "bias_gelu":
        return Case(
            {"x": draw(rows, WIDTH), "bias": draw(WIDTH)},
            ("x",),
            lambda *t, into=None: ops.bias_gelu(*t, into=into),
            bias_gelu,
            lambda bounds, **g: ops.BiasGeluSink(bounds, g.get("bias")),
            {"bias": (WIDTH,)},
        )
    if name == "linear":
        return Case(
            {"x": draw(rows, INNER), "weight": draw(WIDTH, INNER), "bias": draw(WIDTH)},
            ("x",),
            lambda *t, into=None: ops.linear(*t, into=into),
            torch.nn.functional.linear,
            lambda bounds, **g: ops.LinearSink(bounds, g.get("weight"), g.get("bias")),
            {"weight": (WIDTH, INNER), "bias": (WIDTH,)},
        )
    assert name == "embedding"
    indices = (batch.tokens, batch.positions, batch.types)
    sizes = {"word": WORDS, "position": POSITIONS, "type_": TYPES}
    tables = {n: draw(size, WIDTH) for n, size in sizes.items()} | {n: draw(WIDTH) for n in ("gamma", "beta")}
    return Case(
        tables,
        (),
        lambda *t, into=None: ops.embedding(*indices, *t, EPS, p, seed, SITE, into),
        lambda *t: embedding(*indices, *t, EPS, keep),
        lambda bounds, **g: ops.EmbeddingSink(
            bounds, batch.cu_seqlens, batch.word_order, batch.word_offsets,
            *(g.get(n) for n in ("word", "position", "type_", "gamma", "beta")),
        ),
        {n: tuple(t.shape) for n, t in tables.items()} | {"word": (len(batch.tokens), WIDTH)},
    )  # fmt: skip


NAMES = ("add_norm", "bias_gelu", "embedding", "linear")
WITH_DROPOUT = ("add_norm", "embedding")
