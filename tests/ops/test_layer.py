# SPDX-License-Identifier: Apache-2.0
"""A whole layer as one op: the error budget, the ops one after the other, frozen weights, no second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops import segments
from minbert_fast.ops.attention import _keep
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.layer import LayerSettings, LayerWeights, encoder_layer, reference
from tests.ops.common import EPS, P
from tests.tolerance import assert_within_budget, offsets
from tests.tolerance import reference as expected

HEADS, WIDTH, INNER = 3, 24, 40
#: Sentences of a rectangle of 7 positions: full, one token, none, tokens with a hole in between.
MASK = torch.tensor([[1] * 7, [1] + [0] * 6, [0] * 7, [1, 1, 0, 1, 0, 0, 0]]).bool()
SITES = (4, 5, 6)


def tensors(dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The hidden states of the rectangle [28, WIDTH] and the weights, by name."""
    generator = torch.Generator().manual_seed(0)
    square, wide = (WIDTH, WIDTH), {"interm": (INNER, WIDTH), "interm_bias": (INNER,), "out": (WIDTH, INNER)}
    shapes: dict[str, tuple[int, ...]] = {"hidden": (MASK.numel(), WIDTH)}
    for name in LayerWeights._fields:
        shapes[name] = wide.get(name, square if name in ("query", "key", "value", "dense") else (WIDTH,))
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    matrices = ("query", "key", "value", "dense", "interm", "out")
    return {name: (t / 5 if name in matrices else t).to(device, dtype) for name, t in drawn.items()}


def settings(p: float, device: torch.device | str = "cpu", packed: bool = False) -> LayerSettings:
    """The rectangle as it lies, or with `packed` as four sentences of seven tokens."""
    mask = MASK.to(device)
    seed = torch.tensor([9], device=device) if p else None
    ends = offsets([MASK.shape[1]] * len(MASK), device)
    dropouts: Any = tuple((p, seed, site) for site in SITES)
    bounds = segments.one_task(mask.flatten())[0]
    return LayerSettings(HEADS, (EPS, 1e-5), dropouts, (ends, None if packed else mask, MASK.shape[1]), bounds)


def formula(hidden: Tensor, keep: tuple[Any, ...], **weights: Tensor) -> Tensor:
    rectangle = hidden.unflatten(0, MASK.shape)
    return reference(rectangle, LayerWeights(**weights), MASK.to(hidden.device), HEADS, (EPS, 1e-5), keep).flatten(0, 1)


def differentiated(inputs: dict[str, Tensor], chosen: LayerSettings, cotangent: Tensor) -> list[Tensor]:
    hidden, *weights = leaves = [t.clone().requires_grad_() for t in inputs.values()]
    y = encoder_layer(hidden, LayerWeights(*weights), chosen)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def one_after_the_other(hidden: Tensor, w: LayerWeights, chosen: LayerSettings) -> Tensor:
    first, second, third = chosen.dropouts
    ends, _, longest = chosen.sentences
    qkv = ops.linear(hidden, torch.cat(w[:3]), torch.cat(w[3:6])).unflatten(1, (3, HEADS, -1))
    context = ops.attention(qkv, ends, longest, (WIDTH / HEADS) ** -0.5, *first)
    middle = ops.add_norm(ops.linear(context, w.dense), w.dense_bias, hidden, w.gamma, w.beta, chosen.eps[0], *second)
    inner = ops.bias_gelu(ops.linear(middle, w.interm), w.interm_bias)
    return ops.add_norm(ops.linear(inner, w.out), w.out_bias, middle, w.out_gamma, w.out_beta, chosen.eps[1], *third)


@pytest.mark.parametrize("p", [0.0, P])
def test_error_budget(kernels: torch.device, p: float) -> None:
    """Output and all gradients on a rectangle with padding, a hole, and a sentence without tokens."""
    inputs, chosen = tensors(torch.float32, kernels), settings(p, kernels)
    cotangent = torch.randn(inputs["hidden"].shape, generator=torch.Generator().manual_seed(1)).to(kernels)
    keep: tuple[Any, ...] = (1.0, 1.0, 1.0)
    if p:
        (_, seed, first), *others = chosen.dropouts
        assert seed is not None
        rows = torch.arange(MASK.numel(), device=kernels)
        qkv = torch.empty(0, 3, HEADS, 1, device=kernels)
        masks = [keep_mask(seed, site, rows, WIDTH, p).unflatten(0, MASK.shape) for _, _, site in others]
        keep = (_keep(rows.view(MASK.shape), qkv, p, seed, first), *masks)
    want = expected(formula, inputs, [cotangent], keep=keep)
    results = zip(want.names, differentiated(inputs, chosen, cotangent), want.exact, want.plain, strict=True)
    for name, actual, exact, plain in results:
        if name == "dkey_bias":  # 0 but for rounding: softmax ignores what is added to all of a row's scores
            assert actual.abs().max() < 1e-5
            continue
        summed = 1 if name in ("output 0", "dhidden") else MASK.numel()
        assert_within_budget(actual, exact, plain, rows=summed, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_ops_one_after_the_other(native: torch.device, dtype: torch.dtype) -> None:
    inputs, chosen = tensors(dtype), settings(P, packed=True)
    cotangent = torch.randn(MASK.numel(), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, *gradients = differentiated(inputs, chosen, cotangent)
    hidden, *weights = leaves = [t.clone().requires_grad_() for t in inputs.values()]
    want = one_after_the_other(hidden, LayerWeights(*weights), chosen)
    assert torch.equal(y, want)
    with torch.no_grad():
        assert torch.equal(encoder_layer(hidden, LayerWeights(*weights), chosen), y)
    apart = {"rtol": 3e-2, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for got, gradient in zip(gradients, torch.autograd.grad(want, leaves, cotangent), strict=True):
        torch.testing.assert_close(got, gradient, **apart)


def test_frozen_weights_get_no_gradient(native: torch.device) -> None:
    inputs, chosen = tensors(torch.float32), settings(0.0)
    whole = differentiated(inputs, chosen, torch.ones(MASK.numel(), WIDTH))[1:]
    trained = ("key_bias", "dense", "interm_bias", "out_gamma")
    leaves = {name: t.clone().requires_grad_(name in trained) for name, t in inputs.items()}
    hidden, *weights = leaves.values()
    encoder_layer(hidden, LayerWeights(*weights), chosen).sum().backward()
    for (name, leaf), want in zip(leaves.items(), whole, strict=True):
        assert (leaf.grad is None) == (name not in trained)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, want)


def test_differentiable_once(native: torch.device) -> None:
    hidden, *weights = (t.requires_grad_() for t in tensors(torch.float32).values())
    y = encoder_layer(hidden, LayerWeights(*weights), settings(0.0))
    (first,) = torch.autograd.grad(y.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
