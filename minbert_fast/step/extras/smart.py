# SPDX-License-Identifier: Apache-2.0
"""SMART (Jiang et al. 2020, arXiv:1911.03437): a smooth model near the one it was, `[regularisation] smart, proximal`.

    loss of a task + smart    * divergence of the answers to an example x and to its perturbed twin x~    (Adversary)
                   + proximal * divergence of the answers from those of a momentum teacher                (Teacher)

Both divergences are `tasks.consistency.divergence`. The paper perturbs the word embeddings; this code perturbs the embedding
layer's output, after LayerNorm and dropout, whose elements are about 1: the perturbation stays visible in bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minbert_fast.common import huge_pages
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.inference import Snapshot
from minbert_fast.model.passes import PackedRows
from minbert_fast.recipes.recipe import Recipe, RegularisationOptions
from minbert_fast.step.flat import FlatParameters
from minbert_fast.step.flat_pass import OnePass
from minbert_fast.tasks import ConsistencyLoss, MultitaskModel
from minbert_fast.tasks.consistency import divergence, split_copies

SUFFIX = "teacher"


def check_smart(recipe: Recipe, backend: str) -> None:
    """Raises ConfigError where a stage asks for what its step cannot do."""
    options = recipe.regularisation
    if options.smart and recipe.model.freeze:
        raise ConfigError("regularisation.smart: a stage with model.freeze = true has nothing to smooth: set 0 there")
    if (options.smart or options.proximal) and backend == "reference":
        raise ConfigError("regularisation.smart and .proximal: the reference backend has no such step")


# ---- Smoothness: the adversary -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adversary:
    """Finds the perturbation of the second copies that moves the answers most, by one step of projected ascent.

    One more pass over the batch, with the dropout of the training pass that follows, and a backward through its
    activations alone: parameters are constants there.
    """

    model: MultitaskModel
    flat: FlatParameters
    options: RegularisationOptions

    def noise(self, batch: MultitaskBatch, bounds: Tensor, seed: Tensor) -> Tensor | None:
        """What to add to the embeddings [N, H]: 0 for first copies, between -radius and radius for second ones.

        None for a batch without twins, as one has of tasks that only train.
        With d the sum of the tasks' divergences and g its gradient, each token's scaled to a largest element of 1:
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
    """1 for token rows of second copies, 0 for all others [N, 1], on the batch's device and without a question to it."""
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
    """The weights' moving average t <- momentum * t + (1 - momentum) * weights, from the first weights on.

    It answers without dropout. Its trainable weights lie in one buffer, laid out as the model's own.
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
        for entry in flat.trainable:
            own[entry.name].data = flat.view(self._weights, entry.parameter)

    def losses(
        self, model: MultitaskModel, batch: MultitaskBatch, hidden: Tensor, consistency: ConsistencyLoss
    ) -> dict[str, Tensor]:
        """`model.losses`, each with its share of the way to the teacher: of first copies, where there are twins."""
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
        """Follows the weights after a step, unless it was skipped ([] bool, on the device)."""
        share = torch.where(skipped, 0.0, 1.0 - self.options.momentum)
        self._weights.lerp_(self.flat.data[: self.flat.trainable_end], share)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, by parameter name."""
        return {f"{e.name}/{SUFFIX}": self.flat.view(self._weights, e.parameter) for e in self.flat.trainable}

    def load_state_dict(self, tensors: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave; other tensors are passed over. Raises ValueError where one is missing."""
        for name, view in self.state_dict().items():
            found = tensors.get(name)
            if found is None or found.shape != view.shape:
                raise ValueError(f"no {name} of shape {list(view.shape)}")
            view.copy_(found)
