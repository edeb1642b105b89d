# SPDX-License-Identifier: Apache-2.0
# The compiled extension (csrc/). The encoder's ops are called by name (minbert_fast.ops.library) with the op's tensors and
# numbers, its outputs, and a number of threads. Surgery's ops (csrc/surgery.h lists them) are called by name with a Where
# first, and with pointers as integers, 0 for an absent tensor; on a GPU the name begins with cuda_ (if has_cuda).

has_cuda: bool
max_tasks: int

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def isas() -> str: ...

class Where:
    def __init__(self, device: int, stream: int, threads: int) -> None: ...

class Matrix:
    def __init__(self, data: int, dtype: int, rows: int, columns: int, stride: int) -> None: ...

class AdamW:
    def __init__(self, *members: float) -> None: ...
