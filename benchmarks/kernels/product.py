# SPDX-License-Identifier: Apache-2.0
"""Matrix products of the encoder: cuBLAS's, which the step uses, against Triton's with TMA; and one with GELU behind it.

They answer whether cuBLAS is still the right choice for 2,816 rows, where a product has few tiles for each multiprocessor.
FLOPs: 2 N O I. The fused product writes u = x W^T and GELU(u + bias), and saves reading u again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.harness import Candidate
from benchmarks.kernels.case import MATRICES, Case, close, draw, label
from minbert_fast.kernels.arguments import cdiv, is_hopper_or_newer, multiprocessors
from minbert_fast.ops.bias_gelu import bias_gelu_forward

ROWS = 2816
#: Columns of a tile, stages, programs a multiprocessor (0: a program a tile).
SETTINGS = {
    "Triton, 128 x 128": (128, 4, 0),
    "Triton, 128 x 128, persistent": (128, 5, 1),
    "Triton, 128 x 256, persistent": (256, 3, 1),
}
TALL, DEEP, GROUP = 128, 64, 8  # rows of a tile, inputs at a time, tiles along the rows that run together


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, w, y, u, bias_ptr,  # descriptors of x [N, I], w [O, I] (transposed: [I, O]), y and u [N, O]; bias [O]
    rows, outputs, inputs,
    TRANSPOSED: tl.constexpr, GELU: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tl.assume(inputs > 0)  # or ptxas waits for each product before the next one
    tiles_down, tiles_across = tl.cdiv(rows, TALL), tl.cdiv(outputs, WIDE)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * tiles_across) * GROUP
        members = tl.minimum(tiles_down - first, GROUP)
        row = (first + tile % (GROUP * tiles_across) % members) * TALL
        column = tile % (GROUP * tiles_across) // members * WIDE
        total = tl.zeros((TALL, WIDE), tl.float32)
        for step in range(tl.cdiv(inputs, DEEP)):
            a = x.load([row, step * DEEP])
            b = w.load([step * DEEP, column]) if TRANSPOSED else tl.trans(w.load([column, step * DEEP]))
            total = tl.dot(a, b, total)
        if GELU:
            raw = total.to(y.dtype)
            u.store([row, column], raw)
            columns = column + tl.arange(0, WIDE)
            bias = tl.load(bias_ptr + columns, mask=columns < outputs, other=0.0).to(tl.float32)
            z = raw.to(tl.float32) + bias[None, :]
            y.store([row, column], (0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))).to(y.dtype))
        else:
            y.store([row, column], total.to(y.dtype))


def product(
    setting: str, x: Tensor, w: Tensor, y: Tensor, transposed: bool, bias: Tensor | None = None, u: Tensor | None = None
) -> None:
    """y = x w^T, or x w if `transposed`; with `bias` u = x w^T and y = GELU(u + bias). All bf16 and contiguous."""
    wide, stages, resident = SETTINGS[setting]
    (rows, inputs), outputs = x.shape, y.shape[1]
    tiles = cdiv(rows, TALL) * cdiv(outputs, wide)
    weight = [DEEP, wide] if transposed else [wide, DEEP]
    blocks = [[TALL, DEEP], weight, [TALL, wide], [TALL, wide]]
    tensors = (x, w, y, y if u is None else u)
    _product[(min(tiles, resident * multiprocessors(x.device)) if resident else tiles,)](
        *(TensorDescriptor.from_tensor(t, block) for t, block in zip(tensors, blocks, strict=True)),
        y if bias is None else bias, rows, outputs, inputs, TRANSPOSED=transposed, GELU=bias is not None,
        TALL=TALL, WIDE=wide, DEEP=DEEP, GROUP=GROUP, num_warps=8, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


def cases(device: torch.device) -> Iterator[Case]:
    if device.type == "cuda" and is_hopper_or_newer(device):  # older chips have no TMA
        for outputs, inputs in MATRICES:
            yield _case(outputs, inputs, device, transposed=False)
            yield _case(outputs, inputs, device, transposed=True)
            if outputs == 4 * inputs:
                yield _with_gelu(outputs, inputs, device)


def _case(outputs: int, inputs: int, device: torch.device, transposed: bool) -> Case:
    """Forward, or the gradient of the inputs (`transposed`)."""
    dtype = torch.bfloat16
    w = draw(outputs, inputs, dtype=dtype, device=device)
    x = draw(ROWS, outputs if transposed else inputs, dtype=dtype, device=device)
    y = torch.empty(ROWS, inputs if transposed else outputs, dtype=dtype, device=device)
    right = w if transposed else w.T
    flops = 2 * ROWS * outputs * inputs

    def rival(setting: str) -> Candidate:
        def check() -> None:
            y.fill_(torch.nan)
            product(setting, x, w, y, transposed)
            close("product", y, x.double() @ right.double(), dtype)

        return Candidate(lambda: product(setting, x, w, y, transposed), check, None, flops)

    def check() -> None:
        close("product", torch.mm(x, right), x.double() @ right.double(), dtype)

    candidates = {"ours": Candidate(lambda: torch.mm(x, right, out=y), check, None, flops)}
    candidates |= {setting: rival(setting) for setting in SETTINGS}
    name = "product backward" if transposed else "product forward"
    return Case(label(name, dtype, ROWS, outputs, inputs), candidates)


def _with_gelu(outputs: int, inputs: int, device: torch.device) -> Case:
    """The feed-forward layer's first product with bias and GELU."""
    dtype = torch.bfloat16
    w, x = draw(outputs, inputs, dtype=dtype, device=device), draw(ROWS, inputs, dtype=dtype, device=device)
    bias = draw(outputs, dtype=dtype, device=device)
    u, y = (torch.empty(ROWS, outputs, dtype=dtype, device=device) for _ in range(2))
    flops = 2 * ROWS * outputs * inputs

    def ours() -> Tensor:
        result: Tensor = bias_gelu_forward(torch.mm(x, w.T, out=u), bias)
        return result

    def exact() -> Tensor:
        return F.gelu((x.double() @ w.double().T).to(dtype).double() + bias.double())

    def rival(setting: str) -> Candidate:
        def check() -> None:
            y.fill_(torch.nan)
            product(setting, x, w, y, False, bias, u)
            close("y", y, exact(), dtype)

        return Candidate(lambda: product(setting, x, w, y, False, bias, u), check, None, flops)

    candidates = {"ours": Candidate(ours, lambda: close("y", ours(), exact(), dtype), None, flops)}
    candidates |= {setting: rival(setting) for setting in SETTINGS if "256" not in setting}  # which would spill
    return Case(label("product and GELU", dtype, ROWS, outputs, inputs), candidates)
