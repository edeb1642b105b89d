# SPDX-License-Identifier: Apache-2.0
"""Data sets of the Hugging Face hub, through the `datasets` library; never with code from the hub."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from minbert_fast.common.errors import first_line
from minbert_fast.data.messages import DataError, show

SPLITS = {"train": ("train",), "dev": ("validation", "dev"), "test": ("test",)}  # where no split is named


def load_split(hub: str, config: str, split: str, named: str) -> tuple[str, Any] | None:
    """The name of a split and its `datasets.Dataset`; None if no split is named and the data set has none of the usual name.

    `hub` is a name on the hub, or a directory that `datasets` loads. Raises DataError (one line) if the data set or the
    named split does not exist, cannot be reached, or needs to run its own code.
    """
    splits = load(hub, config)
    wanted = (named,) if named else SPLITS[split]
    found = next((name for name in wanted if name in splits), None)
    if found is None:
        if named:
            raise DataError(f"{hub}: no split {show(named)}; it has {', '.join(splits)}")
        return None
    return found, splits[found]


@lru_cache(maxsize=8)
def load(hub: str, config: str) -> dict[str, Any]:
    """All splits of a data set by name. Raises DataError."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{hub}: a data set of the hub needs datasets: pip install 'minbert-fast[data]'") from None
    try:
        # Every failure is the data set's or the network's; the types of exception vary by version.
        return dict(datasets.load_dataset(hub, config or None))
    except Exception as error:
        raise DataError(f"{hub}: cannot be loaded by datasets: {first_line(error)}") from error
