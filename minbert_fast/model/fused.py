# SPDX-License-Identifier: Apache-2.0
"""Decides which parts of a module tree the fused path may compute: those that are exactly what it assumes.

The fused path bypasses modules: it reads their weights and never calls them. That is right only while every bypassed module
has its expected class, its class's `forward` and no hooks. `plan` checks the embeddings and each layer. It looks closely
once and then compares a fingerprint of the tree on each call; any change to the tree leads to a new look.

`model/bert.py` reads the drop-in's own tree, `model/patching.py` that of transformers.
"""

from __future__ import annotations

import typing
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class Embedding(NamedTuple):
    """The modules that the fused path embeds tokens with."""

    word: nn.Embedding  # [V, H]
    position: nn.Embedding
    type: nn.Embedding
    norm: nn.LayerNorm
    dropout: nn.Dropout


class Layer(NamedTuple):
    """The modules that the fused path computes one layer with.

    Modules in the place of a Linear that are not plain ones are `foreign`: the fused path calls them, on [B, S, ...].
    """

    heads: int
    query: nn.Module
    key: nn.Module
    value: nn.Module
    probability_dropout: nn.Dropout
    attention_dense: nn.Module
    attention_dropout: nn.Dropout
    attention_norm: nn.LayerNorm
    interm_dense: nn.Module
    out_dense: nn.Module
    out_dropout: nn.Dropout
    out_norm: nn.LayerNorm
    foreign: tuple[str, ...] = ()  # names of the fields above

    def parameters(self) -> list[nn.Parameter]:
        """All parameters; those of query, key and value stand together, so that they are one matrix."""
        qkv = (self.query, self.key, self.value)
        rest = (self.attention_dense, self.attention_norm, self.interm_dense, self.out_dense, self.out_norm)
        if not {"query", "key", "value"}.isdisjoint(self.foreign):
            return [p for module in (*qkv, *rest) for p in module.parameters()]
        stacked = [module.get_parameter(kind) for kind in ("weight", "bias") for module in qkv]
        return stacked + [p for module in rest for p in module.parameters()]


LINEARS = ("query", "key", "value", "attention_dense", "interm_dense", "out_dense")


class Plan(NamedTuple):
    """The parts that the fused path computes, None for a part that is not what it assumes, and the reasons in words."""

    embedding: Embedding | None
    layers: tuple[Layer | None, ...]
    reasons: tuple[str, ...] = ()  # empty: the fused path computes everything


P = TypeVar("P", Embedding, Layer)
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class NotExactError(Exception):
    """A module is not what the fused path assumes."""

    def __init__(self, module: nn.Module, why: str) -> None:
        super().__init__(why)
        self.module = module


# ---- The close look ------------------------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)
#: A hook of transformers' gradient checkpointing; the fused path trains without it.
_HARMLESS_HOOK = "make_inputs_require_grads"
#: Methods that an instance may override.
_METHODS = ("forward", "add_norm", "transform", "attention", "embed", "encode", "feed_forward_chunk")
_KINDS = {cls: typing.get_type_hints(cls) for cls in (Embedding, Layer)}


def expect(module: Any, *classes: type) -> None:
    """Raises NotExactError unless the class of `module` is one of `classes`, without hooks and overridden methods."""
    found = type(module)
    if found not in classes:
        same_name = any(found.__name__ == cls.__name__ for cls in classes)
        raise NotExactError(module, f"is a {found.__module__ + '.' if same_name else ''}{found.__name__}")
    state = vars(module)
    for name in _HOOKS:
        if any(getattr(hook, "__name__", "") != _HARMLESS_HOOK for hook in state[name].values()):
            raise NotExactError(module, "has hooks")
    for name in _METHODS:
        if name in state:
            raise NotExactError(module, f"has a {name} of its own")


def exact(parts: P) -> P:
    """The parts. Raises NotExactError for a module that is not what is assumed, except one in the place of a Linear."""
    for name, kind in _KINDS[type(parts)].items():
        module = getattr(parts, name)
        if name in LINEARS or not isinstance(module, nn.Module):
            continue
        expect(module, kind)
        if isinstance(module, nn.Dropout):
            if not 0.0 <= module.p < 1.0:
                raise NotExactError(module, f"drops with p = {module.p}")
        elif isinstance(module, nn.Embedding):
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
                raise NotExactError(module, "has max_norm, scale_grad_by_freq or sparse set")
        elif module.weight is None or module.bias is None:
            raise NotExactError(module, "has no weight or no bias")
    return parts


