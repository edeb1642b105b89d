# SPDX-License-Identifier: Apache-2.0
"""The training step's pass through the encoder: weights from the flat buffers, per-task gradients into J."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minbert_fast import ops
from minbert_fast.common.schema import ConfigError
from minbert_fast.model.bert import BertModel
from minbert_fast.model.fused import Embedding
from minbert_fast.model.packing import PackedBatch
from minbert_fast.model.passes import Pass, Sink, TokenRows, called
from minbert_fast.ops import EmbeddingSink, LinearSink
from minbert_fast.step.flat import FlatParameters, TaskGradients


def check_unshared(encoder: BertModel) -> None:
    """Raises ConfigError where two parts of the encoder share a weight: the gradient of one would overwrite the other's."""
    names = {id(p): name for name, p in encoder.named_parameters()}
    seen: set[int] = set()
    for p in encoder.one_pass_parameters():
        if id(p) in seen:
            raise ConfigError(f"{names[id(p)]} is used in two places of the encoder: use --backend reference")
        seen.add(id(p))


class OnePass(Pass):
    """Weights from the flat buffers, per-task gradients into J, dropout from a seed that lives on the device.

    `bounds` [T + 1] are the token-row bounds of J's rows (one row for all tasks when nothing needs them apart). Without
    `gradients` all parameters are constants. `noise` [N, H] is added to the embeddings, and may ask for a gradient.
    `sentences` [T + 1] are the sentence bounds of J's rows: modules that are called see one task's sentences at a time.
    `through` is called with a layer's number when the backward has written the gradients of that layer and of those above.
    """

    owns_embeddings = True

    def __init__(
        self,
        flat: FlatParameters,
        gradients: TaskGradients | None,
        batch: PackedBatch,
        bounds: Tensor,
        seed: Tensor,
        noise: Tensor | None = None,
        through: Callable[[int], None] = lambda layer: None,
        sentences: Sequence[int] = (),
    ) -> None:
        self.through = through
        self.flat = flat
        self.gradients = gradients
        self.batch = batch
        self.bounds = bounds
        self._seed = seed
        self.noise = noise
        self.sentences = sentences
        self._called: set[int] = set()  # parameters of modules that were called so far

    def linear(self, x: Tensor, *modules: nn.Linear) -> Tensor:
        weights, biases = [m.weight for m in modules], [m.bias for m in modules]
        if not (self._together(weights) and self._together(biases)):
            return torch.cat([self.linear(x, module) for module in modules], -1)
        compute = self.flat.compute
        sink = LinearSink(self.bounds, self._stacked_gradient(weights), self._stacked_gradient(biases))
        return ops.linear(x, self.flat.stacked(compute, weights), self.flat.stacked(compute, biases), into=sink)

    def product(self, x: Tensor, module: nn.Linear) -> Tensor:
        sink = LinearSink(self.bounds, self._gradient(module.weight), None)
        return ops.linear(x, self.weight(module.weight), into=sink)

    def embed(self, rows: TokenRows, parts: Embedding) -> Tensor:
        y = super().embed(rows, parts)
        return y if self.noise is None else y + self.noise.to(y.dtype)

    def seed(self, device: torch.device) -> Tensor:
        return self._seed

    def weight(self, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if not isinstance(parameter, nn.Parameter):  # zeros for the bias of a foreign module
            return parameter
        return self.flat.view(self.flat.compute, parameter)

    def sink(self, kind: Callable[..., Sink], *parameters: Tensor) -> Sink | None:
        return kind(self.bounds, *map(self._gradient, parameters))

    def embedding_sink(self, parts: Embedding) -> EmbeddingSink:
        word, batch, words = parts.word.weight, self.batch, None
        if self.gradients and (self.flat.words is word or self.gradients.owns(word)):
            words = self.gradients.words(batch.num_words, word.shape[1])
        offsets = batch.word_offsets[: batch.num_words + 1]
        others = (parts.position.weight, parts.type.weight, parts.norm.weight, parts.norm.bias)
        return EmbeddingSink(
            self.bounds, batch.cu_seqlens, batch.word_order, offsets, words, *map(self._gradient, others)
        )

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

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        return self.gradients.view(parameter) if self.gradients and self.gradients.owns(parameter) else None

    def _together(self, parameters: Sequence[Tensor]) -> bool:
        owned = {self.gradients is not None and self.gradients.owns(p) for p in parameters}
        return len(owned) == 1 and self.flat.adjacent(parameters)

    def _stacked_gradient(self, parameters: Sequence[Tensor]) -> Tensor | None:
        if self.gradients is None or not self.gradients.owns(parameters[0]):
            return None
        return self.gradients.stacked(parameters)
