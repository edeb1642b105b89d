# SPDX-License-Identifier: Apache-2.0
"""How an op becomes one that torch knows: a schema, a kernel for every device, a fake for tracing, autograd.

The same that `torch.library.custom_op` makes, by the calls beneath it (PyTorch's "Python custom operators" manual):
`custom_op` imports all of torch._dynamo, a second or more, at the first call of any op, whether or not anything compiles.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "minbert_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


class Op:
    """A registered op; called like the function it was made of (arguments by position)."""

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: tuple[str, ...]) -> None:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _on_its_device(_counting(function, mutates_args)), "CompositeExplicitAutograd")
        self.name = f"{NAMESPACE}::{name}"
        self.__doc__ = function.__doc__
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: what the op's outputs look like, from what its inputs look like."""
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """The op's backward, `backward(ctx, *gradients)`, and what it keeps of the forward."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_LIBRARY)


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run with the device of its first argument, a tensor, as the current one: Triton launches there."""

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            return function(*arguments)

    return called


def _counting(function: Callable[..., Any], mutates_args: tuple[str, ...]) -> Callable[..., Any]:
    """`function`, which after writing through addresses tells autograd so: a saved tensor that changed is an error."""
    if not mutates_args:
        return function
    places = [place for place, name in enumerate(inspect.signature(function).parameters) if name in mutates_args]

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        result = function(*arguments)
        written = [arguments[place] for place in places if arguments[place] is not None]
        torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])
        return result

    return called


def custom_op(name: str, mutates_args: tuple[str, ...]) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: makes a function of tensors and numbers the op `minbert_fast::name`.

    `mutates_args` names the arguments that it writes to. An op without `register_autograd` is for backward passes and
    updates: its outputs take no gradient.
    """
    return lambda function: Op(name, function, mutates_args)
