# SPDX-License-Identifier: Apache-2.0
"""One training step, two ways: the one-pass step, and the naive one that it is measured against.

    OnePassStep     packed batch -> one forward -> heads -> one backward, J [T, P] -> G = J Jt -> w -> combine + AdamW
    ReferenceStep   padded batches, eager, one backward a task, the classic loop over flat gradients, AdamW a tensor

Both draw dropout and task orders from (seed, step) or from a saved generator, and both return the same `StepResult`,
whose tensors stay on the device until somebody logs them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minbert_fast import reference, surgery
from minbert_fast.config import OptimizerOptions, Recipe
from minbert_fast.flat import Entry, FlatParameters
from minbert_fast.optim import FlatAdamW
from minbert_fast.packing import MultitaskBatch
from minbert_fast.passes import OnePass
from minbert_fast.schema import ConfigError
from minbert_fast.tasks import MultitaskModel
from minbert_fast.training.averaging import WeightAverage
from minbert_fast.training.exchange import Exchange
from minbert_fast.training.extras import Extras
from minbert_fast.training.sharding import ShardedExchange
from minbert_fast.training.world import World

Backend = Literal["fast", "reference"]

RANK_STRIDE = 7_368_787  # between the dropout seeds of ranks


@dataclass(frozen=True)
class StepResult:
    """What a step measured, on the device. T is the number of tasks in the batch's order."""

    losses: Tensor  # [T] weighted mean losses, fp32
    grad_norm: Tensor  # [] norm of the combined gradient before clipping
    gram: Tensor | None  # [T, T] inner products of the tasks' encoder gradients; None where they were not kept apart
    nonfinite: Tensor  # [T] bool: tasks whose loss or gradient is not finite; the step was skipped if any
    task_weights: Tensor | None = None  # [T] dynamic weights of the step's losses (`losses` are without them)
    seconds: Mapping[str, float] = field(default_factory=dict)  # of each part; empty on a device with a time of its own


class Laps:
    """Times the parts of a step on a CPU. On a GPU, where the host only queues work, it measures nothing."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._counts = device.type == "cpu"
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Books the time since the last call under `part`."""
        if self._counts:
            now = time.perf_counter()
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
            self._last = now


class TrainingStep(Protocol):
    """A step that the loop can call, save and restore."""

    @property
    def average(self) -> WeightAverage | None:
        """The averaged weights, where the recipe asks for them: what is evaluated and kept."""

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        """Trains on `batch` with every learning rate times `lr_scale`."""

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """`tensors` by name (moments, generator states) and `scalars` by name (step counts); plain data throughout."""

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores what `state_dict` gave; ValueError where it belongs to another model."""


def make_step(
    backend: Backend, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype, world: World | None = None
) -> TrainingStep:
    """The step for one stage (`recipe` resolved): products in `dtype` (fp32 or bf16), on the model's own device."""
    if backend == "reference":
        return ReferenceStep(model, recipe, dtype)
    return OnePassStep(model, recipe, dtype, world)


# ---- Which parameters train, and how ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainable:
    """A stage's parameters by role, each with its optimizer settings."""

    shared: list[Entry]  # encoder and head layers that several tasks use: surgery acts on these
    words: Entry | None  # the word embedding, when only the encoder's first op uses it
    heads: dict[str, list[Entry]]
    frozen: list[Entry]

    def entries(self) -> Iterable[tuple[str, Entry]]:
        """Every trainable entry with the label of what takes its step together."""
        yield from (("shared", e) for e in self.shared)
        if self.words:
            yield "words", self.words
        yield from ((label, e) for label, entries in self.heads.items() for e in entries)


