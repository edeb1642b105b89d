# SPDX-License-Identifier: Apache-2.0
"""Builds what the loop runs for one stage of a recipe: the order of rows, prefetched batches, and the training step."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from minbert_fast import surgery
from minbert_fast.common.device import DTYPES, Precision
from minbert_fast.common.schema import ConfigError, check
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.data.buckets import EXACT, ROUNDED, choose_buckets
from minbert_fast.data.collate import Collator
from minbert_fast.data.prefetch import prefetch
from minbert_fast.data.sampling import Sampler
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model.rows import PackedRows
from minbert_fast.model.snapshot import Snapshot
from minbert_fast.parallel.sharding import connect
from minbert_fast.parallel.world import World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.backends import Backend, make_step
from minbert_fast.step.captured import Captures, GraphedStep
from minbert_fast.step.extras.consistency import check_smart
from minbert_fast.step.extras.weighting import METHODS as WEIGHTINGS
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.step.stepping import TrainingStep
from minbert_fast.tasks import MultitaskModel, Task, build_tasks
from minbert_fast.trainer.plan import Stage, schedule_steps

CHUNK = 256  # labelled sentences that are embedded at a time


@dataclass(frozen=True)
class StageContext:
    """The objects that all stages of a run share."""

    model: MultitaskModel
    tokenizer: Tokenizer
    train: Sequence[Mapping[str, TokenTable]]  # training rows by stage and task
    device: torch.device
    precision: Precision
    backend: Backend
    world: World
    captures: Captures  # CUDA graphs, counted over all stages


# Values that a run has once, so that a stage cannot replace them; `TaskOptions.once` has those of a task.
OF_THE_RUN = {
    "model": ("name", "pooling", "dropout"),
    "data": ("directory", "files", "cache", "max_bad_rows", "holdout"),
    "training": ("precision", "evaluate_untrained", "evaluate_train", "best_per_task", "max_skipped"),
    "checkpoint": ("every", "keep"),
    "logging": ("every",),
}


def build_stage(context: StageContext, whole: Recipe, index: int) -> Stage:
    """Builds stage number `index` of the recipe. Raises ConfigError for values that cannot be carried out."""
    recipe = whole.resolved_stages()[index]
    training = recipe.training
    tables = context.train[index]
    tasks = {name: task for name, task in build_tasks(recipe).items() if name in tables}
    # Those of earlier stages too: a run that is resumed in this stage did not run them.
    begun = {name: task for name, task in build_tasks(whole, index + 1).items() if name in context.model.tasks}
    _check_values_of_the_run(whole, recipe, index, context.model.tasks, tasks)
    context.model.check_stage(begun)  # now, not when the stages before it have run
    weighting, known = recipe.weighting.method, ("none", *WEIGHTINGS)
    check(weighting in known, f"weighting.method = {weighting!r}: expected one of {', '.join(known)}")
    _check_encoder_frozen(context.model, recipe)
    check_smart(recipe, context.backend)
    method = surgery.weights(recipe.surgery.method, recipe.surgery.reduction)  # raises before the first step
    one_process = context.world.size == 1 and context.backend == "fast"
    graphs = training.graphs and method.capturable and context.device.type == "cuda" and one_process
    seed = training.seed + index  # every stage draws its own order
    sampler = Sampler.from_tables(
        tables,
        {name: task.options.batch_size or training.batch_size for name, task in tasks.items()},
        recipe.data.scheme,
        seed,
        draws={name: task.options.draw for name, task in tasks.items()},
    )
    collator = _collator(context, recipe, tables, tasks, seed, sampler if graphs else None)
    window = recipe.weighting.window or sampler.steps_per_epoch
    with_window = replace(recipe, weighting=replace(recipe.weighting, window=window))

    def build_step() -> TrainingStep:
        context.model.configure(begun, index + 1)
        _embed_labelled_sentences(context.model, recipe, tables, context.precision)
        connected = connect(context.world, training.shard)
        step = make_step(context.backend, context.model, with_window, DTYPES[context.precision], connected)
        if not graphs:
            return step
        assert isinstance(step, OnePassStep)
        return GraphedStep(step, context.captures)

    def batches(first: int, end: int) -> Generator[MultitaskBatch, None, None]:
        made = (collator(sampler.rows(step), step) for step in range(first, end))
        if context.device.type == "cuda":
            made = (batch.pin_memory() for batch in made)
        with closing(prefetch(made)) as ahead:
            for batch in ahead:
                # A graph copies its batch itself.
                yield batch if graphs else batch.to(context.device, non_blocking=True)

    own = whole.stages[index].get("training", {}).get("max_steps") if whole.stages else None
    return Stage(
        recipe=recipe,
        steps_per_epoch=sampler.steps_per_epoch,
        steps=schedule_steps(training.epochs, sampler.steps_per_epoch) if own is None else own,
        # Further pre-training does not train the heads that the dev scores come from.
        patience=training.patience if any(task.predicts for task in tasks.values()) else 0,
        build_step=build_step,
        batches=batches,
        locate=lambda task, row: tables[task].locate(row),
    )


def _collator(
    context: StageContext,
    recipe: Recipe,
    tables: Mapping[str, TokenTable],
    tasks: Mapping[str, Task],
    seed: int,
    sampler: Sampler | None,
) -> Collator:
    """Packs the stage's rows. With `sampler` the batches have few sizes, which its draws need and CUDA graphs take."""
    max_length = min(recipe.data.max_length, context.model.encoder.config.max_position_embeddings)
    encoders = {name: task.encoder for name, task in tasks.items()}
    doubled = recipe.regularisation.duplicates_examples
    twins = frozenset(name for name, task in tasks.items() if doubled and task.predicts)
    compiles = (context.device.type, context.precision, context.backend) == ("cpu", "bf16", "fast")
    buckets = ROUNDED if compiles else EXACT
    if sampler is not None:
        buckets = choose_buckets(sampler, tables, max_length, encoders, twins)
    made = {name: task.example_generator(context.tokenizer, seed) for name, task in tasks.items()}
    makers = {name: maker for name, maker in made.items() if maker is not None}
    return Collator(tables, max_length, encoders, buckets, context.world.rank, context.world.size, twins, makers)


