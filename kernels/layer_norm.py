# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of rows held on chip, and its gradient, for the kernels that end or begin with one:

xhat = (z - mean) rstd,  g = dy gamma,  dz = rstd (g - mean(g) - xhat mean(g xhat))      (Ba et al. 2016)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minbert_fast.kernels.arguments import multiprocessors, next_power_of_2


@dataclass(frozen=True)
class RowTile:
    """Rows a program holds at once and the warps that share them.

    A warp covers 256 columns with 16-byte loads of bf16, so a row's sums over columns meet across few warps and the
    sums over rows stay inside a thread.
    """

    block: int  # columns, a power of two
    rows: int
    num_warps: int

    @staticmethod
    @functools.cache
    def of(width: int) -> RowTile:
        if not 1 <= width <= 4096:
            raise ValueError(f"hidden size must be between 1 and 4096, not {width}")
        block = max(64, next_power_of_2(width))
        return RowTile(block, rows=max(1, min(4, 4096 // block)), num_warps=max(1, block // 256))

    def programs(self, device: torch.device) -> int:
        """Programs that share a backward: eight warps a multiprocessor."""
        return multiprocessors(device) * max(1, 8 // self.num_warps)

    def launch(self, width: int, p: float) -> dict[str, object]:
        """Compile-time arguments of a kernel on rows of `width` columns."""
        return {
            "P": p, "WIDTH": width, "ROWS": self.rows, "BLOCK": self.block,
            "num_warps": self.num_warps, "enable_fp_fusion": True,
        }  # fmt: skip


@triton.jit
def normalise(z, gamma_ptr, beta_ptr, columns, within, eps, WIDTH: tl.constexpr):
    """LayerNorm of rows z [ROWS, BLOCK], zero beyond WIDTH: y, mean, rstd."""
    mean = tl.sum(z, 1) / WIDTH
    centred = tl.where(within[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    gamma = tl.load(gamma_ptr + columns, mask=within, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + columns, mask=within, other=0.0).to(tl.float32)
    return centred * rstd[:, None] * gamma[None, :] + beta[None, :], mean, rstd


@triton.jit
def norm_gradient(dy, z, gamma, mean_ptr, rstd_ptr, row, mask, valid, WIDTH: tl.constexpr):
    """dz and xhat [ROWS, BLOCK] from dy and z, zero outside `mask`; valid [ROWS]: rows that exist."""
    mean = tl.load(mean_ptr + row, mask=valid, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]
    if WIDTH == 1:  # a row equals its mean; the difference is a rounding error, which rstd would enlarge
        rstd *= 0.0
    xhat = tl.where(mask, (z - mean) * rstd, 0.0)
    g = dy * gamma[None, :]
    along = tl.sum(g * xhat, 1) / WIDTH
    shift = tl.sum(g, 1) / WIDTH
    dz = tl.where(mask, (g - shift[:, None] - xhat * along[:, None]) * rstd, 0.0)
    return dz, xhat
