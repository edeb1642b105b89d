# SPDX-License-Identifier: Apache-2.0
"""The embedded demonstration: sample data and a tiny model that ship with the package."""

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
    """The demonstration's directories as installed; `tools/make_sample.py` generates their files."""
    root = Path(str(resources.files("minbert_fast.data") / "sample"))
    return Sample(data=root, model=root / "model")