def _check_values_of_the_run(
    whole: Recipe, recipe: Recipe, index: int, known: Mapping[str, Task], tasks: Mapping[str, Task]
) -> None:
    """Raises ConfigError if the stage's `recipe` or `tasks` differ from the run's in a value that a run has once."""
    pairs = [(section, getattr(whole, section), getattr(recipe, section), keys) for section, keys in OF_THE_RUN.items()]
    for name, task in tasks.items():
        pairs.append((f"tasks.{name}", known[name].options, task.options, task.options.once()))
    for section, ours, theirs, keys in pairs:
        for key in keys:
            where = f"stages[{index}].{section}.{key} = {getattr(theirs, key)!r}"
            check(getattr(ours, key) == getattr(theirs, key), f"{where}: a run has it once; set it in [{section}]")


def _check_encoder_frozen(model: MultitaskModel, recipe: Recipe) -> None:
    """Raises ConfigError if a stage with labelled sentences trains the encoder: their embeddings would be outdated."""
    for name in recipe.tasks:
        if model.head(name).labelled_sentences() is not None and not recipe.model.freeze:
            raise ConfigError(f"tasks.{name}.neighbours: the stage that trains it needs model.freeze = true")


@torch.no_grad()
def _embed_labelled_sentences(
    model: MultitaskModel, recipe: Recipe, tables: Mapping[str, TokenTable], precision: Precision
) -> None:
    """Chooses and embeds the labelled sentences of a stage's heads with the current encoder.

    Weights, data and seed alone determine them, so a resumed run stores the same ones. Raises ConfigError.
    """
    for name, table in tables.items():
        stored = model.head(name).labelled_sentences()
        if stored is None:
            continue
        assert table.labels is not None
        try:
            rows = stored.choose(table.labels, recipe.training.seed)
        except ValueError as error:
            raise ConfigError(f"tasks.{name}.neighbours: {table.path}: {error}") from None
        collate, snapshot = Collator({name: table}, recipe.data.max_length), Snapshot(model.encoder, DTYPES[precision])
        vectors: list[torch.Tensor] = []
        for begin in range(0, len(rows), CHUNK):
            batch = collate({name: rows[begin : begin + CHUNK]}).to(stored.vectors.device)
            vectors += model.inputs(batch, snapshot.hidden(PackedRows.of(batch.packed)))[name].embeddings
        stored.store(torch.cat(vectors), torch.from_numpy(table.labels[rows]))
