# SPDX-License-Identifier: Apache-2.0
"""Sorts a stage's parameters by role and chooses the settings of their optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from minbert_fast.common.schema import ConfigError
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.recipes.sections import OptimizerOptions
from minbert_fast.step.flat import ParameterSpec, StageParameters
from minbert_fast.tasks import MultitaskModel


def trainable(model: MultitaskModel, recipe: Recipe) -> StageParameters:
    """Sorts the model's parameters by the stage's tasks, `model.freeze` and `requires_grad`."""
    options, encoder = recipe.optimizer, model.encoder
    names = {id(p): n for n, p in model.named_parameters()}
    users = [{id(p) for p in model.head_parameters([task])} for task in recipe.tasks]
    tied = {i for i in set().union(*users) if sum(i in u for u in users) > 1}
    pooled = any((model.tasks[task].pooling or model.pooling) == "pooler" for task in recipe.tasks)
    trains = {id(p) for p in encoder.parameters() if p.requires_grad and not recipe.model.freeze}
    if not pooled:
        trains -= {id(p) for p in encoder.pooler_dense.parameters()}
    base = base_rate(options)

    def spec(p: nn.Parameter, lr: float) -> ParameterSpec:
        plain = p.ndim < 2 and not options.decay_all
        factor = lr / base if base else 0.0
        return ParameterSpec(names[id(p)], p, factor, 0.0 if plain else options.weight_decay)

    def encoder_spec(p: nn.Parameter) -> ParameterSpec:
        return spec(p, options.lr * options.layer_decay ** _depth(names[id(p)], encoder.config.num_hidden_layers))

    head_lr = options.lr if options.head_lr is None else options.head_lr
    word = encoder.word_embedding.get_parameter("weight")
    own = encoder.one_pass_parameters()
    rest = [p for p in encoder.parameters() if all(p is not q for q in (*own, word))]
    once = dict.fromkeys((*own, *rest))  # a layer may stand in two places
    shared = [encoder_spec(p) for p in once if id(p) in trains]
    heads: dict[str, list[ParameterSpec]] = {task: [] for task in recipe.tasks}
    for task in recipe.tasks:
        for p in model.head_parameters([task]):
            if not p.requires_grad or p is word or any(p is e.parameter for e in shared):
                continue
            if id(p) in tied:
                shared.append(spec(p, head_lr))
            else:
                heads[task].append(spec(p, head_lr))
    words = encoder_spec(word) if id(word) in trains and word not in once else None
    if words and any(id(word) in u for u in users):  # a head uses it too, so its gradient is dense
        shared.append(words)
        words = None
    parts = StageParameters(shared, words, heads, frozen=[])
    trained = {id(spec.parameter) for _, spec in parts.trained()}
    return replace(parts, frozen=[ParameterSpec(n, p) for n, p in encoder.named_parameters() if id(p) not in trained])


def base_rate(options: OptimizerOptions) -> float:
    """The learning rate that the parameters' `lr_factor` multiply: `lr`, or `head_lr` where `lr` is 0."""
    return options.lr or options.head_lr or 0.0


def check_trained(trained: Sized, recipe: Recipe) -> None:
    """Raises ConfigError for a step without trainable parameters."""
    if not trained:
        raise ConfigError(
            f"nothing to train: the encoder is frozen, and no head ({', '.join(recipe.tasks)}) has parameters to train; "
            "set model.freeze = false, or training.epochs = 0 to evaluate the model as it is"
        )


def _depth(name: str, layers: int) -> int:
    """Layers between a parameter and the encoder's top: 0 for the last layer, `layers` for the embeddings."""
    parts = name.split(".")
    if "bert_layers" in parts:
        return layers - 1 - int(parts[parts.index("bert_layers") + 1])
    return 0 if "pooler_dense" in parts else layers


@contextmanager
def constant(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block, a forward treats `parameters` as constants: its backward leaves no gradient in them.

    A stage's frozen parameters train again in the next stage, so `requires_grad` is restored afterwards.
    """
    changed = [p for p in parameters if p.requires_grad]
    try:
        for p in changed:
            p.requires_grad_(False)
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)
