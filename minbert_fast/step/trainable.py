# SPDX-License-Identifier: Apache-2.0
"""The parameters that a stage trains, by role, with the settings of their optimizer steps; and the frozen ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.flat import ParameterSpec
from minbert_fast.tasks import MultitaskModel


@dataclass(frozen=True)
class Trainable:
    """A stage's parameters by role, each with its optimizer settings."""

    shared: list[ParameterSpec]  # encoder and head layers that several tasks use: surgery acts on these
    words: ParameterSpec | None  # the word embedding, when only the encoder's first op uses it
    heads: dict[str, list[ParameterSpec]]
    frozen: list[ParameterSpec]

    def specs(self) -> Iterable[tuple[str, ParameterSpec]]:
        """Every trained parameter with the label of its `ParameterGroup`."""
        yield from (("shared", spec) for spec in self.shared)
        if self.words:
            yield "words", self.words
        yield from ((task, spec) for task, specs in self.heads.items() for spec in specs)


def trainable(model: MultitaskModel, recipe: Recipe) -> Trainable:
    """Sorts the model's parameters by the stage's tasks, `model.freeze` and `requires_grad`."""
    options, encoder = recipe.optimizer, model.encoder
    names = {id(p): n for n, p in model.named_parameters()}
    users = [{id(p) for p in model.head_parameters([task])} for task in recipe.tasks]
    tied = {i for i in set().union(*users) if sum(i in u for u in users) > 1}
    pooled = any((model.tasks[task].pooling or model.pooling) == "pooler" for task in recipe.tasks)
    trains = {id(p) for p in encoder.parameters() if p.requires_grad and not recipe.model.freeze}
    if not pooled:
        trains -= {id(p) for p in encoder.pooler_dense.parameters()}

    def spec(p: nn.Parameter, lr: float) -> ParameterSpec:
        plain = p.ndim < 2 and not options.decay_all
        factor = lr / options.lr if options.lr else 0.0
        return ParameterSpec(names[id(p)], p, factor, 0.0 if plain else options.weight_decay)

    def encoder_spec(p: nn.Parameter) -> ParameterSpec:
        return spec(p, options.lr * options.layer_decay ** _depth(names[id(p)], encoder.config.num_hidden_layers))

    head_lr = options.lr if options.head_lr is None else options.head_lr
    word = encoder.word_embedding.get_parameter("weight")
    own = encoder.one_pass_parameters()
    rest = [p for p in encoder.parameters() if all(p is not q for q in (*own, word))]
    shared = [encoder_spec(p) for p in (*own, *rest) if id(p) in trains]
    heads: dict[str, list[ParameterSpec]] = {task: [] for task in recipe.tasks}
    for task in recipe.tasks:
        for p in model.head_parameters([task]):
            if not p.requires_grad or p is word or any(p is e.parameter for e in shared):
                continue
            if id(p) in tied:
                shared.append(spec(p, head_lr))
            else:
                heads[task].append(spec(p, head_lr))
    words = encoder_spec(word) if id(word) in trains else None
    if words and any(id(word) in u for u in users):  # a head uses it too, so its gradient is dense
        shared.append(words)
        words = None
    placed = {id(e.parameter) for e in (*shared, *([words] if words else []), *(e for h in heads.values() for e in h))}
    frozen = [ParameterSpec(n, p) for n, p in model.encoder.named_parameters() if id(p) not in placed]
    return Trainable(shared, words, heads, frozen)


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
