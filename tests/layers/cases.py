# SPDX-License-Identifier: Apache-2.0
"""The native layer ops on small inputs, forward and backward, beside their references with gradients apart by task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minbert_fast.ops import reference
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.native import layers
from tests.tolerance import Expected
from tests.tolerance import reference as run_reference

EPS, SITE = 1e-12, 5
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])
WORDS, POSITIONS, TYPES = 11, 9, 2


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def task_buffers(tasks: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Views of one J [T, P] full of NaN, neighbours in it with a gap of one element between them."""
    sizes = [1 + torch.Size(shape).numel() for shape in shapes.values()]
    J = torch.full((tasks, sum(sizes)), torch.nan, dtype=dtype)
    parts = J.split(sizes, 1)
    return {n: part[:, 1:].unflatten(1, shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}


def expected_by_task(
    formula: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    parameters: Sequence[str],
    dy: Tensor,
    bounds: Sequence[int],
    **constants: Any,
) -> Expected:
    """The output, the activations' gradients (zero behind the last task) and each parameter's gradient by task."""
    runs = []
    for begin, end in itertools.pairwise(bounds):
        part = torch.zeros_like(dy)
        part[begin:end] = dy[begin:end]
        runs.append(run_reference(formula, inputs, [part], **constants))
    names = runs[0].names

    def joined(which: Callable[[Expected], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        columns = list(zip(*map(which, runs), strict=True))
        stacked = {name for name in names if name[1:] in parameters}
        return tuple(
            torch.stack(column) if name in stacked else column[0] if name == "output 0" else torch.stack(column).sum(0)
            for name, column in zip(names, columns, strict=True)
        )

    rows = {f"d{name}": len(dy) for name in parameters}
    return Expected(names, joined(lambda r: r.exact), joined(lambda r: r.plain), rows)


def draw(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def add_norm(
    rows: int, width: int, bounds: Sequence[int], p: float, dtype: torch.dtype
) -> tuple[list[Tensor], Expected]:
    """Results (y, dx, dbias, dresidual, dgamma, dbeta) of the native op, and what they should be."""
    new = draw(rows + width, dtype)
    inputs = {
        "x": new(rows, width), "bias": new(width), "residual": new(rows, width), "gamma": new(width), "beta": new(width)
    }  # fmt: skip
    dy = new(rows, width)
    keep = keep_mask(SEED, SITE, torch.arange(rows), width, p)
    parameters = ("bias", "gamma", "beta")
    expected = expected_by_task(
        lambda keep, **t: reference.add_norm(**t, eps=EPS, keep=keep), inputs, parameters, dy, bounds, keep=keep
    )
    x, bias, residual, gamma, beta = inputs.values()
    y, mean, rstd = layers.add_norm_forward(x, bias, residual, gamma, beta, EPS, p, SEED, SITE)
    out = task_buffers(len(bounds) - 1, {"dgamma": (width,), "dbeta": (width,), "dbias": (width,)}, dtype)
    dx, dresidual = layers.add_norm_backward(
        dy, x, bias, residual, gamma, mean, rstd, int32(*bounds), p, SEED, SITE, **out
    )
    return [y, dx, out["dbias"], dresidual, out["dgamma"], out["dbeta"]], expected


def bias_gelu(rows: int, width: int, bounds: Sequence[int], dtype: torch.dtype) -> tuple[list[Tensor], Expected]:
    """Results (y, dx, dbias)."""
    new = draw(rows + width, dtype)
    inputs = {"x": 2 * new(rows, width), "bias": new(width)}
    dy = new(rows, width)
    expected = expected_by_task(lambda **t: reference.bias_gelu(**t), inputs, ("bias",), dy, bounds)
    y = layers.bias_gelu_forward(*inputs.values())
    out = task_buffers(len(bounds) - 1, {"dbias": (width,)}, dtype)
    dx = layers.bias_gelu_backward(dy, *inputs.values(), int32(*bounds), **out)
    return [y, dx, out["dbias"]], expected


def embedding(
    rows: int, width: int, bounds: Sequence[int], p: float, dtype: torch.dtype
) -> tuple[list[Tensor], Expected]:
    """Results (y, dword, dposition, dtype, dgamma, dbeta); dword spread out over the whole table."""
    new = draw(rows + width, dtype)
    generator = torch.Generator().manual_seed(rows)
    indices = [torch.randint(n, (rows,), generator=generator, dtype=torch.int32) for n in (WORDS, POSITIONS, TYPES)]
    inputs = {"word": new(WORDS, width), "position": new(POSITIONS, width), "type_": new(TYPES, width)}
    inputs |= {"gamma": new(width), "beta": new(width)}
    dy = new(rows, width)
    keep = keep_mask(SEED, SITE, torch.arange(rows), width, p)
    expected = expected_by_task(
        lambda keep, **t: reference.embedding(*indices, **t, eps=EPS, keep=keep),
        inputs, tuple(inputs), dy, bounds, keep=keep,
    )  # fmt: skip
    tables, gamma, beta = list(inputs.values())[:3], inputs["gamma"], inputs["beta"]
    y, mean, rstd = layers.embedding_forward(*indices, *tables, gamma, beta, EPS, p, SEED, SITE)
    used = bounds[-1]  # as the packed batch has it: words of the rows that belong to tasks
    order = torch.argsort(indices[0][:used], stable=True).int()
    words, counts = torch.unique(indices[0][:used], return_counts=True)
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    shapes = {
        "dgamma": (width,), "dbeta": (width,), "dword": (len(words), width), "dposition": (POSITIONS, width),
        "dtype": (TYPES, width),
    }  # fmt: skip
    out = task_buffers(len(bounds) - 1, shapes, dtype)
    order = torch.cat([order, torch.zeros(rows - used, dtype=torch.int32)])
    layers.embedding_backward(
        dy, *indices, *tables, gamma, mean, rstd, int32(*bounds), order, offsets, p, SEED, SITE, **out
    )
    dword = torch.zeros(len(bounds) - 1, WORDS, width, dtype=dtype)
    dword[:, words.long()] = out["dword"]
    return [y, dword, out["dposition"], out["dtype"], out["dgamma"], out["dbeta"]], expected


def attention_keep(lengths: Sequence[int], heads: int, p: float) -> list[Tensor]:
    """Each sentence's dropout factors [h, s, s]."""
    ends = list(itertools.accumulate(lengths))
    return [
        torch.stack([keep_mask(SEED, SITE, torch.arange(end - n, end), n, p, head) for head in range(heads)])
        for n, end in zip(lengths, ends, strict=True)
    ]


def attention(
    lengths: Sequence[int], padding: int, heads: int, head_dim: int, p: float, dtype: torch.dtype
) -> tuple[list[Tensor], Expected]:
    """Results (out, lse, dqkv)."""
    rows = sum(lengths) + padding
    new = draw(rows + head_dim, dtype)
    offsets = [0, *itertools.accumulate(lengths)]
    inputs, dout = {"qkv": new(rows, 3, heads, head_dim)}, new(rows, heads * head_dim)
    scale = head_dim**-0.5
    expected = run_reference(
        lambda qkv, keep: reference.attention(qkv, offsets, scale, keep), inputs, [dout, None],
        keep=attention_keep(lengths, heads, p),
    )  # fmt: skip
    cu_seqlens = int32(*offsets)
    out, lse = layers.attention_forward(inputs["qkv"], cu_seqlens, scale, p, SEED, SITE)
    dqkv = layers.attention_backward(dout, inputs["qkv"], lse, cu_seqlens, scale, p, SEED, SITE)
    return [out, lse.to(dtype), dqkv], expected
