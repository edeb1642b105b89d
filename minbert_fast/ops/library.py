# SPDX-License-Identifier: Apache-2.0
"""Registers a function as a torch op: a schema, an implementation, a fake for tracing.

The result is that of `torch.library.custom_op`, made by the calls beneath it (PyTorch's "Python custom operators" manual).
`custom_op` itself imports all of torch._dynamo at the first call of any op, which takes a second or more.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minbert_fast.ops import native
from minbert_fast.ops.backend import implementation

NAMESPACE = "minbert_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
#: Every op by its full name, for tools that follow a step op by op.
OPS: dict[str, Op] = {}


class Op:
    """A registered op; called like the function that declared it (arguments by position)."""

    def __init__(
        self, name: str, declared: Callable[..., Any], mutates_args: tuple[str, ...], run: Callable[..., Any]
    ) -> None:
        schema = torch.library.infer_schema(declared, mutates_args=mutates_args)
        self._launched = _launched(run, _places(declared, mutates_args))
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self._launched, "CompositeExplicitAutograd")
        self.name = f"{NAMESPACE}::{name}"
        self.run = run
        OPS[self.name] = self
        self.__doc__ = declared.__doc__
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *arguments: Any) -> Any:
        if _followed(arguments):
            return self.overload(*arguments)
        return self._launched(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: `function` makes the op's outputs for tracing, with their shapes and dtypes but no values."""
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function


_PLAIN = frozenset((Tensor, torch.nn.Parameter, float, int, bool, type(None), list))


def _followed(arguments: tuple[Any, ...]) -> bool:
    """Whether a call must go through torch's dispatcher, which costs more than a small op: something there follows it.

    That is a compiler or another tracer, a mode, a function transform, the profiler, or an argument that is no plain
    tensor with memory.
    """
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, arguments))
        or arguments[0].is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def custom_op(name: str, mutates_args: tuple[str, ...]) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: makes a function of tensors and numbers the op `minbert_fast::name`.

    `mutates_args` names the arguments that it writes to. The op's outputs take no gradient. An op with outputs still
    needs `register_fake`.
    """

    def declare(function: Callable[..., Any]) -> Op:
        op = Op(name, function, mutates_args, function)
        if not op.overload._schema.returns:
            op.register_fake(lambda *arguments: None)
        return op

    return declare


def kernel_op(*mutates_args: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: makes a function the op `minbert_fast::<its name>`, which a kernel of the same name computes.

    The function declares the op's arguments and allocates its outputs; tracing takes the outputs' shapes from it. On a
    GPU the op calls the function of its name in `minbert_fast.kernels.<its module>`, on a CPU that of the extension. It
    passes the arguments, then the outputs. It makes tensors contiguous first, except those of `mutates_args`.
    """

    def declare(function: Callable[..., Any]) -> Op:
        name, module = function.__name__, function.__module__.rpartition(".")[2]
        written = _places(function, mutates_args)

        def run(*arguments: Any) -> Any:
            arguments = tuple(
                [
                    argument.contiguous() if isinstance(argument, Tensor) and place not in written else argument
                    for place, argument in enumerate(arguments)
                ]
            )
            made = function(*arguments)
            outputs = made if isinstance(made, tuple) else () if made is None else (made,)
            if implementation(arguments[0]) == "triton":
                kernels = importlib.import_module(f"minbert_fast.kernels.{module}")
                getattr(kernels, name)(*arguments, *outputs)
            else:
                native.call(name, *arguments, *outputs)
            return made

        op = Op(name, function, mutates_args, run)
        op.register_fake(function)
        return op

    return declare


def _places(function: Callable[..., Any], names: tuple[str, ...]) -> frozenset[int]:
    return frozenset(place for place, name in enumerate(inspect.signature(function).parameters) if name in names)


def _launched(function: Callable[..., Any], written: frozenset[int]) -> Callable[..., Any]:
    """`function`, run with the device of its first argument, a tensor, as the current one: Triton launches there.

    Afterwards it tells autograd which arguments were `written` through addresses: a saved tensor that changed is an error.
    """

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            result = function(*arguments)
        if not written:
            return result
        changed = [arguments[place] for place in written]
        tensors = [t for each in changed for t in (each if isinstance(each, list) else [each]) if t is not None]
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
        return result

    return called
