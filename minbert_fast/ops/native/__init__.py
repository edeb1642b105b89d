# SPDX-License-Identifier: Apache-2.0
"""The Python face of the compiled extension: checks first, then raw pointers.

torch is imported before the extension, so that both share one OpenMP runtime and its threads.
"""

import torch  # noqa: F401  (see above)

from minbert_fast import _C

#: Whether this build holds CUDA kernels.
HAS_CUDA: bool = _C.has_cuda
