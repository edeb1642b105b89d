# SPDX-License-Identifier: Apache-2.0
"""Flat parameters, and the per-task gradient buffer J.

Every parameter is a view into one contiguous fp32 buffer, so that an optimizer step is a pass over memory and query,
key and value are one matrix. The buffer has four regions, each a range of elements:

    | shared                        | words            | heads                       | frozen |
    | encoder and tied head layers: | word embedding,  | each head's own: ordinary   |        |
    | J [T, shared]                 | row-sparse J     | gradients, no surgery       |        |

A second buffer of the same layout holds the copy in the dtype that matrix products run in (bf16), written by the
optimizer in the same pass; in fp32 the two are one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn

from minbert_fast import ops
from minbert_fast.common import huge_pages

ALIGNMENT = 64  # elements; a cache line of fp32 is 16, of bf16 32: every parameter starts on one in both buffers


@dataclass(frozen=True)
class Entry:
    """A parameter to be laid out: its name, and the settings that its optimizer step uses."""

    name: str
    parameter: nn.Parameter
    lr_factor: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the flat buffers."""

    name: str
    begin: int
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.begin + self.shape.numel()


@dataclass(frozen=True)
class Run:
    """A range of elements with the same optimizer settings; `label` names what takes its step together."""

    label: str
    begin: int
    end: int
    lr_factor: float
    weight_decay: float


@dataclass(frozen=True)
class Piece:
    """Elements [begin, end) of one run, and where an optimizer that need not hold the rest keeps theirs: from `at` on."""

    run: Run
    begin: int
    end: int
    at: int

    @property
    def kept(self) -> slice:
        """The piece's place in the optimizer's moments (and, of the shared region, in J)."""
        return slice(self.at, self.at + self.end - self.begin)


