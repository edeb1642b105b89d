# SPDX-License-Identifier: Apache-2.0
"""The encoder's operations between its matrix products by the compiled extension, on CPU tensors, forward and backward.

Shapes: N token rows, B sentences, S positions, T tasks, H hidden, F intermediate, h heads, d head width, V words, K
types, U distinct words of the batch. Activations are fp32 or bf16, all of one dtype; arithmetic and statistics are
fp32. Weights of the embedding tables have the activations' dtype; biases, gamma and beta may be fp32 instead. Indices
and bounds are int32. `bounds` [T + 1] are the token-row bounds of the tasks; rows from bounds[T] on are padding, whose
gradients are zero.

Gradients of parameters are written per task into tensors that the caller gives (None: not wanted), fp32 or bf16, each
task's part contiguous and any distance from the next: slices of J [T, P].

Dropout draws the stream of `minbert_fast.kernels.dropout`: one seed gives one mask, whichever implementation runs. The
same bits come out for any number of threads. Every ValueError is raised before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minbert_fast import _C
from minbert_fast.ops.native.tensors import DTYPE_CODES, check, contiguous, extent, row_stride, threads

ACTIVATIONS = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")

#: The widest row that LayerNorm takes.
MAX_WIDTH: int = _C.max_width


def instruction_set() -> str:
    """The processor's instruction set that these operations use."""
    return _C.isa()


# ---- Checks ---------------------------------------------------------------------------------------------------------


def _activation(name: str, tensor: Tensor, shape: Sequence[int | None], dtype: torch.dtype | None = None) -> Tensor:
    return contiguous(name, check(name, tensor, shape, dtype or ACTIVATIONS, CPU))


def _vector(name: str, tensor: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """A bias or a LayerNorm weight [width], as fp32."""
    return contiguous(name, check(name, tensor, [width], (torch.float32, dtype), CPU)).float()


def _statistic(name: str, tensor: Tensor, rows: int) -> Tensor:
    return contiguous(name, check(name, tensor, [rows], torch.float32, CPU))


def _index(name: str, tensor: Tensor, length: int | None) -> Tensor:
    return contiguous(name, check(name, tensor, [length], torch.int32, CPU))


def _width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"the hidden size must be 1 to {MAX_WIDTH}, not {width}")


def _dropout(p: float, seed: Tensor | None, site: int) -> _C.Dropout:
    if not (math.isfinite(p) and 0.0 <= p < 1.0):
        raise ValueError(f"dropout probability must be in [0, 1), not {p}")
    if p == 0.0:
        return _C.Dropout(0.0, 0, 0)
    if seed is None:
        raise ValueError("dropout needs a seed: an int64 tensor of one element")
    check("seed", seed, [1], torch.int64, CPU)
    if not 0 <= site < 2**31:
        raise ValueError(f"site must be in [0, 2^31), not {site}")
    return _C.Dropout(p, seed.data_ptr(), site)


def _segments(bounds: Tensor) -> _C.Segments:
    _index("bounds", bounds, None)
    if not bounds.numel():
        raise ValueError("bounds must hold at least one entry")
    return _C.Segments(bounds.data_ptr(), bounds.numel() - 1)


def _task_gradients(
    tasks: int, shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]], inputs: Sequence[Tensor]
) -> list[_C.TaskGradient]:
    """Checks and wraps outputs kept apart by task; shapes[name] = (tensor or None, the shape of one task's part)."""
    wrapped: list[_C.TaskGradient] = []
    seen: list[tuple[str, Tensor]] = []
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            wrapped.append(_C.TaskGradient(0, 0, 0))
            continue
        check(name, tensor, [tasks, *shape], ACTIVATIONS, CPU)
        stride = row_stride(name, tensor)
        for other, earlier in seen:
            if _tasks_overlap(tensor, earlier):
                raise ValueError(f"{other} and {name} must not share memory")
        if any(_overlap(tensor, given) for given in inputs):
            raise ValueError(f"{name} must not share memory with an input")
        seen.append((name, tensor))
        wrapped.append(_C.TaskGradient(tensor.data_ptr(), DTYPE_CODES[tensor.dtype], stride))
    return wrapped


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + (extent(tensor) * tensor.element_size() if tensor.numel() else 0)


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    return a_begin < b_end and b_begin < a_end


