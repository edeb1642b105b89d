# SPDX-License-Identifier: Apache-2.0
# The compiled extension (csrc/). Pointers are integers, 0 for an absent tensor; minbert_fast.ops.native checks before it
# calls. The names that begin with cuda_ are there when has_cuda is.

has_cuda: bool
max_tasks: int

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def isas() -> str: ...

# Surgery's ops (csrc/surgery.h lists them) are called by name, with a Where first; on a GPU the name begins with cuda_.

class Where:
    def __init__(self, device: int, stream: int, threads: int) -> None: ...

class Matrix:
    def __init__(self, data: int, dtype: int, rows: int, columns: int, stride: int) -> None: ...

class AdamW:
    def __init__(self, *members: float) -> None: ...

max_width: int

class Dropout:
    def __init__(self, p: float, seed: int, site: int) -> None: ...

class Segments:
    def __init__(self, bounds: int, tasks: int) -> None: ...

class TaskGradient:
    def __init__(self, data: int, dtype: int, stride: int) -> None: ...

class AddNorm:
    def __init__(
        self, dtype: int, rows: int, width: int, x: int, residual: int, bias: int, gamma: int, dropout: Dropout
    ) -> None: ...

class BiasGelu:
    def __init__(self, dtype: int, rows: int, width: int, x: int, bias: int) -> None: ...

class Lookup:
    def __init__(self, table: int, count: int, index: int) -> None: ...

class Embedding:
    def __init__(
        self,
        dtype: int,
        rows: int,
        width: int,
        word: Lookup,
        position: Lookup,
        type_: Lookup,
        gamma: int,
        dropout: Dropout,
    ) -> None: ...

class ColumnSums:
    def __init__(self, dtype: int, rows: int, width: int, stride: int, x: int) -> None: ...

class Attention:
    @staticmethod
    def packed(
        dtype: int,
        rows: int,
        heads: int,
        head_dim: int,
        stride: int,
        qkv: int,
        cu_seqlens: int,
        sentences: int,
        scale: float,
        dropout: Dropout,
    ) -> Attention: ...
    @staticmethod
    def dense(
        dtype: int,
        sentences: int,
        period: int,
        heads: int,
        head_dim: int,
        stride: int,
        qkv: int,
        mask: int,
        scale: float,
        dropout: Dropout,
    ) -> Attention: ...

def add_norm_forward(op: AddNorm, beta: int, eps: float, y: int, mean: int, rstd: int, threads: int) -> None: ...
def add_norm_backward(
    op: AddNorm,
    dy: int,
    mean: int,
    rstd: int,
    segments: Segments,
    dx: int,
    dresidual: int,
    dgamma: TaskGradient,
    dbeta: TaskGradient,
    dbias: TaskGradient,
    threads: int,
) -> None: ...
def bias_gelu_forward(op: BiasGelu, y: int, threads: int) -> None: ...
def bias_gelu_backward(
    op: BiasGelu, dy: int, segments: Segments, dx: int, dbias: TaskGradient, threads: int
) -> None: ...
def embedding_forward(op: Embedding, beta: int, eps: float, y: int, mean: int, rstd: int, threads: int) -> None: ...
def embedding_backward(
    op: Embedding,
    dy: int,
    mean: int,
    rstd: int,
    segments: Segments,
    word_order: int,
    word_offsets: int,
    words: int,
    dgamma: TaskGradient,
    dbeta: TaskGradient,
    dword: TaskGradient,
    dposition: TaskGradient,
    dtype: TaskGradient,
    threads: int,
) -> None: ...
def column_sums(op: ColumnSums, segments: Segments, out: TaskGradient, threads: int) -> None: ...
def attention_forward(op: Attention, out: int, lse: int, threads: int) -> None: ...
def attention_backward(op: Attention, dout: int, dout_stride: int, lse: int, dqkv: int, threads: int) -> None: ...
