# SPDX-License-Identifier: Apache-2.0
"""The forms in which a caller passes examples: lists of sentences, lists of tuples, the columns of a DataFrame."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from minbert_fast.data.columns import usual_names
from minbert_fast.tasks.base import Task

Pair = tuple[str, str] | Sequence[str]


class DataFrame(Protocol):
    """The attributes of a pandas DataFrame that this package reads. It does not import pandas."""

    columns: Any
    index: Any
    iloc: Any

    def __getitem__(self, column: Any, /) -> Any: ...


def sentences(caller: str, values: Iterable[str]) -> list[str]:
    """The values as a list. Raises ValueError for a string or a DataFrame, whose items are not its sentences, or no list."""
    if is_frame(values):
        raise ValueError(f"{caller} takes sentences, not a DataFrame: pass one of its columns")
    _check_list(values, f"{caller} takes sentences")
    return list(values)


def columns(task: str, count: int, examples: Sequence[Any]) -> tuple[list[str], ...]:
    """One list per sentence of an example, from such lists or from one list of tuples. Raises ValueError."""
    for each in examples:
        _check_list(each, f"{task} takes lists of sentences")
    found = [list(each) for each in examples]
    if count > 1 and len(found) == 1:
        noun, number = {2: ("pair", "two"), 3: ("triple", "three")}.get(count, ("example", str(count)))
        for row, example in enumerate(found[0]):
            if isinstance(example, str) or not isinstance(example, Sequence) or len(example) != count:
                raise ValueError(f"{noun} {row} is {example!r:.60}, expected {number} sentences")
        found = [[example[place] for example in found[0]] for place in range(count)]
    if len(found) != count or len({len(column) for column in found}) > 1:
        several = f"{count} lists of sentences, equally long, or a list of tuples"
        raise ValueError(f"{task} takes {'one list of sentences' if count == 1 else several}")
    return tuple(found)


def _check_list(value: object, expected: str) -> None:
    """Raises ValueError, which begins with `expected`, for a string, bytes, or a value without items."""
    if isinstance(value, str | bytes) or not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
        raise ValueError(f"{expected}, not {'a string' if isinstance(value, str) else f'{value!r:.60}'}")


def is_frame(value: object) -> bool:
    """Whether `value` is a pandas DataFrame. Does not import pandas: without it in memory, no value is one."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def frame_columns(task: Task, frame: Any, text: str | Sequence[str] | None) -> tuple[list[str], ...]:
    """The sentences in the columns `text` of a DataFrame. Raises ValueError."""
    known = list(frame.columns)
    if text is None:
        usual = [source.texts for source in task.sources]  # the columns that the task was trained on
        usual += usual_names(task.num_texts)  # those that are looked for in files
        fitting = (names for names in usual if len(names) == task.num_texts and all(name in known for name in names))
        named = next(fitting, None)
        if named is None:
            columns = ", ".join(map(str, known))
            raise ValueError(f"{task.name} takes {task.num_texts} columns: name them as text=... (there are {columns})")
    else:
        named = (text,) if isinstance(text, str) else tuple(text)
    for name in named:
        if name not in known:
            raise ValueError(f"the DataFrame has no column {name!r} (it has {', '.join(map(str, known))})")
    if len(named) != task.num_texts:
        raise ValueError(f"{task.name} takes {task.num_texts} columns, text names {len(named)}")
    return tuple(frame[name].tolist() for name in named)
