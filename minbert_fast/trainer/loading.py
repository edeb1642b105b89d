# SPDX-License-Identifier: Apache-2.0
"""Loads what a run works on: tokenizer, data, model and stages, with a line for the user about each thing to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from minbert_fast.common.device import Precision
from minbert_fast.common.provenance import tensors_digest
from minbert_fast.common.schema import ConfigError, check
from minbert_fast.data.sample import sample_directory
from minbert_fast.data.sampling import subset
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model import weights
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import BertConfig
from minbert_fast.parallel.world import World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.backends import Backend
from minbert_fast.step.captured import Captures
from minbert_fast.tasks import MultitaskModel, Task
from minbert_fast.tasks.inference import evaluation
from minbert_fast.tasks.unused import unused_values
from minbert_fast.trainer import plan
from minbert_fast.trainer.datasets import Datasets, load_datasets
from minbert_fast.trainer.resume import fixed_values
from minbert_fast.trainer.stages import StageContext, build_stage
from minbert_fast.trainer.table_reader import Rows, names_data

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """The conditions of a run, which are known before anything is loaded."""

    recipe: Recipe
    rows: Rows  # in memory
    world: World
    device: torch.device
    backend: Backend
    precision: Precision
    commit: str | None
    notices: list[str] = field(default_factory=list)  # lines for summary.json

    @property
    def names_data(self) -> bool:
        """Whether the run has data of its own: files of a task, a data directory, or rows in memory."""
        data = self.recipe.data
        return bool(data.directory or data.files or self.rows) or names_data(self.recipe)

    @property
    def demonstration(self) -> bool:
        """Whether the run has neither weights nor data of its own."""
        return not self.recipe.model.name and not self.names_data

    def print(self, line: str) -> None:
        """Prints a line, on rank 0 alone."""
        if self.world.is_main:
            print(line, flush=True)

    def notify(self, line: str) -> None:
        """Prints a line and keeps it for summary.json. A line that comes again, for another file, is left out."""
        if line in self.notices:
            return
        self.notices.append(line)
        self.print(line)


@dataclass(frozen=True)
class Loaded:
    """What a run works on."""

    recipe: Recipe  # complete: data and model have decided what was open
    tokenizer: Tokenizer
    data: Datasets
    model: MultitaskModel
    stages: Sequence[plan.Stage]
    captures: Captures
    dev: Mapping[str, TokenTable]  # the rows that evaluations read, by task
    scored_train: Mapping[str, TokenTable]  # training rows that evaluations score too
    fingerprint: Mapping[str, Any]  # the values that a resumed run must share with the interrupted one

    def save(self, directory: Path) -> None:
        """Writes the model directory."""
        self.model.save(directory, self.recipe.to_toml(), self.tokenizer)


def load(setting: Setting) -> Loaded:
    """Loads everything and calls `setting.notify`. Raises ConfigError or DataError for a mistake of the user."""
    name, notify = setting.recipe.model.name, setting.notify
    if setting.names_data and not name:
        notify("no --model: trains the embedded tiny model, whose weights are random: it cannot learn much")
    if name and not setting.names_data:
        notify("no --data: trains on the embedded sample of made-up sentences")
    source = weights.resolve(name) if name else sample_directory().model
    tokenizer = Tokenizer.from_pretrained(_tokenizer_directory(source))
    data = _load_data(setting, tokenizer)
    dropout = data.recipe.model.dropout
    overrides: dict[str, Any] = {} if dropout is None else dict.fromkeys(DROPOUTS, dropout)
    encoder = BertModel.from_pretrained(source, **overrides)
    recipe = _within_sizes(data.recipe, encoder.config, tokenizer, notify)
    fingerprint = {
        "recipe": fixed_values(recipe),
        "data": data.fingerprint(),
        "model": {"weights": tensors_digest(encoder.state_dict()), "tokenizer": tokenizer.fingerprint},
        "backend": setting.backend,
        "precision": setting.precision,
    }
    torch.manual_seed(recipe.training.seed)  # for the initial weights of the heads
    model = MultitaskModel(encoder, data.tasks, recipe.model.pooling).to(setting.device)
    _initialise_heads(model, source, notify)
    captures = Captures()
    where = setting.device, setting.precision, setting.backend, setting.world
    context = StageContext(model, tokenizer, data.train, *where, captures)
    stages = [build_stage(context, recipe, i) for i in range(len(recipe.resolved_stages()))]
    stages = plan.share_steps(stages, recipe.training.max_steps)
    for line in dict.fromkeys(line for stage in stages for line in unused_values(stage.recipe)):
        notify(line)
    for line in without_effect([stage.recipe for stage in stages], data.tasks):
        notify(line)
    _check_select(recipe, stages, data, notify)
    dev, scored_train = _scored_rows(recipe, data)
    if not dev:
        values = [stage.recipe.training.needing_evaluations() for stage in stages]
        for each in dict.fromkeys(f"training.{k} = {v!r}" for found in values for k, v in found.items()):
            notify(f"{each} has no effect: without dev rows there are no evaluations")
    return Loaded(recipe, tokenizer, data, model, stages, captures, dev, scored_train, fingerprint)


def without_effect(stages: Sequence[Recipe], tasks: Mapping[str, Task]) -> Iterator[str]:
    """A line for each value that the first stage has and that no stage uses, for reasons that lie in the whole run."""
    first = stages[0]
    if all(stage.model.freeze for stage in stages):
        options = first.optimizer
        if options.head_lr is not None:
            rate = f"the heads have optimizer.head_lr = {options.head_lr:g}"
            yield f"optimizer.lr = {options.lr:g} is not used: the encoder is frozen, and {rate}"
        if options.layer_decay != 1:
            yield f"optimizer.layer_decay = {options.layer_decay:g} is not used: the encoder is frozen"
    if not any(task.predicts for task in tasks.values()):
        for key in ("r_drop", "smart", "proximal"):
            if weight := getattr(first.regularisation, key):
                yield f"regularisation.{key} = {weight:g} is not used: it belongs to tasks with predictions"


def _tokenizer_directory(source: Path) -> Path:
    """The directory of a model's tokenizer files. Raises ConfigError for a `.pt` file without a vocab.txt next to it."""
    if source.is_dir():
        return source
    if not any((source.parent / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ConfigError(f"{source}: no vocab.txt next to it; expected the one of the weights it was trained from")
    return source.parent


def _load_data(setting: Setting, tokenizer: Tokenizer) -> Datasets:
    """The tables of all tasks. Rank 0 reads first and fills the cache for the others."""
    world = setting.world
    if not world.is_main:
        world.wait()
    data = load_datasets(setting.recipe, tokenizer, setting.notify, setting.rows)
    if world.is_main:
        world.wait()
    comparing = [name for name, task in data.tasks.items() if task.compares_examples]
    if world.size > 1 and comparing:
        setting.notify(
            f"the loss of {', '.join(comparing)} compares the examples of a batch: each of the {world.size} "
            "processes compares its own, so the steps differ from those of one process"
        )
    return data


def _within_sizes(recipe: Recipe, config: BertConfig, tokenizer: Tokenizer, notify: Notify) -> Recipe:
    """The recipe with no sentence longer than the model's positions. Raises ConfigError for words that it lacks."""
    pieces, rows = tokenizer.vocab_size, config.vocab_size
    check(pieces <= rows, f"the tokenizer has {pieces:,} word pieces, the model only {rows:,}")
    positions, lengths = config.max_position_embeddings, [r.data.max_length for r in recipe.resolved_stages()]
    if max(recipe.data.max_length, *lengths) <= positions:
        return recipe
    notify(f"the model has {positions} positions: longer sentences are cut to them")
    return replace(recipe, data=replace(recipe.data, max_length=min(recipe.data.max_length, positions)))


def _initialise_heads(model: MultitaskModel, source: Path, notify: Notify) -> None:
    """Lets heads start from those of a trained model or of BERT's own pre-training in `source`, and says which do."""
    if (source / "heads.safetensors").is_file():
        copied, reasons = model.continue_heads(source)
        anew = "; ".join(f"{name} drawn anew ({reason})" for name, reason in reasons.items())
        kept = f"heads of {', '.join(copied)} continue" if copied else "no head continues"
        notify(f"--model {source} is a trained model: {kept}{anew and f'; {anew}'}")
    elif not all(task.predicts for task in model.tasks.values()):  # further pre-training
        for task in model.load_pretraining_heads(weights.pretraining_heads(source), str(source)):
            notify(f"tasks.{task} starts from the model's own pre-training head")


def _check_select(recipe: Recipe, stages: Sequence[plan.Stage], data: Datasets, notify: Notify) -> None:
    """Raises ConfigError for an unknown `training.select` now, not at the first evaluation hours later.

    Says which tasks the score leaves out.
    """
    judged = {name: (data.tasks[name], data.tasks[name].metric_names) for name in data.dev}
    known = ["score"]
    for name, (_, metrics) in judged.items():
        known += [*metrics, f"{name}_loss"]
    for select in dict.fromkeys(each.training.select for each in (recipe, *(stage.recipe for stage in stages))):
        check(select in known, f"training.select = {select!r}: expected a dev metric of this run: {', '.join(known)}")
    course = evaluation.course_tasks(judged)
    others = [name for name, (_, metrics) in judged.items() if metrics and name not in course]
    if course and others:
        notify(
            f"score is the course's, of {', '.join(course)} alone: {', '.join(others)} "
            f"{'do' if len(others) > 1 else 'does'} not count (training.select = {recipe.training.select!r})"
        )


def _scored_rows(recipe: Recipe, data: Datasets) -> tuple[dict[str, TokenTable], dict[str, TokenTable]]:
    """The dev and the training rows that evaluations read: random parts, where the recipe wants only a part of them."""
    seed, count = recipe.training.seed, recipe.training.evaluate_train
    dev = dict(data.dev)
    for name, table in data.dev.items():
        share = data.tasks[name].options.dev_fraction
        if share < 1:
            rows = max(1, round(share * len(table)))
            dev[name] = table.select(subset(len(table), rows, seed, f"dev/{name}"))
    train = {n: table for tables in data.train for n, table in tables.items() if count and n in dev}
    return dev, {n: t.select(subset(len(t), count, seed, f"train/{n}")) for n, t in train.items()}