@dataclass
class _Layout:
    end: int = 0
    runs: list[Run] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)

    def place(self, label: str, entries: Iterable[Entry]) -> None:
        """Entries end to end, those with the same settings together (in the order given, so that qkv stay adjacent)."""
        by_settings: dict[tuple[float, float], list[Entry]] = {}
        for entry in entries:
            by_settings.setdefault((entry.lr_factor, entry.weight_decay), []).append(entry)
        for (lr_factor, weight_decay), group in by_settings.items():
            begin = self.end
            for entry in group:
                if id(entry.parameter) in self.slots:
                    raise ValueError(f"parameter {entry.name} is laid out twice")
                self.slots[id(entry.parameter)] = Slot(entry.name, self.end, entry.parameter.shape)
                self.end += -(-entry.parameter.numel() // ALIGNMENT) * ALIGNMENT
            self.runs.append(Run(label, begin, self.end, lr_factor, weight_decay))


class FlatParameters:
    """Moves parameters into one buffer (their `.data` become views) and knows where each lies.

    `shared`: entries of the surgery's region; `words`: the word embedding, when its gradient is kept row-sparse;
    `heads[name]`: entries that belong to one task alone; `frozen`: parameters that only need their copy for products.
    `dtype` is that of matrix products: fp32 or bf16. Raises ValueError for mixed devices or non-fp32 parameters.
    """

    def __init__(
        self,
        shared: Sequence[Entry],
        words: Entry | None,
        heads: Mapping[str, Sequence[Entry]],
        frozen: Sequence[Entry],
        dtype: torch.dtype,
    ) -> None:
        everything = [*shared, *([words] if words else []), *(e for head in heads.values() for e in head), *frozen]
        if not everything:
            raise ValueError("no parameters to lay out")
        device = everything[0].parameter.device
        for entry in everything:
            if entry.parameter.device != device or entry.parameter.dtype != torch.float32:
                found = f"{entry.parameter.dtype} on {entry.parameter.device}"
                raise ValueError(f"parameter {entry.name} is {found}: expected torch.float32 on {device}")
        layout = _Layout()
        layout.place("shared", shared)
        self.shared_end = layout.end
        layout.place("words", [words] if words else [])
        self.words_end = layout.end
        for name, entries in heads.items():
            layout.place(name, entries)
        self.trainable_end = layout.end
        layout.place("frozen", frozen)
        self.runs = tuple(run for run in layout.runs if run.label != "frozen")
        self._slots = layout.slots
        self.words = words.parameter if words else None
        self.trainable = tuple(e for e in everything if e not in frozen)

        self.data = huge_pages.zeros(layout.end, device=device)
        self.compute = self.data if dtype == torch.float32 else huge_pages.zeros(layout.end, dtype=dtype, device=device)
        for entry in everything:
            view = self.view(self.data, entry.parameter)
            view.copy_(entry.parameter.detach())
            entry.parameter.data = view
        self.refresh()

    def __reduce__(self) -> NoReturn:
        """Refuses copying and pickling: a copy's parameters would no longer be views of its buffer."""
        raise TypeError("flat parameters cannot be copied or pickled: copy the model, and lay its parameters out again")

    def refresh(self) -> None:
        """Rewrites the product copy from the master weights (after loading; the optimizer keeps it current)."""
        if self.compute is not self.data:
            self.compute.copy_(self.data)

    def pieces(self) -> tuple[Piece, ...]:
        """Every trainable element, for an optimizer that holds all of them."""
        return tuple(Piece(run, run.begin, self._last(run), run.begin) for run in self.runs)

    def _last(self, run: Run) -> int:
        """Where the run's elements end; of the words, whole rows only."""
        return self.slot(self.words).end if run.label == "words" and self.words is not None else run.end

    def slot(self, parameter: Tensor) -> Slot:
        """Where `parameter` lies; KeyError when it is not laid out here."""
        return self._slots[id(parameter)]

    def slots(self) -> list[Slot]:
        """Every parameter's place, in the order of the buffers."""
        return sorted(self._slots.values(), key=lambda slot: slot.begin)

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._slots

    def view(self, buffer: Tensor, parameter: Tensor) -> Tensor:
        """The parameter's view [*shape] of a buffer [..., P] laid out like this one; leading dimensions are kept."""
        slot = self.slot(parameter)
        return buffer[..., slot.begin : slot.end].view((*buffer.shape[:-1], *slot.shape))

    def adjacent(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the parameters lie end to end without gaps, so that one view covers them."""
        slots = [self.slot(p) for p in parameters]
        return all(a.end == b.begin and a.shape[1:] == b.shape[1:] for a, b in itertools.pairwise(slots))

    def stacked(self, buffer: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """One view of adjacent parameters, stacked along their first dimension."""
        slots = [self.slot(p) for p in parameters]
        rows = sum(slot.shape[0] for slot in slots)
        view: Tensor = buffer[..., slots[0].begin : slots[-1].end].unflatten(-1, (rows, *slots[0].shape[1:]))
        return view


class TaskGradients:
    """J: the tasks' gradients of the shared region [T, shared], and of the word embedding's touched rows [T, U, H].

    Rows are overwritten by each backward; gaps between parameters stay zero.
    """

    def __init__(self, flat: FlatParameters, tasks: int, dtype: torch.dtype) -> None:
        self.flat = flat
        self.tasks = tasks
        self.J = huge_pages.zeros(tasks, flat.shared_end, dtype=dtype, device=flat.data.device)
        self._words: Tensor | None = None

    def owns(self, parameter: Tensor) -> bool:
        """Whether `parameter` has a place in J (it is shared and trainable, and not the row-sparse word embedding)."""
        return parameter in self.flat and self.flat.slot(parameter).end <= self.flat.shared_end

    def view(self, parameter: Tensor) -> Tensor:
        """The parameter's gradients, one a task [T, *shape]."""
        return self.flat.view(self.J, parameter)

    def stacked(self, parameters: Sequence[Tensor]) -> Tensor:
        """One view [T, rows, ...] of adjacent parameters' gradients, stacked along their first dimension."""
        return self.flat.stacked(self.J, parameters)

    def zero(self) -> None:
        """No gradient of any shared parameter."""
        self.J.zero_()

    def gram(self, words: Tensor | None) -> Tensor:
        """G [T, T]: inner products of the tasks' gradients over the shared region and the words' rows [T, U, H]."""
        gram = ops.gram(self.J)
        return gram if words is None else ops.gram(words.flatten(1), gram, accumulate=True)

    def words(self, rows: int, width: int) -> Tensor:
        """Room for the gradients of `rows` distinct words [T, rows, width] (reused; it grows as needed)."""
        if self._words is None or self._words.numel() < self.tasks * rows * width:
            self._words = torch.empty(self.tasks * rows * width, dtype=self.J.dtype, device=self.J.device)
        return self._words[: self.tasks * rows * width].view(self.tasks, rows, width)

    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors in use at present, which later and larger batches may replace."""
        return (self.J,) if self._words is None else (self.J, self._words)
