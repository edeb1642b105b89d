# SPDX-License-Identifier: Apache-2.0
"""The rows of a pass through the encoder: which tokens there are, and which of them attend to each other.

`Sentences` lie end to end, `PackedRows` with their tokens. `DenseRows` are those of a rectangle with padding anywhere. All
of them turn rows [N, ...] into a rectangle [B, S, ...] and back, for modules that the fused path calls.

Shapes: N rows, B sentences, S positions, h heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from minbert_fast import ops
from minbert_fast.common.device import sent
from minbert_fast.model.packing import PackedBatch
from minbert_fast.ops import backend


@dataclass(frozen=True)
class Sentences:
    """Sentences end to end: sentence b has rows cu_seqlens[b] to cu_seqlens[b + 1]; rows behind the last are padding."""

    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    count: int  # N

    def attention(self, qkv: Tensor, scale: float, p: float, seed: Tensor | None, site: int) -> Tensor:
        """softmax(scale * q k^T) v within each sentence: qkv [N, 3, h, d] -> [N, h * d]."""
        return ops.attention(qkv, self.cu_seqlens, self.max_seqlen, scale, p, seed, site)

    def sentences(self) -> tuple[Tensor | None, Tensor | None, int]:
        """cu_seqlens, mask and max_seqlen for the kernels of attention."""
        return self.cu_seqlens, None, self.max_seqlen

    def mask(self) -> Tensor:
        """Which positions of the rectangle hold a token [B, S] bool."""
        places = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return places < self.cu_seqlens.diff()[:, None]

    def rectangle(self, rows: Tensor) -> Tensor:
        """rows [N, ...] as [B, S, ...], zeros where there is no token."""
        mask = self.mask()
        if not self.count:
            return rows.new_zeros(*mask.shape, *rows.shape[1:])
        index = self.cu_seqlens[:-1, None] + torch.arange(self.max_seqlen, device=rows.device)
        return rows[index.clamp(max=self.count - 1)] * mask.view(*mask.shape, *[1] * (rows.dim() - 1)).to(rows.dtype)

    def rows(self, rectangle: Tensor) -> Tensor:
        """rectangle [B, S, ...] as rows [N, ...]."""
        sentences, length = rectangle.shape[:2]
        if not sentences or not length:
            return rectangle.new_zeros(self.count, *rectangle.shape[2:])
        row = torch.arange(self.count, dtype=torch.int32, device=rectangle.device)
        sentence = torch.searchsorted(self.cu_seqlens[1:].contiguous(), row, right=True).clamp(max=sentences - 1)
        place = (row - self.cu_seqlens[sentence]).clamp(max=length - 1)
        owned = row < self.cu_seqlens[-1]
        taken = rectangle[sentence, place]
        return taken * owned.view(-1, *[1] * (taken.dim() - 1)).to(taken.dtype)


@dataclass(frozen=True)
class PackedRows(Sentences):
    """Token rows of sentences end to end."""

    tokens: Tensor  # [N] int32, as the two below
    positions: Tensor
    types: Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> PackedRows:
        """The rows of a packed batch."""
        count = batch.tokens.shape[0]
        return cls(batch.cu_seqlens, batch.max_seqlen, count, batch.tokens, batch.positions, batch.types)

    def to(self, device: torch.device) -> PackedRows:
        """The same rows on `device`."""
        tensors = {name: sent(t, device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DenseRows:
    """The rows of a rectangle [B, S] with padding anywhere; the methods are those of `Sentences`."""

    attended: Tensor  # [B, S] bool
    kept: Tensor | None  # [N] flat positions of the attended rows; None: N = B * S, padding stays
    cu_seqlens: Tensor  # [B + 1] int32, the first row of each sentence, then the end
    max_seqlen: int

    @classmethod
    def of(cls, mask: Tensor) -> DenseRows:
        """The rows under attention mask [B, S] (not 0: attended)."""
        attended = mask != 0
        if not backend.drops_padding(mask):
            batch, length = mask.shape
            return cls(attended, None, torch.arange(batch + 1, dtype=torch.int32, device=mask.device) * length, length)
        kept = attended.reshape(-1).nonzero().squeeze(1)
        lengths = attended.sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        return cls(attended, kept, cu_seqlens, int(lengths.max()) if lengths.numel() else 0)

    def attention(self, qkv: Tensor, scale: float, p: float, seed: Tensor | None, site: int) -> Tensor:
        if self.kept is not None:
            return ops.attention(qkv, self.cu_seqlens, self.max_seqlen, scale, p, seed, site)
        rectangle = qkv.unflatten(0, self.attended.shape)  # [B, S, 3, h, d]
        return ops.attention_dense(rectangle, self.attended, scale, p, seed, site).flatten(0, 1)

    def sentences(self) -> tuple[Tensor | None, Tensor | None, int]:
        return self.cu_seqlens, self.attended if self.kept is None else None, self.max_seqlen

    def mask(self) -> Tensor:
        return self.attended

    def rectangle(self, rows: Tensor) -> Tensor:
        if self.kept is None:
            flat = rows * self.attended.reshape(-1, 1).to(rows.dtype)
        else:
            flat = rows.new_zeros(self.attended.numel(), rows.shape[-1]).index_copy(0, self.kept, rows)
        return flat.view(*self.attended.shape, rows.shape[-1])

    def rows(self, rectangle: Tensor) -> Tensor:
        flat = rectangle.flatten(0, 1)
        return flat if self.kept is None else flat[self.kept]


Rows = Sentences | DenseRows
TokenRows = tuple[Tensor, Tensor, Tensor]  # word ids, positions, token types [N] int32


def expanded(mask: Tensor, shape: torch.Size) -> Tensor:
    """An attention mask [B, S] or [1, S] as [B, S]. Raises ValueError for another shape."""
    if mask.dim() != 2 or mask.shape[0] not in (1, shape[0]) or mask.shape[1] != shape[1]:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, expected {list(shape)}")
    return mask.expand(shape)


def extended_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that the course adds to attention scores: 0 where the mask is 1, -10000 where it is 0.

    mask [B, S] -> [B, 1, 1, S], or [B, S, S] -> [B, 1, S, S]. Raises ValueError for a mask of other dimensions.
    """
    if mask.dim() not in (2, 3):
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, expected [B, S]: 1 attended, 0 not")
    extended = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None, :, :]
    return (1.0 - extended.to(dtype)) * -10000.0
