# SPDX-License-Identifier: Apache-2.0
"""attention on packed sentences of real lengths, against padded SDPA, padded eager, varlen_attn and FlashAttention.

With e bytes an element and L2 the sum of squared lengths: forward 4 h d L2 FLOPs, reads qkv and writes out, 4 e N h d
bytes; backward 10 h d L2 FLOPs, reads qkv and dout and writes dqkv, 7 e N h d bytes. The padded baselines start from
qkv that is padded already: to one rectangle, or to one a task, as a course's loop has them.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import Candidate
from benchmarks.kernels.case import DTYPES, Case, P, close, draw
from minbert_fast.ops import backend
from minbert_fast.ops.attention import attention

LENGTHS = Path(__file__).parents[1] / "lengths.json"
MODELS = {"MiniLM-L6": (12, 32), "BERT-base": (12, 64)}  # heads, head_dim


@dataclass(frozen=True)
class Batch:
    """Sentence lengths by task."""

    name: str
    tasks: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        return [length for task in self.tasks for length in task]


def real_batch(examples: int) -> Batch:
    """`examples` of each of SST, Quora and STS (pairs count twice), lengths drawn as the training data has them."""
    histograms = json.loads(LENGTHS.read_text())
    generator = random.Random(0)
    sizes = {"sst": examples, "quora": 2 * examples, "sts": 2 * examples}
    tasks = [generator.choices(range(len(histograms[n])), histograms[n], k=size) for n, size in sizes.items()]
    return Batch(f"3 x {examples} real examples", tasks)


def batches(device: torch.device) -> list[Batch]:
    found = [real_batch(32)]
    if device.type == "cuda":
        found += [real_batch(340), Batch("64 x 128", [[128] * 64]), Batch("16 x 512", [[512] * 16])]
    return found


def cases(device: torch.device) -> Iterator[Case]:
    for batch in batches(device):
        for model, (heads, width) in MODELS.items():
            for dtype in DTYPES:
                for p in (P, 0.0):
                    yield from _cases(batch, model, heads, width, dtype, p, device)


def _cases(
    batch: Batch, model: str, heads: int, width: int, dtype: torch.dtype, p: float, device: torch.device
) -> Iterator[Case]:
    lengths = batch.lengths
    rows, scale = sum(lengths), width**-0.5
    qkv = draw(rows, 3, heads, width, dtype=dtype, device=device).requires_grad_()
    dout = draw(rows, heads * width, dtype=dtype, device=device)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    seed = torch.tensor([1], device=device)

    def ours(qkv: Tensor = qkv) -> Tensor:
        return attention(qkv, cu_seqlens, max(lengths), scale, p, seed, 1)

    def check() -> None:
        exact = qkv.detach().float().requires_grad_()
        with backend.force("torch"):
            wanted = ours(exact)
        close("out", ours(), wanted, dtype)
        got = torch.autograd.grad(ours(), qkv, dout)[0]
        close("dqkv", got, torch.autograd.grad(wanted, exact, dout.float())[0], dtype)

    forwards: dict[str, tuple[Callable[[], Tensor], list[Tensor], Tensor]] = {"ours": (ours, [qkv], dout)}
    whole = [lengths]
    for name, tasks, attend in (
        ("padded SDPA", whole, _sdpa),
        ("padded SDPA by task", batch.tasks, _sdpa),
        ("padded eager", whole, _eager),
    ):
        if len(tasks) > 1 or tasks is whole:
            forwards[name] = _padded(qkv, dout, tasks, attend, scale, p)
    if device.type == "cuda" and dtype != torch.float32:
        forwards |= _varlen(qkv, dout, cu_seqlens, max(lengths), scale, p)

    squares = sum(length**2 for length in lengths)
    elements = rows * heads * width
    counts = {"forward": (4 * elements, 4), "forward and backward": (11 * elements, 14)}
    for part, (moved, products) in counts.items():
        label = f"attention {part}, {model}, {batch.name}, {str(dtype).removeprefix('torch.')}, p = {p}"
        candidates = {}
        for name, (forward, leaves, cotangent) in forwards.items():
            run = forward if part == "forward" else _with_backward(forward, leaves, cotangent)
            candidates[name] = Candidate(
                run, check if name == "ours" else None, moved * dtype.itemsize, products * heads * width * squares
            )
        yield Case(label, candidates, "fp32" if dtype == torch.float32 else "bf16")


def _with_backward(forward: Callable[[], Tensor], leaves: list[Tensor], cotangent: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), leaves, cotangent)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, p, scale=scale)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, p: float) -> Tensor:
    scores = q @ k.transpose(2, 3) * scale
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return F.dropout(weights, p) @ v


def _padded(
    qkv: Tensor,
    dout: Tensor,
    tasks: list[list[int]],
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor],
    scale: float,
    p: float,
) -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
    """Attention on one rectangle a task, [B, S, 3, h, d] each, results flattened side by side."""
    rectangles, masks, cotangents, begin = [], [], [], 0
    for lengths in tasks:
        end = begin + sum(lengths)
        rows, grads = (t.detach()[begin:end].split(lengths) for t in (qkv, dout))
        rectangles.append(pad_sequence(list(rows), batch_first=True).requires_grad_())
        cotangents.append(pad_sequence(list(grads), batch_first=True).flatten())
        positions = torch.arange(max(lengths), device=qkv.device)
        masks.append((positions < torch.tensor(lengths, device=qkv.device)[:, None])[:, None, None])
        begin = end

    def forward() -> Tensor:
        outs = []
        for rectangle, mask in zip(rectangles, masks, strict=True):
            q, k, v = (t.transpose(1, 2) for t in rectangle.unbind(2))
            outs.append(attend(q, k, v, mask, scale, p).transpose(1, 2).flatten())
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return forward, rectangles, torch.cat(cotangents)


def _varlen(
    qkv: Tensor, dout: Tensor, cu_seqlens: Tensor, longest: int, scale: float, p: float
) -> dict[str, tuple[Callable[[], Tensor], list[Tensor], Tensor]]:
    """Packed attention of torch (no dropout, its own scale of d^-1/2) and of flash_attn, where they are installed."""
    found: dict[str, tuple[Callable[[], Tensor], list[Tensor], Tensor]] = {}
    if p == 0.0 and importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        def torch_varlen() -> Tensor:
            q, k, v = qkv.unbind(1)
            out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
            assert isinstance(out, Tensor)  # without its log-sum-exp
            return out.flatten(1)

        found["torch varlen_attn"] = (torch_varlen, [qkv], dout)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_qkvpacked_func

        def flash() -> Tensor:
            out: Tensor = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, p, scale)
            return out.flatten(1)

        found["flash_attn varlen"] = (flash, [qkv], dout)
    return found
