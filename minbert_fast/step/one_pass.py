# SPDX-License-Identifier: Apache-2.0
"""The one-pass step, in the order data flows:

    packed batch -> encoder -> heads -> one backward into J [T, P] -> G = J Jt [T, T] -> w [T] -> combine + AdamW

`OnePassStep.compute` is that line in Python; docs/one_pass.md has the mathematics. Dropout is drawn from (seed, step), task
orders from a generator that checkpoints save, so a resumed run draws the same numbers as an uninterrupted one.

Shapes: N token rows, T tasks, U distinct words, H hidden, P parameters that tasks share.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minbert_fast import surgery
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.side_stream import forked
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.ops.grouped import Tables, groups
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.extras import flat_hooks
from minbert_fast.step.flat import FlatParameters, TaskGradients
from minbert_fast.step.flat_pass import OnePass, check_unshared
from minbert_fast.step.hooks import Connect, StepHook, first
from minbert_fast.step.numbers import StepNumbers, seed_generators, seed_of
from minbert_fast.step.optim import FlatAdamW
from minbert_fast.step.stepping import PartTimer, StepResult, average_of, load_state, state_of
from minbert_fast.step.tape import Tape
from minbert_fast.step.trainable import base_rate, check_trained, constant, trainable
from minbert_fast.tasks import MultitaskModel


class OnePassStep:
    """One forward and one backward over a packed batch, per-task gradients, surgery on G, combine + AdamW in one pass.

    Making the step moves the parameters into flat buffers. Matrix products and J have type `dtype` (fp32 or bf16); master
    weights, moments, statistics and losses are fp32. Without surgery J has one row, the sum over the tasks. `connect`
    makes the exchange between several processes.
    """

    def __init__(
        self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype, connect: Connect | None = None
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.seed_base = recipe.training.seed
        generator = torch.Generator().manual_seed(recipe.training.seed)
        self.weights = surgery.weights(recipe.surgery.method, recipe.surgery.reduction, generator)
        self.apart = recipe.surgery.method != "none"  # J has a row for each task, not one for their sum
        check_unshared(model, recipe.tasks)
        parts = trainable(model, recipe)
        self.flat = FlatParameters(parts, dtype)
        self.frozen = [spec.parameter for spec in parts.frozen]
        own = {id(p) for p in model.encoder.one_pass_parameters()}
        self.plan = model.encoder.plan()
        # Tied head layers, the pooler, modules that the packed encoder does not know: plain autograd, one task at a time.
        self.others = [e.parameter for e in parts.shared if id(e.parameter) not in own]
        rows = len(recipe.tasks) if self.apart else 1
        self.hooks: list[StepHook] = flat_hooks(model, recipe, self.flat, dtype)
        self.average = average_of(self.hooks)
        self.alone = connect is None
        self._ones = torch.ones(len(recipe.tasks), device=self.flat.data.device)
        self.tables = Tables()
        self.tape: Tape | None = None  # of the present step
        if connect is None:
            self.gradients = TaskGradients(self.flat, rows, dtype)
            self.optimizer = FlatAdamW(self.flat, recipe.optimizer)
        else:
            layers = [[p for p in layer.parameters() if id(p) in own] for layer in model.encoder.bert_layers]
            exchange = connect(self.flat, rows, dtype, layers)
            self.gradients = exchange.gradients
            self.optimizer = exchange.optimizer(recipe.optimizer)
            self.seed_base += exchange.seed_offset
            self.hooks.insert(0, exchange)
        self.head_gradient = torch.zeros(self.flat.trainable_end - self.flat.words_end, device=self.flat.data.device)
        self.heads = {name: [spec.parameter for spec in specs] for name, specs in parts.heads.items()}
        for p in model.parameters():
            p.grad = None  # of an earlier stage
            if p not in self.flat:  # a head of an earlier stage: as a view it would keep that stage's buffer alive
                p.data = p.detach().clone()
        self.numbers = StepNumbers(len(recipe.tasks), self.flat.data.device)
        self.seed = self.numbers.seed
        self.steps = 0
        self.step_seed = 0  # of the present step

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        self.prepare(batch, lr_scale)
        return self.compute(batch)

    def prepare(self, batch: MultitaskBatch, lr_scale: float) -> None:
        """The host's part of a step: seeds, the learning rate, the tasks' random orders."""
        if self.model.encoder.plan() != self.plan:
            raise ConfigError("modules of the encoder changed after its training step was made: make a new step")
        check_trained(self.flat.trainable, self.recipe)
        self.step_seed = seed_of(self.seed_base, self.steps)
        seed_generators(self.step_seed, self.flat.data.device)
        for hook in self.hooks:
            hook.before_step(self.steps)
        self.steps += 1
        orders = self.weights.draw(len(batch.tasks))
        self.numbers.write(self.step_seed, base_rate(self.recipe.optimizer) * lr_scale, orders)

    def compute(self, batch: MultitaskBatch) -> StepResult:
        """The device's part of a step. A graph can capture it: it neither waits for the device nor copies data to it."""
        self.model.train()
        self.tables.begin()
        timer = PartTimer(self.flat.data.device)
        present = batch.active_tasks()
        self.optimizer.schedule(self.numbers.rate)

        # Packed batch -> hidden [N, H] -> one loss per task.
        with constant(self.frozen):
            losses = self._losses(batch, self._encode(batch))
        timer.end("forward")

        # One backward writes J [T, P], the words' rows [T, U, H] and the heads' gradients.
        values = self._backward(batch, losses)
        words = None if self.flat.words is None else self._word_rows(batch)  # None: a dense part of J, or frozen
        timer.end("backward")
        for hook in self.hooks:
            hook.after_backward([*([] if words is None else [words]), self.head_gradient, values])
            timer.end(hook.part)

        # G [T, T] -> w [T]: gradient surgery is arithmetic on the tasks' inner products.
        gram = self.gradients.gram(words) if self.tape is None else self.tape.gram(words)
        w = self.weights(gram, self.numbers.orders)
        if not self.apart and self.recipe.surgery.reduction == "mean":
            w = w / len(batch.tasks)
        labels = ["shared", "words", *present]
        norm, nonfinite, skip = self.optimizer.settle(labels, values, gram, w, self.head_gradient)
        timer.end("surgery" if self.apart else "clipping")

        # w J and AdamW in one pass over memory: J, w, p, m, v -> p, m, v and the bf16 copy.
        with forked(self.flat.data.device) as beside:
            with beside:
                if words is not None:
                    self.optimizer.step_words(words, batch.packed.word_ids[: batch.packed.num_words], w)
                for name in present:
                    self.optimizer.step_head(name, self.head_gradient)
            self.optimizer.step_shared(self.gradients.J, w)
        timer.end("optimizer")
        weights = first(hook.loss_weights() for hook in self.hooks)
        weights = None if weights is None else weights.clone()  # the next step changes them in place
        for hook in self.hooks:
            hook.after_update(values, present, skip)
            timer.end(hook.part)
        if any(hook.follows_losses for hook in self.hooks):
            again = self._remeasure(batch)
            for hook in self.hooks:
                hook.remeasured(again, present, skip)
            timer.end("forward")
        return StepResult(values, norm, gram if self.apart else None, nonfinite, weights, timer.seconds)

    # ---- Forward ---------------------------------------------------------------------------------------------------

    def _encode(self, batch: MultitaskBatch) -> Tensor:
        """The last hidden state [N, H] of the packed batch, with a graph whose backward writes J."""
        packed = batch.packed
        # Each row of J sums over a range of tokens: one task's, or without surgery all tasks'.
        ends = packed.task_tokens
        bounds = ends if self.apart else torch.stack((ends[0], ends[-1]))
        noise = first(hook.embedding_noise(batch, bounds, self.seed) for hook in self.hooks)
        # The first sentence of each row of J, and the end.
        counts = (batch.num_examples(task) * batch.arity[task] for task in batch.tasks)
        sentences = list(itertools.accumulate(counts, initial=0))
        if not self.apart:
            sentences = [0, sentences[-1]]

        def after_layer(layer: int) -> None:
            if self.tape is not None and not self.alone:  # other processes get this layer's gradients now
                self.tape.finish()
            for hook in self.hooks:
                hook.after_layer(layer)

        self.tape = Tape(self.gradients, bounds, self.tables, self.alone) if groups(self.flat.compute) else None
        run = OnePass(self.flat, self.gradients, packed, bounds, self.seed, noise, after_layer, self.tape, sentences)
        with torch.set_grad_enabled(self.flat.words_end > 0):  # a frozen encoder needs no graph
            return self.model.encoder.encode_packed(run, packed)

    def _losses(self, batch: MultitaskBatch, hidden: Tensor) -> list[Tensor]:
        """One scalar per task, in the order of the batch; 0 for a task without examples."""
        found = first(hook.losses(batch, hidden) for hook in self.hooks)
        return list((self.model.losses(batch, hidden) if found is None else found).values())

    def _remeasure(self, batch: MultitaskBatch) -> Tensor:
        """The batch's losses [T] under the updated parameters, by a second forward with the same dropout."""
        capturing = self.seed.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not capturing:  # a graph cannot seed generators twice: its heads draw other masks
            seed_generators(self.step_seed, self.seed.device)
        with constant([p for p in self.model.parameters() if p.requires_grad]):
            losses = self._losses(batch, self._encode(batch))
        return torch.stack([loss.detach() for loss in losses])

    # ---- Backward --------------------------------------------------------------------------------------------------

    def _backward(self, batch: MultitaskBatch, losses: Sequence[Tensor]) -> Tensor:
        """Fills J, the words' rows and the heads' gradients with the gradients of `losses`, and returns these [T]."""
        heads = self._head_views()
        for p in heads:
            p.grad = None  # so that the backward adds to no earlier gradient
        total = torch.stack(list(losses))
        values = total.detach()
        if any(hook.follows_losses for hook in self.hooks):
            known = values.clone()
            for hook in self.hooks:
                hook.before_weights(known, batch.active_tasks())
        weights = first(hook.loss_weights() for hook in self.hooks)
        if weights is not None:
            total = total * weights
        if self.apart:
            self._write_others(total.unbind())
        for hook in self.hooks:
            hook.before_backward()
        if self.tape is not None:
            self.tape.clear()
        total.backward(self._ones[: len(losses)])  # last, since each backward overwrites J
        if self.tape is not None:
            self.tape.finish()
        _collect(heads)
        for p in self.others:
            if not self.apart:
                row = self.gradients.view(p)[0]
                row.zero_() if p.grad is None else row.copy_(p.grad)
            p.grad = None
        word = self.model.encoder.word_embedding.weight
        if any(p is word for p in self.others):  # a head uses the words too: adds their rows to its dense gradient
            ids = batch.packed.word_ids[: batch.packed.num_words]
            self.gradients.view(word).index_add_(1, ids.clamp(min=0), self._word_rows(batch))  # unused ids: zero rows
        return values

    def _write_others(self, losses: Sequence[Tensor]) -> None:
        """Writes to J, by plain autograd, the per-task gradients of shared parameters outside the one-pass encoder."""
        if not self.others:
            return
        for p in self.others:
            self.gradients.view(p).zero_()
        for row, loss in enumerate(losses):
            found = torch.autograd.grad(loss, self.others, retain_graph=True, allow_unused=True)
            for p, gradient in zip(self.others, found, strict=True):
                if gradient is not None:
                    self.gradients.view(p)[row] += gradient

    def _word_rows(self, batch: MultitaskBatch) -> Tensor:
        """The gradients [T, U, H] of the words in the batch."""
        return self.gradients.words(batch.packed.num_words, self.model.encoder.config.hidden_size)

    def _head_views(self) -> dict[nn.Parameter, Tensor]:
        """Each head parameter's part of the heads' gradient, one-dimensional."""
        offset = self.flat.words_end
        places = {p: self.flat.placement(p) for p in itertools.chain.from_iterable(self.heads.values())}
        return {p: self.head_gradient[at.begin - offset : at.end - offset] for p, at in places.items()}

    # ---- State -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Any]]:
        optimizer = self.optimizer.state_dict()
        tensors = optimizer["tensors"] | state_of(self.weights, self.hooks)
        return {"tensors": tensors, "scalars": optimizer["scalars"] | {"steps": self.steps}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.optimizer.load_state_dict(state)
        load_state(self.weights, self.hooks, state["tensors"])
        self.steps = int(state["scalars"]["steps"])
        self.flat.refresh()


def _collect(views: Mapping[nn.Parameter, Tensor]) -> None:
    """Copies each parameter's gradient to its one-dimensional view, by one launch for all. `.grad` is then that view.

    A parameter without a gradient gets zeros.
    """
    found = {p: p.grad.reshape(-1) for p in views if p.grad is not None}
    if found:
        torch._foreach_copy_([views[p] for p in found], list(found.values()))
    missing = [view for p, view in views.items() if p not in found]
    if missing:
        torch._foreach_zero_(missing)
    for p, view in views.items():
        p.grad = view.view_as(p)
