# SPDX-License-Identifier: Apache-2.0
"""Flat parameters, and the per-task gradient buffer J.

Every parameter is a view into one contiguous fp32 buffer, so that an optimizer step is a pass over memory and query,
key and value are one matrix. The buffer has four regions:

    | shared                        | words            | heads                       | frozen |
    | encoder and tied head layers: | word embedding,  | each head's own: ordinary   |        |
    | J [T, shared]                 | row-sparse J     | gradients, no surgery       |        |

A second buffer of the same layout holds the copy in the dtype that matrix products run in (bf16), written by the
optimizer in the same pass; in fp32 the two are one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from minbert_fast import ops
from minbert_fast.common import huge_pages

ALIGNMENT = 64  # elements; a cache line of fp32 is 16, of bf16 32: every parameter starts on one in both buffers


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter, its name, and the settings of its optimizer step."""

    name: str
    parameter: nn.Parameter
    lr_factor: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class StageParameters:
    """The parameters of a training stage by role."""

    shared: Sequence[ParameterSpec]  # encoder and head layers that several tasks use: surgery acts on these
    words: ParameterSpec | None  # the word embedding, when its gradient is row-sparse
    heads: Mapping[str, Sequence[ParameterSpec]]  # of one task alone
    frozen: Sequence[ParameterSpec]  # need only their copy for matrix products

    def trained(self) -> Iterator[tuple[str, ParameterSpec]]:
        """Every trained parameter with the label of its group (see `ParameterGroup`)."""
        yield from (("shared", spec) for spec in self.shared)
        if self.words:
            yield "words", self.words
        yield from ((task, spec) for task, specs in self.heads.items() for spec in specs)


@dataclass(frozen=True)
class Placement:
    """The elements [begin, end) of the flat buffers that hold one parameter."""

    begin: int
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.begin + self.shape.numel()


@dataclass(frozen=True)
class ParameterGroup:
    """Elements [begin, end) with the same optimizer settings. `label` is "shared", "words", or a head's task."""

    label: str
    begin: int
    end: int
    lr_factor: float
    weight_decay: float


@dataclass(frozen=True)
class UpdateRange:
    """Elements [begin, end) of one group that an optimizer updates. Its moments of them start at its element `at`."""

    group: ParameterGroup
    begin: int
    end: int
    at: int

    @property
    def kept(self) -> slice:
        """The range's elements in the optimizer's moments (and, of the shared region, in J)."""
        return slice(self.at, self.at + self.end - self.begin)


