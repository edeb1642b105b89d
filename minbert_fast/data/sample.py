# SPDX-License-Identifier: Apache-2.0
"""The embedded demonstration: where the sample data and the tiny model that ship with the package lie."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """The demonstration's directories."""

    data: Path  # {ids-sst,quora,sts}-{train,dev}.csv in the course's layout
    model: Path  # config.json, model.safetensors (random weights), tokenizer.json, vocab.txt


def sample_directory() -> Sample:
    """The demonstration as installed. `python -m minbert_fast.data.make_sample` makes it anew."""
    root = Path(str(resources.files("minbert_fast.data") / "sample"))
    return Sample(data=root, model=root / "model")
