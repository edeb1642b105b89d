# SPDX-License-Identifier: Apache-2.0
"""Compares the loss curves of bf16 and fp32 training with the noise of another seed.

    python -m benchmarks.precision [--data DIR --model DIR] [--steps 300] [--batch-size 32] [--json FILE]

Three runs start from the same weights and see the same batches: fp32, bf16, and fp32 with another seed for dropout and
task orders. Curves are means over windows of steps. bf16 trains as well as fp32 if its curve is no further from fp32's
than that of the other seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from minbert_fast import BertModel
from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.data.cache import load_tokens
from minbert_fast.data.collate import Collator
from minbert_fast.data.formats import find_tables
from minbert_fast.data.inputs import file_input
from minbert_fast.data.sampling import Sampler
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel, build_tasks

RUNS = {"fp32": (torch.float32, 0), "bf16": (torch.bfloat16, 0), "fp32, another seed": (torch.float32, 1)}


@dataclass(frozen=True)
class Comparison:
    """Mean losses by run, task and window of steps, and the mean distances of two runs from fp32."""

    steps: int
    window: int
    curves: dict[str, dict[str, list[float]]]
    bf16_distance: dict[str, float]  # by task: mean over windows of |bf16 - fp32|
    seed_distance: dict[str, float]  # the same for the other seed


def compare(
    data: Path, model: Path, steps: int, batch_size: int, window: int, recipe: Recipe, progress: bool = False
) -> Comparison:
    """Trains the three runs on a CPU."""
    tokenizer = Tokenizer.from_pretrained(model)
    tasks = build_tasks(recipe)
    paths = find_tables(data, "train", tuple(task.layout for task in tasks.values())).paths
    files = {name: file_input(paths[task.layout], task.layout) for name, task in tasks.items()}
    tables = {name: load_tokens(file, file.layout.rule, tokenizer) for name, file in files.items()}
    sampler = Sampler.from_tables(tables, batch_size, seed=0)
    collator = Collator(tables, recipe.data.max_length)
    curves = {}
    for name, (dtype, seed) in RUNS.items():
        torch.manual_seed(0)
        network = MultitaskModel(BertModel.from_pretrained(model), tasks, recipe.model.pooling)
        own = recipe.with_values({"training": {"seed": recipe.training.seed + seed}}, "precision")
        step = OnePassStep(network, own, dtype)
        losses = []
        for index in range(steps):
            losses.append(step(collator(sampler.rows(index), index), 1.0).losses.tolist())
            if progress and (index + 1) % window == 0:
                print(f"{name}: step {index + 1} of {steps}", file=sys.stderr, flush=True)
        means = np.array(losses)[: steps - steps % window].reshape(-1, window, len(tasks)).mean(1)
        curves[name] = {task: means[:, column].tolist() for column, task in enumerate(tasks)}

    def distance(run: str) -> dict[str, float]:
        pairs = {task: zip(curves[run][task], curves["fp32"][task], strict=True) for task in tasks}
        return {task: statistics.fmean(abs(a - b) for a, b in both) for task, both in pairs.items()}

    return Comparison(steps, window, curves, distance("bf16"), distance("fp32, another seed"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    sample = sample_directory()
    found = compare(
        options.data or sample.data,
        options.model or sample.model,
        options.steps,
        options.batch_size,
        window=max(1, options.steps // 10),
        recipe=Recipe.load("default" if options.model else "demonstration"),
        progress=True,
    )
    for task, own in found.bf16_distance.items():
        print(f"{task:12} |bf16 - fp32| {own:.4f}   |another seed - fp32| {found.seed_distance[task]:.4f}")
    if options.json:
        where = harness.environment(torch.device("cpu"), harness.ceilings(torch.device("cpu")))
        options.json.write_text(json.dumps({**where, **asdict(found)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
