# SPDX-License-Identifier: Apache-2.0
"""The one-pass step: packed batch -> one forward -> heads -> one backward, J [T, P] -> G = J Jt -> w -> combine + AdamW.

Dropout and task orders are drawn from (seed, step) or from a saved generator. The tensors of a `StepResult` stay on the
device until somebody logs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minbert_fast import surgery
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.parallel.exchange import Exchange
from minbert_fast.parallel.sharding import ShardedExchange
from minbert_fast.parallel.world import World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.extras import Extras
from minbert_fast.step.extras.averaging import WeightAverage
from minbert_fast.step.flat import FlatParameters
from minbert_fast.step.flat_pass import OnePass
from minbert_fast.step.naive import ReferenceStep
from minbert_fast.step.optim import FlatAdamW
from minbert_fast.step.stepping import (
    Backend,
    Laps,
    StepResult,
    TrainingStep,
    prefixed,
    reseed,
    step_seed,
    surgery_of,
    unprefixed,
)
from minbert_fast.step.trainable import trainable
from minbert_fast.tasks import MultitaskModel

RANK_STRIDE = 7_368_787  # between the dropout seeds of ranks


def make_step(
    backend: Backend, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype, world: World | None = None
) -> TrainingStep:
    """The step for one stage (`recipe` resolved): products in `dtype` (fp32 or bf16), on the model's own device."""
    if backend == "reference":
        return ReferenceStep(model, recipe, dtype)
    return OnePassStep(model, recipe, dtype, world)


