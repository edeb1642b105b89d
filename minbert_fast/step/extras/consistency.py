# SPDX-License-Identifier: Apache-2.0
"""Consistency regularisation: `[regularisation] r_drop, smart, proximal` penalise answers that change.

    loss of a task + r_drop   * divergence of the answers to an example under two dropout masks
                   + smart    * divergence of the answers to an example and to its perturbed twin    (Adversary)
                   + proximal * divergence of the answers from those of a momentum teacher           (Teacher)

The last two are SMART (Jiang et al. 2020, arXiv:1911.03437). All divergences are `tasks.consistency.divergence`. The paper
perturbs the word embeddings. This code perturbs the output of the embedding layer, after LayerNorm and dropout: its elements
are about 1, so the perturbation survives rounding to bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minbert_fast.common import huge_pages
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.rows import PackedRows
from minbert_fast.model.snapshot import Snapshot
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.recipes.sections import RegularisationOptions
from minbert_fast.step.flat import FlatParameters
from minbert_fast.step.flat_pass import OnePass
from minbert_fast.step.hooks import StepHook
from minbert_fast.tasks import ConsistencyLoss, MultitaskModel
from minbert_fast.tasks.consistency import divergence, split_copies

SUFFIX = "teacher"


def check_smart(recipe: Recipe, backend: str) -> None:
    """Raises ConfigError for a stage whose step cannot do SMART."""
    options = recipe.regularisation
    if options.smart and recipe.model.freeze:
        raise ConfigError("regularisation.smart: a stage with model.freeze = true has nothing to smooth: set 0 there")
    if (options.smart or options.proximal) and backend == "reference":
        raise ConfigError("regularisation.smart and .proximal: the reference backend has no such step")


# ---- Smoothness: the adversary -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adversary:
    """Finds the perturbation of the second copies that changes the answers most, by one step of projected ascent.

    It runs the batch once more, with the same dropout as the training pass, and a backward through the activations alone:
    parameters are constants.
    """

    model: MultitaskModel
    flat: FlatParameters
    options: RegularisationOptions

    def noise(self, batch: MultitaskBatch, bounds: Tensor, seed: Tensor) -> Tensor | None:
        """The perturbation [N, H] of the embeddings: 0 for first copies, between -radius and radius for second copies.

        None for a batch without twins. With d the sum of the tasks' divergences, and g its gradient, scaled so that each
        token's largest element is 1:
        delta = clamp(start + step * g, -radius, radius), where start is normal noise.
        """
        packed, options = batch.packed, self.options
        twins = [name for name in batch.tasks if name in batch.duplicated and batch.num_examples(name)]
        if not twins:
            return None
        second = second_copies(batch)  # [N, 1]
        start = torch.randn(packed.tokens.numel(), self.model.encoder.config.hidden_size, device=second.device)
        start = ((options.noise * start).clamp(-options.radius, options.radius) * second).requires_grad_()
        with torch.enable_grad():
            run = OnePass(self.flat, None, packed, bounds, seed, start)
            outputs = self.model.outputs(batch, self.model.encoder.encode_packed(run, packed))
            apart = [divergence(self.model.head(name), *split_copies(outputs[name])) for name in twins]
            (gradient,) = torch.autograd.grad(torch.stack(apart).sum(), start)
        largest = gradient.abs().amax(-1, keepdim=True)
        step = options.step * gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        return (start.detach() + step).clamp(-options.radius, options.radius) * second


def second_copies(batch: MultitaskBatch) -> Tensor:
    """1 for token rows of second copies, 0 for all others [N, 1]. Does not wait for the device."""
    packed = batch.packed
    marks = torch.zeros(packed.cu_seqlens.numel(), device=packed.tokens.device)  # one more than there are sentences
    first = 0
    for name in batch.tasks:
        n = batch.num_examples(name)
        for begin in range(first, first + n * batch.arity[name], max(1, n)):
            if name in batch.duplicated:
                marks[begin + n // 2 : begin + n] = 1.0
        first += n * batch.arity[name]
    rows = torch.arange(packed.tokens.numel(), dtype=torch.int32, device=marks.device)
    sentence = torch.searchsorted(packed.cu_seqlens[1:], rows, right=True)  # padding rows: beyond the last
    return marks[sentence][:, None]


# ---- Bregman proximal point: the teacher ---------------------------------------------------------------------------------


class Teacher:
    """A model with the weights' moving average t <- momentum * t + (1 - momentum) * weights. t starts as the weights.

    It runs without dropout. Its trainable weights are views of one buffer, with the same layout as the model's.
    """

    def __init__(
        self, model: MultitaskModel, flat: FlatParameters, options: RegularisationOptions, dtype: torch.dtype
    ) -> None:
        self.flat = flat
        self.options = options
        self.dtype = dtype
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        values = flat.data[: flat.trainable_end]
        self._weights = huge_pages.empty(len(values), device=values.device).copy_(values)
        own = dict(self.model.named_parameters())
        for spec in flat.trainable:
            own[spec.name].data = flat.view(self._weights, spec.parameter)

    def losses(
        self, model: MultitaskModel, batch: MultitaskBatch, hidden: Tensor, consistency: ConsistencyLoss
    ) -> dict[str, Tensor]:
        """`model.losses` plus the divergence from the teacher; for twins, the divergence of the first copies."""
        outputs = model.outputs(batch, hidden)
        with torch.no_grad():
            encoded = Snapshot(self.model.encoder, self.dtype).hidden(PackedRows.of(batch.packed))
            taught = self.model.outputs(batch, encoded)
        found = {}
        for name, output in outputs.items():
            found[name] = model.loss(name, output, batch, consistency)
            if batch.num_examples(name) and model.tasks[name].predicts:
                mine, its = output, taught[name]
                if name in batch.duplicated:
                    mine, its = split_copies(mine)[0], split_copies(its)[0]
                weight = model.tasks[name].weight * self.options.proximal * batch.loss_fraction(name)
                found[name] = found[name] + weight * divergence(model.head(name), mine, its)
        return found

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Updates the average after a step, unless it was skipped ([] bool, on the device)."""
        share = torch.where(skipped, 0.0, 1.0 - self.options.momentum)
        self._weights.lerp_(self.flat.data[: self.flat.trainable_end], share)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, by parameter name."""
        return {f"{e.name}/{SUFFIX}": self.flat.view(self._weights, e.parameter) for e in self.flat.trainable}


# ---- The hook -----------------------------------------------------------------------------------------------------------


class Consistency(StepHook):
    """The hook: R-Drop's penalty, SMART's with its adversary, that of a momentum teacher, as `options` say."""

    def __init__(
        self,
        model: MultitaskModel,
        options: RegularisationOptions,
        adversary: Adversary | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.model = model
        self.adversary = adversary
        self.teacher = teacher
        self.consistency = ConsistencyLoss(options.smart or options.r_drop, both=not options.smart)

    def embedding_noise(self, batch: MultitaskBatch, bounds: Tensor, seed: Tensor) -> Tensor | None:
        return None if self.adversary is None else self.adversary.noise(batch, bounds, seed)

    def losses(self, batch: MultitaskBatch, hidden: Tensor) -> dict[str, Tensor]:
        if self.teacher is not None:
            return self.teacher.losses(self.model, batch, hidden, self.consistency)
        return self.model.losses(batch, hidden, consistency=self.consistency)

    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        if self.teacher is not None:
            self.teacher.update(skipped)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.teacher is None else self.teacher.state_dict()
