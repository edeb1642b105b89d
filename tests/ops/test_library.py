# SPDX-License-Identifier: Apache-2.0
"""Ops without torch.library.custom_op: no compiler is imported to run them, and what they write is known to autograd."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from minbert_fast.ops.bias_gelu import bias_gelu_forward
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


class _Names(TorchDispatchMode):
    """The names of the ops that torch dispatches inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_whoever_follows_ops_sees_them() -> None:
    """A call skips torch's dispatcher only while no mode, tracer, transform or profiler follows it."""
    x, bias = torch.randn(3, 8), torch.randn(8)
    plain, name = bias_gelu_forward(x, bias), "minbert_fast::bias_gelu_forward"
    with _Names() as names:
        assert torch.equal(bias_gelu_forward(x, bias), plain)
    assert name in names.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        bias_gelu_forward(x, bias)
    assert name in {event.key for event in profiler.key_averages()}
    traced = make_fx(lambda x, bias: bias_gelu_forward(x, bias))(x, bias)
    assert any(name.partition("::")[2] in str(node.target) for node in traced.graph.nodes)
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        graph = torch.jit.trace(lambda x, bias: bias_gelu_forward(x, bias), (x, bias), check_trace=False).graph
    assert name in str(graph)
    assert bias_gelu_forward(x.to("meta"), bias.to("meta")).is_meta