def trainable(model: MultitaskModel, recipe: Recipe) -> Trainable:
    """Sorts the model's parameters for a stage: `recipe.model.freeze`, `requires_grad`, the stage's tasks decide."""
    options, encoder = recipe.optimizer, model.encoder
    names = {id(p): n for n, p in model.named_parameters()}
    users = [{id(p) for p in model.head_parameters([task])} for task in recipe.tasks]
    tied = {i for i in set().union(*users) if sum(i in u for u in users) > 1}
    pooled = any((model.tasks[task].pooling or model.pooling) == "pooler" for task in recipe.tasks)
    trains = {id(p) for p in encoder.parameters() if p.requires_grad and not recipe.model.freeze}
    if not pooled:
        trains -= {id(p) for p in encoder.pooler_dense.parameters()}

    def entry(p: nn.Parameter, lr: float) -> Entry:
        plain = p.ndim < 2 and not options.decay_all
        factor = lr / options.lr if options.lr else 0.0
        return Entry(names[id(p)], p, factor, 0.0 if plain else options.weight_decay)

    def encoder_entry(p: nn.Parameter) -> Entry:
        return entry(p, options.lr * options.layer_decay ** _depth(names[id(p)], encoder.config.num_hidden_layers))

    head_lr = options.lr if options.head_lr is None else options.head_lr
    word = encoder.word_embedding.get_parameter("weight")
    own = encoder.one_pass_parameters()
    rest = [p for p in encoder.parameters() if all(p is not q for q in (*own, word))]
    shared = [encoder_entry(p) for p in (*own, *rest) if id(p) in trains]
    heads: dict[str, list[Entry]] = {task: [] for task in recipe.tasks}
    for task in recipe.tasks:
        for p in model.head_parameters([task]):
            if not p.requires_grad or p is word or any(p is e.parameter for e in shared):
                continue
            if id(p) in tied:
                shared.append(entry(p, head_lr))
            else:
                heads[task].append(entry(p, head_lr))
    words = encoder_entry(word) if id(word) in trains else None
    if words and any(id(word) in u for u in users):  # tied to a head as well: its gradient is dense
        shared.append(words)
        words = None
    placed = {id(e.parameter) for e in (*shared, *([words] if words else []), *(e for h in heads.values() for e in h))}
    frozen = [Entry(n, p) for n, p in model.encoder.named_parameters() if id(p) not in placed]
    return Trainable(shared, words, heads, frozen)


def _depth(name: str, layers: int) -> int:
    """Layers between a parameter and the encoder's top: 0 for the last layer, `layers` for the embeddings."""
    parts = name.split(".")
    if "bert_layers" in parts:
        return layers - 1 - int(parts[parts.index("bert_layers") + 1])
    return 0 if "pooler_dense" in parts else layers


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**62


def _reseed(seed: int, step: int) -> None:
    """Sets torch's generators for one step, so that a resumed run draws what an uninterrupted one would."""
    torch.manual_seed(_step_seed(seed, step))


def _generator(recipe: Recipe) -> torch.Generator:
    return torch.Generator().manual_seed(recipe.training.seed)


def _weights(recipe: Recipe) -> surgery.Weights:
    """The recipe's surgery; ConfigError for an unknown method."""
    try:
        return surgery.weights(recipe.surgery.method, recipe.surgery.reduction, _generator(recipe))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"surgery/{key}": value for key, value in state.items()}


def _unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("surgery/"): value for key, value in tensors.items() if key.startswith("surgery/")}


