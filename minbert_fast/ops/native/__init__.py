# SPDX-License-Identifier: Apache-2.0
"""The Python face of the compiled extension.

torch is imported before the extension, so that both share one OpenMP runtime and its threads.
"""

from typing import Any

import torch

from minbert_fast import _C

#: Whether this build holds CUDA kernels.
HAS_CUDA: bool = _C.has_cuda


def instruction_set() -> str:
    """The processor's instruction set that CPU kernels use."""
    return _C.isa()


def call(name: str, *arguments: Any) -> None:
    """Runs the encoder's op `name` on CPU tensors, with torch's number of threads; it checks every argument."""
    getattr(_C, name)(*arguments, torch.get_num_threads())