def _tasks_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two gradients apart by task share memory. Columns of one J do not, though their spans interleave."""
    if not _overlap(a, b):
        return False
    pitch = a.stride(0) * a.element_size()
    if a.shape[0] < 2 or pitch != b.stride(0) * b.element_size():
        return True
    ahead = (b.data_ptr() - a.data_ptr()) % pitch
    return ahead < a[0].numel() * a.element_size() or ahead + b[0].numel() * b.element_size() > pitch


# ---- add_norm -------------------------------------------------------------------------------------------------------


def add_norm_forward(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, H] = LayerNorm(residual + dropout(x + bias)), and the fp32 mean and rstd [N] of each row."""
    _activation("x", x, [None, None])
    rows, width = x.shape
    _width(width)
    _activation("residual", residual, [rows, width], x.dtype)
    bias, gamma, beta = (
        _vector(name, t, width, x.dtype) for name, t in (("bias", bias), ("gamma", gamma), ("beta", beta))
    )
    op = _add_norm(x, bias, residual, gamma, p, seed, site)
    y, mean, rstd = torch.empty_like(x), torch.empty(rows), torch.empty(rows)
    _C.add_norm_forward(op, beta.data_ptr(), eps, y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), threads())
    return y, mean, rstd


def add_norm_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    dgamma: Tensor | None = None,
    dbeta: Tensor | None = None,
    dbias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, dresidual [N, H]; writes dgamma, dbeta and dbias [T, H]."""
    _activation("x", x, [None, None])
    rows, width = x.shape
    _width(width)
    for name, t in (("residual", residual), ("dy", dy)):
        _activation(name, t, [rows, width], x.dtype)
    bias, gamma = (_vector(name, t, width, x.dtype) for name, t in (("bias", bias), ("gamma", gamma)))
    _statistic("mean", mean, rows)
    _statistic("rstd", rstd, rows)
    segments = _segments(bounds)
    wanted = {"dgamma": (dgamma, (width,)), "dbeta": (dbeta, (width,)), "dbias": (dbias, (width,))}
    gradients = _task_gradients(bounds.numel() - 1, wanted, (dy, x, residual, bias, gamma, mean, rstd, bounds))
    op = _add_norm(x, bias, residual, gamma, p, seed, site)
    dx, dresidual = torch.empty_like(x), torch.empty_like(x)
    _C.add_norm_backward(
        op, dy.data_ptr(), mean.data_ptr(), rstd.data_ptr(), segments, dx.data_ptr(), dresidual.data_ptr(),
        *gradients, threads(),
    )  # fmt: skip
    return dx, dresidual


def _add_norm(
    x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, p: float, seed: Tensor | None, site: int
) -> _C.AddNorm:
    addresses = (t.data_ptr() for t in (x, residual, bias, gamma))
    return _C.AddNorm(DTYPE_CODES[x.dtype], *x.shape, *addresses, _dropout(p, seed, site))


# ---- bias_gelu, column_sums -----------------------------------------------------------------------------------------


def bias_gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """y [N, F] = GELU(x + bias), the erf form."""
    _activation("x", x, [None, None])
    bias = _vector("bias", bias, x.shape[1], x.dtype)
    y = torch.empty_like(x)
    op = _C.BiasGelu(DTYPE_CODES[x.dtype], *x.shape, x.data_ptr(), bias.data_ptr())
    _C.bias_gelu_forward(op, y.data_ptr(), threads())
    return y


def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor, bounds: Tensor, dbias: Tensor | None = None) -> Tensor:
    """dx [N, F]; writes dbias [T, F]."""
    _activation("x", x, [None, None])
    _activation("dy", dy, x.shape, x.dtype)
    width = x.shape[1]
    bias = _vector("bias", bias, width, x.dtype)
    segments = _segments(bounds)
    (gradient,) = _task_gradients(bounds.numel() - 1, {"dbias": (dbias, (width,))}, (dy, x, bias, bounds))
    dx = torch.empty_like(x)
    op = _C.BiasGelu(DTYPE_CODES[x.dtype], *x.shape, x.data_ptr(), bias.data_ptr())
    _C.bias_gelu_backward(op, dy.data_ptr(), segments, dx.data_ptr(), gradient, threads())
    return dx


def column_sums(x: Tensor, bounds: Tensor, out: Tensor) -> None:
    """out [T, O] = the sums of x [N, O] over each task's rows, in fp32: a linear layer's bias gradients from its dy.

    Rows of x must be contiguous, and may lie any distance apart.
    """
    check("x", x, [None, None], ACTIVATIONS, CPU)
    stride = row_stride("x", x)
    segments = _segments(bounds)
    (gradient,) = _task_gradients(bounds.numel() - 1, {"out": (out, (x.shape[1],))}, (x, bounds))
    _C.column_sums(_C.ColumnSums(DTYPE_CODES[x.dtype], *x.shape, stride, x.data_ptr()), segments, gradient, threads())


# ---- embedding ------------------------------------------------------------------------------------------------------


def embedding_forward(
    tokens: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, H] = dropout(LayerNorm(word[tokens] + position[positions] + type_[types])), and fp32 mean and rstd [N].

    tokens, positions, types [N]; tables [V, H], [S, H], [K, H]. ValueError names an index outside its table.
    """
    gamma = _table_arguments(tokens, positions, types, word, position, type_, gamma)
    rows, width = tokens.shape[0], word.shape[1]
    beta = _vector("beta", beta, width, word.dtype)
    op = _embedding(tokens, positions, types, word, position, type_, gamma, p, seed, site)
    y, mean, rstd = word.new_empty(rows, width), torch.empty(rows), torch.empty(rows)
    _C.embedding_forward(op, beta.data_ptr(), eps, y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), threads())
    return y, mean, rstd