class FlatParameters:
    """Moves parameters into one buffer (their `.data` become views of it) and finds each parameter there.

    Matrix products run in `dtype`, fp32 or bf16. Raises ValueError for mixed devices or non-fp32 parameters.
    """

    def __init__(self, parameters: StageParameters, dtype: torch.dtype) -> None:
        self.trainable = tuple(spec for _, spec in parameters.trained())
        everything = [*self.trainable, *parameters.frozen]
        words = parameters.words
        if not everything:
            raise ValueError("no parameters to lay out")
        device = everything[0].parameter.device
        for spec in everything:
            if spec.parameter.device != device or spec.parameter.dtype != torch.float32:
                found = f"{spec.parameter.dtype} on {spec.parameter.device}"
                raise ValueError(f"parameter {spec.name} is {found}: expected torch.float32 on {device}")
        self._placements: dict[int, Placement] = {}  # by id of the parameter
        self.groups: list[ParameterGroup] = []  # of the trainable regions
        self.shared_end = self._place("shared", parameters.shared, 0)
        self.words_end = self._place("words", [words] if words else [], self.shared_end)
        self.trainable_end = self.words_end
        for name, specs in parameters.heads.items():
            self.trainable_end = self._place(name, specs, self.trainable_end)
        trained = len(self.groups)
        end = self._place("frozen", parameters.frozen, self.trainable_end)
        del self.groups[trained:]
        self.words = words.parameter if words else None

        self.data = huge_pages.zeros(end, device=device)
        self.compute = self.data if dtype == torch.float32 else huge_pages.zeros(end, dtype=dtype, device=device)
        for spec in everything:
            view = self.view(self.data, spec.parameter)
            view.copy_(spec.parameter.detach())
            spec.parameter.data = view
        self.refresh()

    def _place(self, label: str, specs: Iterable[ParameterSpec], end: int) -> int:
        """Places parameters one after another from element `end` on, and returns the new end.

        Parameters with the same settings form a group. Within it they keep their order, so query, key and value stay
        adjacent.
        """
        by_settings: dict[tuple[float, float], list[ParameterSpec]] = {}
        for spec in specs:
            by_settings.setdefault((spec.lr_factor, spec.weight_decay), []).append(spec)
        for settings, group in by_settings.items():
            begin = end
            for spec in group:
                if id(spec.parameter) in self._placements:
                    raise ValueError(f"parameter {spec.name} is laid out twice")
                self._placements[id(spec.parameter)] = Placement(end, spec.parameter.shape)
                end += -(-spec.parameter.numel() // ALIGNMENT) * ALIGNMENT
            self.groups.append(ParameterGroup(label, begin, end, *settings))
        return end

    def __reduce__(self) -> NoReturn:
        """Refuses copying and pickling: a copy's parameters would no longer be views of its buffer."""
        raise TypeError("flat parameters cannot be copied or pickled: copy the model, and lay its parameters out again")

    def refresh(self) -> None:
        """Rewrites the product copy from the master weights (after loading; the optimizer keeps it current)."""
        if self.compute is not self.data:
            self.compute.copy_(self.data)

    def update_ranges(self) -> tuple[UpdateRange, ...]:
        """Every trainable element, for an optimizer that updates all of them. Of the words' group: whole rows only."""
        ends = [
            g.end if self.words is None or g.label != "words" else self.placement(self.words).end for g in self.groups
        ]
        return tuple(UpdateRange(g, g.begin, end, g.begin) for g, end in zip(self.groups, ends, strict=True))

    def placement(self, parameter: Tensor) -> Placement:
        """The elements of `parameter`. Raises KeyError for a parameter that is not in the buffers."""
        return self._placements[id(parameter)]

    def placements(self) -> list[Placement]:
        """The placement of every parameter, in the order of the buffers."""
        return sorted(self._placements.values(), key=lambda place: place.begin)

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._placements

    def view(self, buffer: Tensor, parameter: Tensor) -> Tensor:
        """The parameter's view [*shape] of a buffer [..., P] laid out like this one; leading dimensions are kept."""
        place = self.placement(parameter)
        return buffer[..., place.begin : place.end].view((*buffer.shape[:-1], *place.shape))

    def adjacent(self, parameters: Sequence[Tensor]) -> bool:
        """Whether each parameter starts where the one before it ends, so that one view covers them all."""
        places = [self.placement(p) for p in parameters]
        return all(a.end == b.begin and a.shape[1:] == b.shape[1:] for a, b in itertools.pairwise(places))

    def stacked(self, buffer: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """One view of adjacent parameters, stacked along their first dimension."""
        places = [self.placement(p) for p in parameters]
        rows = sum(place.shape[0] for place in places)
        view: Tensor = buffer[..., places[0].begin : places[-1].end].unflatten(-1, (rows, *places[0].shape[1:]))
        return view


class TaskGradients:
    """J: the tasks' gradients of the shared region [T, shared], and of the U rows of the word embedding that the batch uses.

    Each backward overwrites J. The gaps between parameters stay zero.
    """

    def __init__(self, flat: FlatParameters, tasks: int, dtype: torch.dtype) -> None:
        self.flat = flat
        self.tasks = tasks
        self.J = huge_pages.zeros(tasks, flat.shared_end, dtype=dtype, device=flat.data.device)
        self._words: Tensor | None = None

    def owns(self, parameter: Tensor) -> bool:
        """Whether J holds the gradients of `parameter`: it is trainable, shared, and not the row-sparse word embedding."""
        return parameter in self.flat and self.flat.placement(parameter).end <= self.flat.shared_end

    def view(self, parameter: Tensor) -> Tensor:
        """The parameter's gradients, one a task [T, *shape]."""
        return self.flat.view(self.J, parameter)

    def stacked(self, parameters: Sequence[Tensor]) -> Tensor:
        """One view [T, rows, ...] of adjacent parameters' gradients, stacked along their first dimension."""
        return self.flat.stacked(self.J, parameters)

    def gram(self, words: Tensor | None) -> Tensor:
        """G [T, T]: inner products of the tasks' gradients over the shared region and the words' rows [T, U, H]."""
        gram = ops.gram(self.J)
        return gram if words is None else ops.gram(words.flatten(1), gram, accumulate=True)

    def words(self, rows: int, width: int) -> Tensor:
        """A buffer [T, rows, width] for the gradients of `rows` distinct words. It is reused, and grows when needed."""
        if self._words is None or self._words.numel() < self.tasks * rows * width:
            self._words = torch.empty(self.tasks * rows * width, dtype=self.J.dtype, device=self.J.device)
        return self._words[: self.tasks * rows * width].view(self.tasks, rows, width)

    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors now in use. A larger batch may replace them."""
        return (self.J,) if self._words is None else (self.J, self._words)
