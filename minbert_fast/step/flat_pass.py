# SPDX-License-Identifier: Apache-2.0
"""The training step's pass through the encoder: weights from the flat buffers, per-task gradients into J."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minbert_fast import ops
from minbert_fast.common.schema import ConfigError
from minbert_fast.model.fused import Embedding
from minbert_fast.model.packing import PackedBatch
from minbert_fast.model.passes import Pass, Sink, called
from minbert_fast.model.rows import TokenRows
from minbert_fast.ops import EmbeddingSink, LinearSink
from minbert_fast.step.flat import FlatParameters, TaskGradients
from minbert_fast.step.tape import Tape
from minbert_fast.tasks import MultitaskModel


def check_unshared(model: MultitaskModel, tasks: Iterable[str]) -> None:
    """Raises ConfigError where the packed encoder uses a parameter twice, or the pooler or a head uses it too.

    One use's gradient would overwrite the other's in J. A head may use the word embedding: the step adds its two gradients.
    """
    encoder = model.encoder
    word = encoder.word_embedding.weight
    names = {id(p): name for name, p in encoder.named_parameters()}
    seen = {id(p) for p in (*encoder.pooler_dense.parameters(), *model.head_parameters(tasks)) if p is not word}
    for p in (word, *encoder.one_pass_parameters()):
        if id(p) in seen:
            raise ConfigError(f"{names[id(p)]} is used in two places: use --backend reference")
        seen.add(id(p))


@dataclass(eq=False)
class OnePass(Pass):
    """Weights from the flat buffers, per-task gradients into J, dropout from a seed that lives on the device."""

    flat: FlatParameters
    gradients: TaskGradients | None  # None: all parameters are constants
    batch: PackedBatch
    bounds: Tensor  # [T + 1] token-row bounds of J's rows (one row for all tasks when nothing needs them apart)
    seed: Tensor  # [1] int64
    noise: Tensor | None = None  # [N, H] added to the embeddings; may ask for a gradient
    # Called with a layer's number when the backward has written the gradients of that layer and of those above.
    through: Callable[[int], None] = lambda layer: None
    tape: Tape | None = None  # notes parameter gradients for later; None: the backward computes them as it goes
    sentences: Sequence[int] = ()  # [T + 1] sentence bounds of J's rows: modules are called with one task at a time
    _called: set[int] = field(default_factory=set)  # parameters of modules that were called so far

    owns_embeddings = True

    def linear(self, x: Tensor, *modules: nn.Linear) -> Tensor:
        weights, biases = [m.weight for m in modules], [m.bias for m in modules]
        if not (self._together(weights) and self._together(biases)):
            return torch.cat([self.linear(x, module) for module in modules], -1)
        weight, bias = (self.flat.stacked(self.flat.compute, parameters) for parameters in (weights, biases))
        sink = LinearSink(self.bounds, self._gradient(*weights), self._gradient(*biases), self.tape)
        return ops.linear(x, weight, bias, sink)

    def product(self, x: Tensor, module: nn.Linear) -> Tensor:
        sink = LinearSink(self.bounds, self._gradient(module.weight), None, self.tape)
        return ops.linear(x, self.weight(module.weight), into=sink)

    def embed(self, tokens: TokenRows, parts: Embedding) -> Tensor:
        y = super().embed(tokens, parts)
        return y if self.noise is None else y + self.noise.to(y.dtype)

    def seed_on(self, device: torch.device) -> Tensor:
        return self.seed

    def weight(self, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if not isinstance(parameter, nn.Parameter):  # zeros for the bias of a foreign module
            return parameter
        return self.flat.view(self.flat.compute, parameter)

    def sink(self, kind: Callable[..., Sink], *parameters: Tensor) -> Sink | None:
        return kind(self.bounds, *map(self._gradient, parameters), tape=self.tape)

    def embedding_sink(self, parts: Embedding) -> EmbeddingSink:
        word, batch, words = parts.word.weight, self.batch, None
        if self.gradients and (self.flat.words is word or self.gradients.owns(word)):
            words = self.gradients.words(batch.num_words, word.shape[1])
        offsets = batch.word_offsets[: batch.num_words + 1]
        own = (parts.position.weight, parts.type.weight, parts.norm.weight, parts.norm.bias)
        position, kind, gamma, beta = map(self._gradient, own)
        padding = -1 if parts.word.padding_idx is None else parts.word.padding_idx
        rows = (batch.cu_seqlens, batch.word_order, offsets)
        return EmbeddingSink(self.bounds, *rows, words, position, kind, gamma, beta, padding)

    def call(self, module: nn.Module, hidden: Tensor, *more: Tensor) -> Tensor:
        """Calls the module once per task, on the task's sentences and with a leaf per task for each of its parameters.

        A task's gradients reach only that task's leaves, so that one backward fills all rows of J.
        """
        if self.gradients is None:
            constants = {name: p.detach() for name, p in module.named_parameters()}
            return called(module, hidden, *more, weights=constants)
        owned = {name: p for name, p in module.named_parameters() if self.gradients.owns(p)}
        for p in owned.values():
            if id(p) not in self._called:
                self._called.add(id(p))
                self.gradients.view(p).zero_()
        parts = []
        for row, (begin, end) in enumerate(itertools.pairwise(self.sentences)):
            leaves = {name: self._leaf(p, row) for name, p in owned.items()}
            parts.append(called(module, *(t[begin:end] for t in (hidden, *more)), weights=leaves))
        behind = hidden.shape[0] - self.sentences[-1]  # empty sentences up to the batch's capacity
        return torch.cat([*parts, parts[0].new_zeros(behind, *parts[0].shape[1:])])

    def _leaf(self, parameter: nn.Parameter, row: int) -> Tensor:
        """The parameter as task `row` sees it; its gradient goes to that row of J."""
        assert self.gradients is not None
        target = self.gradients.view(parameter)[row]
        leaf = parameter.detach().requires_grad_()

        def take(leaf: Tensor) -> None:
            if leaf.grad is not None:
                target.add_(leaf.grad)
                leaf.grad = None

        leaf.register_post_accumulate_grad_hook(take)
        return leaf

    def enter(self, layer: int, hidden: Tensor) -> None:
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.through(layer))

    def _gradient(self, *parameters: Tensor) -> Tensor | None:
        """The parameters' place in J, one below the other [T, rows, ...]; None where J has none for the first."""
        if self.gradients is None or not self.gradients.owns(parameters[0]):
            return None
        return self.gradients.stacked(parameters)

    def _together(self, parameters: Sequence[Tensor]) -> bool:
        owned = {self.gradients is not None and self.gradients.owns(p) for p in parameters}
        return len(owned) == 1 and self.flat.adjacent(parameters)