def embedding_backward(
    dy: Tensor,
    tokens: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor,
    word_order: Tensor,
    word_offsets: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    dgamma: Tensor | None = None,
    dbeta: Tensor | None = None,
    dword: Tensor | None = None,
    dposition: Tensor | None = None,
    dtype: Tensor | None = None,
) -> None:
    """Writes dgamma, dbeta [T, H], dword [T, U, H], dposition [T, S, H] and dtype [T, K, H].

    `word_order` [N]: token rows sorted by (word, row); `word_offsets` [U + 1]: where each distinct word's rows begin.
    """
    gamma = _table_arguments(tokens, positions, types, word, position, type_, gamma)
    rows, width = tokens.shape[0], word.shape[1]
    _activation("dy", dy, [rows, width], word.dtype)
    _statistic("mean", mean, rows)
    _statistic("rstd", rstd, rows)
    segments = _segments(bounds)
    _index("word_order", word_order, rows)
    _index("word_offsets", word_offsets, None)
    if not word_offsets.numel():
        raise ValueError("word_offsets must hold at least one entry")
    words = word_offsets.numel() - 1
    wanted = {
        "dgamma": (dgamma, (width,)),
        "dbeta": (dbeta, (width,)),
        "dword": (dword, (words, width)),
        "dposition": (dposition, (position.shape[0], width)),
        "dtype": (dtype, (type_.shape[0], width)),
    }
    inputs = (dy, tokens, positions, types, word, position, type_, gamma, mean, rstd, bounds, word_order, word_offsets)
    gradients = _task_gradients(bounds.numel() - 1, wanted, inputs)
    op = _embedding(tokens, positions, types, word, position, type_, gamma, p, seed, site)
    _C.embedding_backward(
        op, dy.data_ptr(), mean.data_ptr(), rstd.data_ptr(), segments, word_order.data_ptr(), word_offsets.data_ptr(),
        words, *gradients, threads(),
    )  # fmt: skip


def _table_arguments(
    tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor, gamma: Tensor
) -> Tensor:
    """Checks the arguments that forward and backward share; gamma as fp32."""
    _index("tokens", tokens, None)
    for name, index in (("positions", positions), ("types", types)):
        _index(name, index, tokens.shape[0])
    _activation("word", word, [None, None])
    width = word.shape[1]
    _width(width)
    for name, table in (("position", position), ("type_", type_)):
        _activation(name, table, [None, width], word.dtype)
    return _vector("gamma", gamma, width, word.dtype)


def _embedding(
    tokens: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    gamma: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
) -> _C.Embedding:
    lookups = (
        _C.Lookup(table.data_ptr(), table.shape[0], index.data_ptr())
        for table, index in ((word, tokens), (position, positions), (type_, types))
    )
    shape = (tokens.shape[0], word.shape[1])
    return _C.Embedding(DTYPE_CODES[word.dtype], *shape, *lookups, gamma.data_ptr(), _dropout(p, seed, site))


# ---- attention ------------------------------------------------------------------------------------------------------


