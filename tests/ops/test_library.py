# SPDX-License-Identifier: Apache-2.0
"""Ops without torch.library.custom_op: no compiler is imported to run them, and what they write is known to autograd."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from minbert_fast.ops.linear import linear_gradients

_BOTH_WAYS = """
import sys
import torch
from minbert_fast import BertConfig, BertModel
model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
out = model.train()(torch.ones(1, 3, dtype=torch.long))["last_hidden_state"]
out.square().sum().backward()
assert model.word_embedding.weight.grad.abs().sum() > 0
print("torch._dynamo" in sys.modules)
"""


def test_a_model_runs_and_learns_without_importing_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", _BOTH_WAYS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_tensor_that_an_op_wrote_to_cannot_be_used_as_saved() -> None:
    x, dy = torch.randn(4, 3), torch.randn(4, 2)
    bounds = torch.tensor([0, 1, 4], dtype=torch.int32)
    J, w = torch.zeros(2, 2, 3), torch.ones(2, 2, 3, requires_grad=True)
    product = (J * w).sum()  # saves J
    linear_gradients(dy, x, bounds, J, None)
    torch.testing.assert_close(J, torch.stack([dy[:1].T @ x[:1], dy[1:].T @ x[1:]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_ops_write_to_inference_tensors_too() -> None:
    with torch.inference_mode():
        J = torch.zeros(1, 2, 3)
        linear_gradients(torch.ones(4, 2), torch.ones(4, 3), torch.tensor([0, 4], dtype=torch.int32), J, None)
    assert (J == 4).all()
