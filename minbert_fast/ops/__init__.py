# SPDX-License-Identifier: Apache-2.0
"""The ops of the encoder, a file each: picks Triton, the C++ extension or PyTorch (backend.py), with autograd.

Every op works two ways. Plainly, it is differentiable in all its tensors, for code that uses autograd. With a sink
(`into`), its backward writes parameter gradients apart by task into the sink's views, and only activations get
gradients.
"""

from minbert_fast.ops.add_norm import AddNormSink, add_norm
from minbert_fast.ops.attention import attention, attention_dense
from minbert_fast.ops.bias_gelu import BiasGeluSink, bias_gelu
from minbert_fast.ops.embedding import EmbeddingSink, embedding
from minbert_fast.ops.linear import LinearSink, linear

__all__ = [
    "AddNormSink",
    "BiasGeluSink",
    "EmbeddingSink",
    "LinearSink",
    "add_norm",
    "attention",
    "attention_dense",
    "bias_gelu",
    "embedding",
    "linear",
]
