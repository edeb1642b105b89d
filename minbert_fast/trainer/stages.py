# SPDX-License-Identifier: Apache-2.0
"""From a recipe's stage to what the loop runs: its rows in order, batches made ahead, and the step."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

import torch

from minbert_fast import surgery
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.data.buckets import EXACT, choose_buckets
from minbert_fast.data.collate import Collator, training_batches
from minbert_fast.data.prefetch import prefetch
from minbert_fast.data.sampling import Sampler
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.parallel.world import World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.captured import Captures, GraphedStep
from minbert_fast.step.extras.smart import check_smart
from minbert_fast.step.one_pass import OnePassStep, make_step
from minbert_fast.step.stepping import Backend, TrainingStep
from minbert_fast.tasks import MultitaskModel, build_tasks
from minbert_fast.tasks.labelled_sentences import check_encoder_frozen, embed_labelled_sentences
from minbert_fast.trainer.loop import Stage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Means:
    """What the stages of a run share."""

    model: MultitaskModel
    tokenizer: Tokenizer
    train: Mapping[str, TokenTable]
    device: torch.device
    precision: Literal["fp32", "bf16"]
    backend: Backend
    world: World
    captures: Captures  # on CUDA, of all stages


def make_stage(means: Means, whole: Recipe, index: int) -> Stage:
    """Stage number `index` of the recipe. Raises ConfigError for what it asks that there is not."""
    recipe = whole.resolved_stages()[index]
    tasks = build_tasks(recipe)
    # An unknown method is refused now, not when the stage begins.
    method = surgery.weights(recipe.surgery.method, recipe.surgery.reduction)
    tables = {name: means.train[name] for name in tasks}
    check_encoder_frozen(means.model, recipe)
    check_smart(recipe, means.backend)
    training = recipe.training
    encoders = {name: task.encoder for name, task in tasks.items()}
    sampler = Sampler.from_tables(
        tables,
        {name: task.options.batch_size or training.batch_size for name, task in tasks.items()},
        recipe.data.scheme,
        training.seed + index,  # each stage in an order of its own
        fractions={name: task.options.fraction for name, task in tasks.items()},
        balanced=[name for name, task in tasks.items() if task.options.balanced],
    )
    alone = means.world.size == 1 and means.backend == "fast"
    graphs = training.graphs and method.capturable and means.device.type == "cuda" and alone
    longest = recipe.data.max_length
    made = {name: task.example_generator(means.tokenizer, training.seed + index) for name, task in tasks.items()}
    makers = {name: maker for name, maker in made.items() if maker is not None}
    twins = frozenset(
        name for name, task in tasks.items() if recipe.regularisation.duplicates_examples and task.predicts
    )
    buckets = choose_buckets(sampler, tables, longest, encoders, twins) if graphs else EXACT
    collator = Collator(tables, longest, encoders, buckets, means.world.rank, means.world.size, twins, makers)
    own = whole.stages[index].get("training", {}) if whole.stages else {}
    steps = training.epochs * sampler.steps_per_epoch
    window = recipe.weighting.window or sampler.steps_per_epoch
    trained = replace(recipe, weighting=replace(recipe.weighting, window=window))

    def begin() -> TrainingStep:
        means.model.configure(tasks)
        embed_labelled_sentences(means.model, recipe, tables, means.precision)
        step = make_step(means.backend, means.model, trained, DTYPES[means.precision], means.world)
        if not graphs:
            return step
        assert isinstance(step, OnePassStep)
        return GraphedStep(step, means.captures)

    def batches(start: int) -> Generator[tuple[int, MultitaskBatch], None, None]:
        made = training_batches(sampler, collator, start, steps)
        if means.device.type == "cuda":
            made = ((step, batch.pin_memory()) for step, batch in made)
        with closing(prefetch(made)) as ahead:
            for step, batch in ahead:
                yield step, batch.to(means.device, non_blocking=True)

    return Stage(
        recipe=recipe,
        steps_per_epoch=sampler.steps_per_epoch,
        limit=own.get("max_steps"),
        # Further pre-training is not judged by heads that it does not train.
        patience=training.patience if any(task.predicts for task in tasks.values()) else 0,
        begin=begin,
        batches=batches,
        place=lambda task, row: tables[task].locate(row),
    )