# ---- The one-pass step -----------------------------------------------------------------------------------------


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
        self.weights = _weights(recipe)
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
        _reseed(seed, self.steps)
        self.seed.fill_(_step_seed(seed, self.steps))
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
        present = batch.present()
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
        if batch.whole is not None and packed.num_tokens == 0:  # a step too small to give this process anything
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
        losses = [loss * batch.share(name) for name, loss in self.extras.losses(batch, hidden).items()]
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
        tensors = optimizer["tensors"] | _prefixed(self.weights.state_dict()) | self.extras.state_dict()
        return {"tensors": tensors, "scalars": optimizer["scalars"] | {"steps": self.steps}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.optimizer.load_state_dict(state)
        self.weights.load_state_dict(_unprefixed(state["tensors"]))
        self.extras.load_state_dict(state["tensors"])
        self.steps = int(state["scalars"]["steps"])
        self.flat.refresh()


# ---- The naive step ----------------------------------------------------------------------------------------------


class ReferenceStep:
    """The step of a course project: padded, eager, one backward a task over the whole graph, AdamW a tensor.

    Everything it computes with is in `minbert_fast/reference.py`. In bf16 it runs under autocast.
    """

    def __init__(self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype) -> None:
        self.model = model
        self.recipe = recipe
        self.dtype = dtype
        self.weights = _weights(recipe)
        self.generator = _generator(recipe)
        parts = trainable(model, recipe)
        self.entries = {e.name: (label, e) for label, e in parts.entries()}
        self.shared = [e.parameter for label, e in self.entries.values() if label in ("shared", "words")]
        for entry in parts.frozen:
            entry.parameter.requires_grad_(False)
        self.optimizer = reference.AdamW(self._groups(recipe.optimizer), **_adamw_settings(recipe.optimizer))
        self.extras = Extras.of_entries(model, recipe, [entry for _, entry in self.entries.values()])
        self.steps = 0

    @property
    def average(self) -> WeightAverage | None:
        return self.extras.average

    def _groups(self, options: OptimizerOptions) -> list[dict[str, Any]]:
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for _, entry in self.entries.values():
            groups.setdefault((entry.lr_factor, entry.weight_decay), []).append(entry.parameter)
        return [{"params": p, "lr_factor": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        _reseed(self.recipe.training.seed, self.steps)
        self.extras.prepare(self.steps)
        self.steps += 1
        self.model.train()
        laps = Laps(batch.packed.tokens.device)
        self.optimizer.zero_grad()
        with torch.autocast(batch.packed.tokens.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            losses = self.model.losses_padded(batch, self.extras.agreement)
        laps.lap("forward")
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * group["lr_factor"] * lr_scale
        self._backward(batch, self.extras.scaled(list(losses.values())), laps)
        values = torch.stack([loss.detach() for loss in losses.values()])
        parameters = [e.parameter for _, e in self.entries.values() if e.parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.clip or float("inf"))
        nonfinite = ~torch.isfinite(values)
        skip = nonfinite.any() | ~torch.isfinite(norm)
        if not skip:
            self.optimizer.step()
        weighted = self.extras.after(values, batch.present(), skip)
        laps.lap("optimizer")
        return StepResult(values, norm, None, nonfinite, weighted, laps.seconds)

    def _backward(self, batch: MultitaskBatch, losses: Sequence[Tensor], laps: Laps) -> None:
        """Leaves the merged gradient in `.grad`; heads of tasks without examples have none."""
        options = self.recipe.surgery
        if options.method == "none":
            total = torch.stack(list(losses)).sum()
            (total / len(losses) if options.reduction == "mean" else total).backward()
            laps.lap("backward")
        else:
            gradients = reference.task_gradients(losses, self.shared)
            laps.lap("backward")
            if options.method == "pcgrad":
                orders = surgery.task_orders(len(losses), self.generator).tolist()
                merged = reference.pcgrad(gradients, orders, options.reduction)
            else:
                stacked = torch.stack(gradients)
                merged = self.weights(stacked @ stacked.T) @ stacked
            reference.write_gradient(self.shared, merged)
            laps.lap("surgery")
        for label, entry in self.entries.values():
            if label in batch.tasks and not batch.examples(label):
                entry.parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        tensors: dict[str, Tensor] = _prefixed({"generator": self.generator.get_state()})
        scalars: dict[str, Any] = {"steps": self.steps}
        for name, (_, entry) in self.entries.items():
            state = self.optimizer.state.get(entry.parameter)
            if state:
                tensors |= {f"{name}/exp_avg": state["exp_avg"], f"{name}/exp_avg_sq": state["exp_avg_sq"]}
                scalars[f"{name}/step"] = state["step"]
        tensors |= self.extras.state_dict()
        return {"tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        tensors, scalars = state["tensors"], state["scalars"]
        for name, (_, entry) in self.entries.items():
            if f"{name}/step" in scalars:
                self.optimizer.state[entry.parameter] = {
                    "step": int(scalars[f"{name}/step"]),
                    "exp_avg": tensors[f"{name}/exp_avg"].clone(),
                    "exp_avg_sq": tensors[f"{name}/exp_avg_sq"].clone(),
                }
        self.extras.load_state_dict(tensors)
        self.generator.set_state(_unprefixed(tensors)["generator"])
        self.steps = int(scalars["steps"])


def _adamw_settings(options: OptimizerOptions) -> dict[str, Any]:
    return {"lr": options.lr, "betas": options.betas, "eps": options.eps, "correct_bias": options.correct_bias}