def exact_layer(parts: Layer, attention: Any) -> Layer:
    """`exact` for a layer with self-attention module `attention`: checks shapes too, and names the foreign parts."""
    exact(parts)
    width = parts.attention_norm.weight.shape[0]
    first, second = parts.interm_dense, parts.out_dense
    inner = first.weight.shape[0] if type(first) is nn.Linear else None
    if inner is None and type(second) is nn.Linear:
        inner = second.weight.shape[1]
    shapes: dict[str, list[Any]] = {name: [width, width] for name in LINEARS}
    shapes |= {"interm_dense": [inner, width], "out_dense": [width, inner], "out_norm": [width]}
    for name, shape in shapes.items():
        module: Any = getattr(parts, name)
        if (name == "out_norm" or type(module) is nn.Linear) and list(module.weight.shape) != shape:
            raise NotExactError(module, f"has a weight of shape {list(module.weight.shape)}, not {shape}")
    heads, size = attention.num_attention_heads, attention.attention_head_size
    if heads * size != width:
        raise NotExactError(attention, f"has {heads} heads of {size}")
    return parts._replace(foreign=tuple(name for name in LINEARS if why_foreign(getattr(parts, name))))


def why_foreign(module: Any) -> str | None:
    """Why the fused path calls a module in the place of a Linear; None for a plain Linear with a bias."""
    try:
        expect(module, nn.Linear)
    except NotExactError as found:
        return str(found)
    return "has no bias" if module.bias is None else None


def constant_when_compiled(function: F) -> F:
    """The same as torch.compiler.assume_constant_result, which would import the whole compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# ---- The cached answer ---------------------------------------------------------------------------------------------

#: Attributes that the answer depends on, besides class, hooks, parameters and children: by class, and of all other modules.
_WATCHED: dict[type, tuple[str, ...]] = {
    nn.Linear: ("forward",),
    nn.LayerNorm: ("forward",),
    nn.Dropout: ("forward", "p"),
    nn.Embedding: ("forward", "max_norm", "scale_grad_by_freq", "sparse"),
}
_WATCHED_ELSEWHERE = (*_METHODS, "interm_af", "act", "num_attention_heads", "attention_head_size")


#: root -> its fingerprint, the answer, and its parameters: while these live, no other tensor gets the id of one of them.
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[list[object], Plan, list[Tensor]]] = weakref.WeakKeyDictionary()


def plan(
    root: nn.Module,
    embedding: Callable[[], Embedding] | None,
    layers: Iterable[nn.Module],
    layer: Callable[[Any], Layer],
    extra: Iterable[object] = (),
) -> Plan:
    """The parts of `root` that the fused path computes, as a fresh look would find them.

    `embedding()` and `layer(module)` read the parts of the embeddings and of one of `layers`, and raise NotExactError.
    They see only modules below `root`; `extra` holds everything else that they depend on.
    """
    fingerprint = _fingerprint(root)
    fingerprint += extra
    known = _seen.get(root)
    if known is not None and known[0] == fingerprint:
        return known[1]
    names = {module: name for name, module in root.named_modules()}
    reasons: dict[str, str] = {}  # why -> the first module of which that is true

    def look(read: Callable[..., T], *arguments: Any) -> T | None:
        try:
            if any(_GLOBAL_HOOKS):
                raise NotExactError(torch_module, "has global hooks")  # type: ignore[arg-type]
            return read(*arguments)
        except NotExactError as found:
            place = names.get(found.module) or getattr(found.module, "__name__", type(found.module).__name__)
            reasons.setdefault(str(found), str(place))
            return None

    found = look(embedding) if embedding else None
    parts = tuple(look(layer, module) for module in layers)
    for foreign in [getattr(part, name) for part in parts if part is not None for name in part.foreign]:
        reasons.setdefault(str(why_foreign(foreign)), names[foreign])
    fresh = Plan(found, parts, tuple(f"{where} {why}" for why, where in reasons.items()))
    parameters: list[Tensor] = [p for m in root.modules() for p in m._parameters.values() if p is not None]
    _seen[root] = (fingerprint, fresh, parameters)
    return fresh


def warn_once(warned: set[str], messages: Iterable[str], stacklevel: int) -> None:
    """Warns of the messages that are not in `warned` yet; `stacklevel` counts from the caller."""
    for words in messages:
        if words not in warned:
            warned.add(words)
            warnings.warn(words, stacklevel=stacklevel + 1)


def _fingerprint(root: nn.Module) -> list[object]:
    """Everything the answer depends on, comparable in microseconds: equal lists mean an equal answer."""
    seen: list[object] = []
    stack: list[Any] = [root]
    for hooks in _GLOBAL_HOOKS:
        seen += hooks
    while stack:
        module = stack.pop()
        state = module.__dict__
        cls = type(module)
        seen.append(cls)
        seen += map(state.get, _WATCHED.get(cls, _WATCHED_ELSEWHERE))
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            seen += (number for name in _HOOKS for number in state[name])
        if parameters := state["_parameters"]:
            seen += map(id, parameters.values())
        if children := state["_modules"]:
            seen += children.values()
            stack += [child for child in children.values() if child is not None]
    return seen