class OnePassStep:
    """Packed batch, one forward, one backward with per-task gradients, surgery on G, combine + AdamW in one pass.

    Parameters move into flat buffers when the step is made. Products run in `dtype`; master weights, moments,
    statistics and losses are fp32; J is kept in `dtype`. Without surgery J has one row: the plain sum.

    Where several processes train together, each brings its share of the batch, and what a backward leaves is summed over
    all of them before anything looks at it: surgery sees the gradients of the whole step, and all take the same step.
    """

    def __init__(self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype, world: World | None = None) -> None:
        self.model = model
        self.recipe = recipe
        self.world = world or World()
        self.weights = surgery_of(recipe)
        self.apart = recipe.surgery.method != "none"
        parts = trainable(model, recipe)
        self.flat = FlatParameters(parts.shared, parts.words, parts.heads, parts.frozen, dtype)
        sharded = recipe.training.shard and self.world.size > 1
        kind = ShardedExchange if sharded else Exchange
        rows = len(recipe.tasks) if self.apart else 1
        own = {id(p) for p in model.encoder.one_pass_parameters()}
        layers = [[p for p in layer.parameters() if id(p) in own] for layer in model.encoder.layers()]
        self.exchange = kind(self.world, self.flat, rows, dtype, layers)
        self.gradients = self.exchange.gradients
        self.optimizer = FlatAdamW(self.flat, recipe.optimizer, self.exchange.pieces)
        self.extras = Extras.of_flat(model, recipe, self.flat, dtype)
        # Tied head layers, the pooler, modules that the packed encoder does not know: ordinary autograd, task by task.
        self.others = [e.parameter for e in parts.shared if id(e.parameter) not in own]
        self.heads = {name: [e.parameter for e in entries] for name, entries in parts.heads.items()}
        self.head_gradient = torch.zeros(self.flat.trainable_end - self.flat.words_end, device=self.flat.data.device)
        self._attach_head_gradients()
        self.seed = torch.zeros(1, dtype=torch.int64, device=self.flat.data.device)
        self.steps = 0

    def _attach_head_gradients(self) -> None:
        offset = self.flat.words_end
        for parameters in self.heads.values():
            for p in parameters:
                slot = self.flat.slot(p)
                p.grad = self.head_gradient[slot.begin - offset : slot.end - offset].view(slot.shape)

    @property
    def average(self) -> WeightAverage | None:
        return self.extras.average

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        self.prepare(batch, lr_scale)
        return self.compute(batch)

    def prepare(self, batch: MultitaskBatch, lr_scale: float) -> None:
        """The host's part of a step: seeds, the learning rate, the tasks' random orders."""
        seed = self.recipe.training.seed + self.world.rank * RANK_STRIDE  # dropout differs from rank to rank
        reseed(seed, self.steps)
        self.seed.fill_(step_seed(seed, self.steps))
        self.extras.prepare(self.steps)
        self.steps += 1
        self.optimizer.schedule(lr_scale)
        self.weights.prepare(len(batch.tasks), self.flat.data.device)

    def compute(self, batch: MultitaskBatch) -> StepResult:
        """The device's part: asks it nothing and copies nothing to it, so that it can be captured as a graph."""
        self.model.train()
        laps = Laps(self.flat.data.device)
        losses = self._backward(batch, laps)
        words = self._words(batch) if self.flat.words is not None else None
        if self.world.size > 1:
            self.exchange.close(*([] if words is None else [words]), self.head_gradient, losses)
            laps.lap("exchange")
        gram = self.exchange.gram(words)
        w = self.weights(gram)
        nonfinite = ~torch.isfinite(losses)
        if self.apart:
            nonfinite |= surgery.nonfinite(gram)
        elif self.recipe.surgery.reduction == "mean":
            w = w / len(batch.tasks)
        present = batch.active_tasks()
        head_square = self.head_gradient.square().sum()[None]
        norm = self.optimizer.clip(gram, w, head_square)
        laps.lap("surgery" if self.apart else "clipping")
        skip = nonfinite.any() | ~torch.isfinite(norm)
        self.optimizer.advance(["shared", "words", *present], skip)
        self.optimizer.step_shared(self.gradients.J, w)
        if words is not None:
            self.optimizer.step_words(words, batch.packed.word_ids[: batch.packed.num_words], w)
        for name in present:
            self.optimizer.step_head(name, self.head_gradient)
        laps.lap("optimizer")
        if self.world.size > 1:
            self.exchange.spread()
            laps.lap("exchange")
        weighted = self.extras.after(losses, present, skip)
        laps.lap("optimizer")
        return StepResult(losses, norm, gram if self.apart else None, nonfinite, weighted, laps.seconds)

    def _backward(self, batch: MultitaskBatch, laps: Laps) -> Tensor:
        """Fills J, the word rows and the heads' gradients with this batch's share; returns its losses [T]."""
        packed = batch.packed
        self.head_gradient.zero_()
        if batch.totals is not None and packed.num_tokens == 0:  # a step too small to give this process anything
            self.gradients.zero()
            self.exchange.open()
            if self.flat.words is not None:
                self._words(batch).zero_()
            return self.head_gradient.new_zeros(len(batch.tasks))
        # Without a need to keep tasks apart, one row of J takes them all: from the first task's row to the last's.
        bounds = packed.task_tokens if self.apart else torch.stack((packed.task_tokens[0], packed.task_tokens[-1]))
        noise = self.extras.noise(batch, bounds, self.seed)
        run = OnePass(
            self.model.encoder.config, self.flat, self.gradients, packed, bounds, self.seed, noise, self.exchange.ready
        )
        with torch.set_grad_enabled(self.flat.words_end > 0):  # a frozen encoder needs no graph
            hidden = self.model.encoder.encode_packed(run, packed)
        losses = [loss * batch.loss_fraction(name) for name, loss in self.extras.losses(batch, hidden).items()]
        scaled = self.extras.scaled(losses)
        laps.lap("forward")
        if self.apart:
            self._others(scaled)
        self.exchange.open()
        torch.stack(list(scaled)).sum().backward()  # last, since each backward overwrites J
        for p in self.others:
            if not self.apart:
                row = self.gradients.view(p)[0]
                row.zero_() if p.grad is None else row.copy_(p.grad)
            p.grad = None
        if self._words_are_dense():
            self._scatter_words(batch)
        laps.lap("backward")
        return torch.stack([loss.detach() for loss in losses])

    def _others(self, losses: Sequence[Tensor]) -> None:
        """Per-task gradients, by ordinary autograd, of the shared parameters that the one-pass ops do not own.

        For tasks that are kept apart; else the one backward has their sum.
        """
        if not self.others:
            return
        for p in self.others:
            self.gradients.view(p).zero_()
        for row, loss in enumerate(losses):
            found = torch.autograd.grad(loss, self.others, retain_graph=True, allow_unused=True)
            for p, gradient in zip(self.others, found, strict=True):
                if gradient is not None:
                    self.gradients.view(p)[row] += gradient

    def _words_are_dense(self) -> bool:
        word = self.model.encoder.word_embedding.weight
        return any(p is word for p in self.others)

    def _scatter_words(self, batch: MultitaskBatch) -> None:
        """Adds the row-sparse gradients of a word embedding that a head uses too to its dense rows in J."""
        dense = self.gradients.view(self.model.encoder.word_embedding.weight)
        ids = batch.packed.word_ids[: batch.packed.num_words]
        dense.index_add_(1, ids.clamp(min=0), self._words(batch))  # unused rows (-1) hold zeros

    def _words(self, batch: MultitaskBatch) -> Tensor:
        width = self.model.encoder.config.hidden_size
        return self.gradients.words(batch.packed.num_words, width)  # [T, U, H]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        optimizer = self.optimizer.state_dict(self.exchange.whole)
        tensors = optimizer["tensors"] | prefixed(self.weights.state_dict()) | self.extras.state_dict()
        return {"tensors": tensors, "scalars": optimizer["scalars"] | {"steps": self.steps}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.optimizer.load_state_dict(state)
        self.weights.load_state_dict(unprefixed(state["tensors"]))
        self.extras.load_state_dict(state["tensors"])
        self.steps = int(state["scalars"]["steps"])
        self.flat.refresh()