def attention_forward(
    qkv: Tensor, cu_seqlens: Tensor, scale: float, p: float = 0.0, seed: Tensor | None = None, site: int = 0
) -> tuple[Tensor, Tensor]:
    """out [N, h * d] = softmax(q k^T scale) v within each sentence, and the fp32 log-sum-exp [h, N].

    qkv [N, 3, h, d], its rows contiguous and any distance apart; sentence b owns rows cu_seqlens[b] to
    cu_seqlens[b + 1]. Rows of no sentence give zeros.
    """
    op = _packed(qkv, cu_seqlens, scale, p, seed, site)
    rows, _, heads, head_dim = qkv.shape
    out, lse = qkv.new_empty(rows, heads * head_dim), torch.empty(heads, rows)
    _C.attention_forward(op, out.data_ptr(), lse.data_ptr(), threads())
    return out, lse


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """dqkv [N, 3, h, d] from dout [N, h * d] (rows contiguous, any distance apart) and the forward's lse."""
    op = _packed(qkv, cu_seqlens, scale, p, seed, site)
    return _attention_backward(op, dout, lse, qkv)


def attention_dense_forward(
    qkv: Tensor, mask: Tensor, scale: float, p: float = 0.0, seed: Tensor | None = None, site: int = 0
) -> tuple[Tensor, Tensor]:
    """out [B, S, h * d] and lse [h, B * S] of qkv [B, S, 3, h, d] under mask [B, S] (bool or integer).

    Positions with mask 0 may stand anywhere: they are not attended to, and give zeros.
    """
    op, _ = _dense(qkv, mask, scale, p, seed, site)
    batch, length, _, heads, head_dim = qkv.shape
    out, lse = qkv.new_empty(batch, length, heads * head_dim), torch.empty(heads, batch * length)
    _C.attention_forward(op, out.data_ptr(), lse.data_ptr(), threads())
    return out, lse


def attention_dense_backward(
    dout: Tensor,
    qkv: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """dqkv [B, S, 3, h, d] from dout [B, S, h * d] and the forward's lse."""
    op, rows = _dense(qkv, mask, scale, p, seed, site)
    check("dout", dout, [*qkv.shape[:2], qkv.shape[3] * qkv.shape[4]], qkv.dtype, CPU)
    return _attention_backward(op, contiguous("dout", dout).flatten(0, 1), lse, rows).view(qkv.shape)


def _packed(qkv: Tensor, cu_seqlens: Tensor, scale: float, p: float, seed: Tensor | None, site: int) -> _C.Attention:
    check("qkv", qkv, [None, 3, None, None], ACTIVATIONS, CPU)
    rows, _, heads, head_dim = qkv.shape
    stride = row_stride("qkv", qkv)
    _index("cu_seqlens", cu_seqlens, None)
    if not cu_seqlens.numel():
        raise ValueError("cu_seqlens must hold at least one entry")
    return _C.Attention.packed(
        DTYPE_CODES[qkv.dtype], rows, heads, head_dim, stride, qkv.data_ptr(), cu_seqlens.data_ptr(),
        cu_seqlens.numel() - 1, scale, _dropout(p, seed, site),
    )  # fmt: skip


def _dense(
    qkv: Tensor, mask: Tensor, scale: float, p: float, seed: Tensor | None, site: int
) -> tuple[_C.Attention, Tensor]:
    """The op, which has read the mask when this returns, and qkv as rows [B * S, 3, h, d]."""
    check("qkv", qkv, [None, None, 3, None, None], ACTIVATIONS, CPU)
    batch, length, _, heads, head_dim = qkv.shape
    check("mask", mask, [batch, length], None, CPU)
    rows = contiguous("qkv", qkv).view(batch * length, 3, heads, head_dim)
    attended = (mask != 0).contiguous()
    op = _C.Attention.dense(
        DTYPE_CODES[qkv.dtype], batch, length, heads, head_dim, row_stride("qkv", rows), qkv.data_ptr(),
        attended.data_ptr(), scale, _dropout(p, seed, site),
    )  # fmt: skip
    return op, rows


def _attention_backward(op: _C.Attention, dout: Tensor, lse: Tensor, qkv: Tensor) -> Tensor:
    rows, _, heads, head_dim = qkv.shape
    check("dout", dout, [rows, heads * head_dim], qkv.dtype, CPU)
    contiguous("lse", check("lse", lse, [heads, rows], torch.float32, CPU))
    dqkv = qkv.new_empty(qkv.shape)
    _C.attention_backward(op, dout.data_ptr(), row_stride("dout", dout), lse.data_ptr(), dqkv.data_ptr(), threads())
    return dqkv
