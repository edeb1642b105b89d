# SPDX-License-Identifier: Apache-2.0
"""Ops, a file each: the encoder's, gradient surgery's and AdamW. backend.py picks Triton, the C++ extension or PyTorch.

Every op of the encoder works in two ways. Without a sink, autograd differentiates it in all its tensors. With a sink
(`into`), its backward writes each task's parameter gradients into the sink's views, and autograd gets the gradients of
the activations alone.
"""

from minbert_fast.ops.adamw import AdamWStep, adamw
from minbert_fast.ops.add_norm import AddNormSink, add_norm, add_norm_twice
from minbert_fast.ops.attention import attention, attention_dense
from minbert_fast.ops.bias_gelu import BiasGeluSink, bias_gelu
from minbert_fast.ops.combine import combine
from minbert_fast.ops.embedding import EmbeddingSink, embedding
from minbert_fast.ops.gram import gram
from minbert_fast.ops.layer import LayerSettings, LayerWeights, encoder_layer
from minbert_fast.ops.linear import LinearSink, linear
from minbert_fast.ops.row_slots import row_slots
from minbert_fast.ops.settle import settle
from minbert_fast.ops.weights import clip_scale, pcgrad_weights

__all__ = [
    "AdamWStep", "AddNormSink", "BiasGeluSink", "EmbeddingSink", "LayerSettings", "LayerWeights", "LinearSink",
    "adamw", "add_norm", "add_norm_twice",
    "attention",
    "attention_dense", "bias_gelu", "clip_scale", "combine", "embedding", "encoder_layer", "gram", "linear",
    "pcgrad_weights", "row_slots", "settle",
]  # fmt: skip
