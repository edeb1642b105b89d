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
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
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
flatten = chain.from_iterable


class NotExactError(Exception):
    """A module is not what the fused path assumes."""

    def __init__(self, module: nn.Module, why: str) -> None:
        super().__init__(why)
        self.module = module


# ---- The close look ------------------------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)
#: Hooks of transformers: of gradient checkpointing, which the fused path does without, and of collecting attention maps and
#: hidden states, which stay in the model afterwards and do nothing.
_HARMLESS_HOOKS = ("make_inputs_require_grads", "output_capturing_hook")
#: Methods that an instance may override.
_METHODS = ("forward", "add_norm", "transform", "attention", "embed", "encode", "feed_forward_chunk")
_KINDS = {cls: typing.get_type_hints(cls) for cls in (Embedding, Layer)}
#: torch's functions as they were at import; a program may replace them for all modules.
_FORWARDS = {cls: cls.forward for cls in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding)}
GELU = nn.functional.gelu


def expect(module: Any, *classes: type) -> None:
    """Raises NotExactError unless the class of `module` is one of `classes`, without hooks and overridden methods."""
    found = type(module)
    if found not in classes:
        same_name = any(found.__name__ == cls.__name__ for cls in classes)
        raise NotExactError(module, f"is a {found.__module__ + '.' if same_name else ''}{found.__name__}")
    state = vars(module)
    for name in _HOOKS:
        if any(getattr(hook, "__name__", "") not in _HARMLESS_HOOKS for hook in state[name].values()):
            raise NotExactError(module, "has hooks")
    for name in _METHODS:
        if name in state:
            raise NotExactError(module, f"has its own {name}")
    if found.forward is not _FORWARDS.get(found, found.forward):
        raise NotExactError(module, "has a class whose methods were replaced")


def has_values(buffer: Tensor) -> bool:
    """Whether a buffer has values to look at: one on the meta device has none, nor has one in torch.export."""
    return type(buffer) is Tensor and not buffer.is_meta


def expect_counting(owner: nn.Module, positions: Tensor) -> None:
    """Raises NotExactError unless `positions` [1, S], a buffer of `owner`, are 0, 1, 2, ..."""
    if not has_values(positions):
        return
    count = torch.arange(positions.shape[1], device=positions.device)
    if not torch.equal(positions[0], count):
        raise NotExactError(owner, "has position_ids that do not count from 0")


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
_WATCHED_ELSEWHERE = (
    *_METHODS, "interm_af", "act", "num_attention_heads", "attention_head_size", "scaling", "is_causal",
)  # fmt: skip


class _Tree:
    """The modules of a tree, as they were found once. Does not keep the root alive."""

    def __init__(self, root: nn.Module) -> None:
        self.below = list(root.modules())[1:]
        self.states = [vars(module) for module in self.below]
        names = [_WATCHED.get(type(module), _WATCHED_ELSEWHERE) for module in self.below]
        self.watched = [name for each in names for name in each]
        self.watched_in = [state for state, each in zip(self.states, names, strict=True) for _ in each]

    def fingerprint(self, root: nn.Module) -> list[object]:
        """Everything the answer depends on: equal lists mean an equal answer.

        Every training step compares them, and every forward. So the loops over the modules run in C.
        """
        state = vars(root)
        states = [state, *self.states]
        seen: list[object] = [*flatten(_GLOBAL_HOOKS), type(root), *map(type, self.below)]
        seen += [cls.forward for cls in _FORWARDS]
        for hooks in _HOOKS:
            seen += flatten(filter(None, map(itemgetter(hooks), states)))
        for owned in ("_parameters", "_modules"):
            seen += map(id, flatten(map(dict.values, filter(None, map(itemgetter(owned), states)))))
        seen += map(state.get, _WATCHED.get(type(root), _WATCHED_ELSEWHERE))
        seen += map(dict.get, self.watched_in, self.watched)
        return seen


def version(buffer: Tensor | None) -> tuple[int, int]:
    """Changes when a buffer is replaced or written to."""
    return id(buffer), 0 if buffer is None or buffer.is_inference() else buffer._version


class _Seen(NamedTuple):
    """The last look at a tree."""

    tree: _Tree
    fingerprint: list[object]
    plan: Plan
    tensors: list[Tensor]  # while these live, no other tensor gets the id of one of them


_seen: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()


def _followed() -> bool:
    """Whether something follows the computation that the fused ops have no rule for."""
    traced = torch.is_grad_enabled() and torch._C._get_tracing_state() is not None
    return traced or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def plan(
    root: nn.Module,
    read_embedding: Callable[[], Embedding] | None,
    layers: Iterable[nn.Module],
    read_layer: Callable[[Any], Layer],
    extra: Sequence[object] = (),
) -> Plan:
    """The parts of `root` that the fused path computes, as a fresh look would find them.

    `read_embedding()` and `read_layer(module)` return the parts of the embeddings and of one of `layers`, or raise
    NotExactError. They see only `layers` and modules below `root`; `extra` holds everything else that they depend on. All
    parts are None where something follows the computation that the fused ops have no rule for.
    """
    if _followed():
        reason = "the call is inside torch.func, forward-mode differentiation or a trace with gradients"
        return Plan(None, (None,) * len(list(layers)), (reason,))
    known = _seen.get(root)
    if known is not None and known.fingerprint == [*known.tree.fingerprint(root), *extra]:
        return known.plan
    names = {module: name for name, module in root.named_modules()}
    reasons: dict[str, str] = {}  # why -> the first module of which that is true

    def place(module: Any) -> str:
        return str(names.get(module) or getattr(module, "__name__", type(module).__name__))

    def look(read: Callable[..., T], *arguments: Any) -> T | None:
        try:
            if any(_GLOBAL_HOOKS):
                raise NotExactError(torch_module, "has global hooks")  # type: ignore[arg-type]
            return read(*arguments)
        except NotExactError as found:
            reasons.setdefault(str(found), place(found.module))
            return None

    found = look(read_embedding) if read_embedding else None
    parts = tuple(look(read_layer, module) for module in layers)
    for foreign in [getattr(part, name) for part in parts if part is not None for name in part.foreign]:
        reasons.setdefault(str(why_foreign(foreign)), place(foreign))
    fresh = Plan(found, parts, tuple(f"{where} {why}" for why, where in reasons.items()))
    if any(module not in names for module in layers):
        return fresh  # not kept: the fingerprint does not see the layers of a plain list change
    owned = flatten((m._parameters | m._buffers).values() for m in root.modules())
    tree = _Tree(root)
    _seen[root] = _Seen(tree, [*tree.fingerprint(root), *extra], fresh, [t for t in owned if t is not None])
    return fresh


def warn_once(warned: set[str], messages: Iterable[str], stacklevel: int) -> None:
    """Warns of the messages that are not in `warned` yet; `stacklevel` counts from the caller."""
    for words in messages:
        if words not in warned:
            warned.add(words)
            warnings.warn(words, stacklevel=stacklevel + 1)
