# SPDX-License-Identifier: Apache-2.0
"""The multitask model: one shared encoder, one head a task, and how a packed batch is divided among them.

    packed batch -> encoder -> hidden [N, H] -> one embedding a sentence [B, H] -> each task's rows -> head -> loss

Shapes: N token rows, B sentences, n examples of a task, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_bytes, write_text
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model import weights
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import Pooling
from minbert_fast.model.packing import PackedBatch
from minbert_fast.ops.pooling import pool
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks.agreement import Agreement
from minbert_fast.tasks.base import WORDS, Head, HeadOutput, Task, TaskInput, build_task

Pooler = Callable[[Tensor], Tensor]  # first tokens' hidden state [B, H] -> [B, H]


class SavesTokenizer(Protocol):
    """Anything that can write tokenizer files into a directory."""

    def save(self, directory: Path) -> None: ...


def build_tasks(recipe: Recipe) -> dict[str, Task]:
    """Every task of the recipe and of its stages, in order. Raises ConfigError for a mistake in their options."""
    tables = dict(recipe.tasks)
    if recipe.stages:
        for stage in recipe.resolved_stages():
            for name, options in stage.tasks.items():
                tables.setdefault(name, options)
    return {name: build_task(name, options) for name, options in tables.items()}


def stage_tasks(stage: Recipe) -> dict[str, Task]:
    """The tasks that one resolved stage trains. Raises ConfigError for a mistake in their options."""
    return {name: build_task(name, options) for name, options in stage.tasks.items()}


class MultitaskModel(nn.Module):
    """`encoder` and one head for each of `tasks`; modules tied between heads are one object with one name."""

    def __init__(self, encoder: BertModel, tasks: Mapping[str, Task], pooling: Pooling = "mean") -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.tasks = dict(tasks)
        device = next(encoder.parameters()).device
        self.heads = _build_heads(self.tasks, encoder).to(device, torch.float32)

    # ---- From hidden states to losses --------------------------------------------------------------------------

    def sentence_embeddings(
        self, packed: PackedBatch, hidden: Tensor, pooling: Pooling | None = None, pooler: Pooler | None = None
    ) -> Tensor:
        """One vector a sentence [B, H], fp32, from hidden [N, H]; empty sentences give zeros (the pooler: tanh(b)).

        `pooler` stands in for the encoder's own (the one-pass step keeps its gradient apart by task).
        """
        mode = pooling or self.pooling
        if mode != "pooler":
            return pool(hidden, packed.cu_seqlens, mode)
        first = pool(hidden, packed.cu_seqlens, "cls")
        return (pooler or self.encoder.pool)(first).float()

    def inputs(self, batch: MultitaskBatch, hidden: Tensor, pooler: Pooler | None = None) -> dict[str, TaskInput]:
        """What each head of the batch's tasks sees; hidden [N, H] is the encoder's output for `batch.packed`."""
        pooled: dict[Pooling, Tensor] = {}
        divided = {}
        first = 0
        for name in batch.tasks:
            mode = self.tasks[name].pooling or self.pooling
            if mode not in pooled:
                pooled[mode] = self.sentence_embeddings(batch.packed, hidden, mode, pooler)
            n, arity = batch.examples(name), batch.arity[name]
            rows = pooled[mode][first : first + n * arity]
            divided[name] = TaskInput(
                embeddings=rows.unflatten(0, (arity, n)).unbind(0),
                hidden=hidden,
                cu_seqlens=batch.packed.cu_seqlens,
                max_seqlen=batch.packed.max_seqlen,
                first=first,
                labels=batch.labels.get(name),
            )
            first += n * arity
        return divided

    def outputs(self, batch: MultitaskBatch, hidden: Tensor, pooler: Pooler | None = None) -> dict[str, HeadOutput]:
        """What the heads of the batch's tasks make of hidden [N, H], the encoder's output. Asks the device nothing."""
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = self.inputs(batch, hidden, pooler)
            return {name: self.head(name)(inputs[name]) for name in batch.tasks}

    def losses(
        self, batch: MultitaskBatch, hidden: Tensor, pooler: Pooler | None = None, agreement: Agreement | None = None
    ) -> dict[str, Tensor]:
        """Each task's mean loss times its weight, scalars in the order of `batch.tasks`.

        A task without examples in this batch gives 0 with zero gradients. `agreement` is what is asked of examples with
        a twin (None: nothing beside the labels'). Asks the device nothing.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            outputs = self.outputs(batch, hidden, pooler)
            return {name: self.loss(name, output, batch, agreement) for name, output in outputs.items()}

    def losses_padded(self, batch: MultitaskBatch, agreement: Agreement | None = None) -> dict[str, Tensor]:
        """The same losses as a course project computes them: padded, eager, one encoder call a sentence column."""
        offsets = batch.packed.cu_seqlens.tolist()
        first = 0
        losses = {}
        for name in batch.tasks:
            mode = self.tasks[name].pooling or self.pooling
            n, arity = batch.examples(name), batch.arity[name]
            ends = offsets[first : first + n * arity + 1]
            rows = [self.encoder.word_embedding.weight[:0]]  # for a task without examples
            embeddings = rows * arity
            if n:
                columns = [self._encode_padded(batch.packed, ends[c * n : c * n + n + 1], mode) for c in range(arity)]
                embeddings, rows = [x for x, _ in columns], [x for _, x in columns]
            inputs = TaskInput(
                embeddings=tuple(embeddings),
                hidden=torch.cat(rows),
                cu_seqlens=batch.packed.cu_seqlens[first : first + n * arity + 1] - ends[0],
                max_seqlen=batch.packed.max_seqlen,
                first=0,
                labels=batch.labels.get(name),
            )
            losses[name] = self.loss(name, self.head(name)(inputs), batch, agreement)
            first += n * arity
        return losses

    def _encode_padded(self, packed: PackedBatch, offsets: list[int], mode: Pooling) -> tuple[Tensor, Tensor]:
        """The sentences between `offsets` through the encoder's own modules: pooled [n, H], and their token rows."""
        ids, types, mask = _rectangle(packed, offsets)
        hidden = self.encoder.stock(ids, mask, types)  # [n, S, H]
        pooled = _pool_padded(hidden, mask, mode, self.encoder)
        return pooled.to(torch.promote_types(pooled.dtype, torch.float32)), hidden[mask.bool()]

    def loss(self, name: str, output: HeadOutput, batch: MultitaskBatch, agreement: Agreement | None = None) -> Tensor:
        """The mean loss of task `name` times its weight, from its head's output; 0 without examples.

        Of a batch that is one process's share of a step: its part of the step's mean (the parts add up to the mean).
        """
        if batch.examples(name) == 0:
            return output.scores.sum()  # of nothing: 0, and part of the graph
        head, labels = self.head(name), batch.labels.get(name)
        weight = self.tasks[name].weight * batch.share(name)
        if name in batch.twins:
            return (agreement or Agreement()).loss(head, output, labels) * weight
        return head.loss(output, labels) * weight

    def head(self, name: str) -> Head:
        """The head of task `name`."""
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    # ---- Stages and parameters ---------------------------------------------------------------------------------

    def configure(self, tasks: Mapping[str, Task]) -> None:
        """Takes over weights, losses and dropout of a stage's tasks.

        Raises ConfigError for a task that the model has no head for, or options that ask for other parameters.
        """
        merged = self.tasks | dict(tasks)
        for name in tasks:
            if name not in self.heads:
                raise ConfigError(f"tasks.{name}: the model has no head of this name (it has {', '.join(self.heads)})")
        with torch.device("meta"):  # shapes alone: no memory, and no draw from the random generator
            wanted = {key: tuple(t.shape) for key, t in self._own(_build_heads(merged, self.encoder)).items()}
        if wanted != {key: tuple(t.shape) for key, t in self._own(self.heads).items()}:
            raise ConfigError(f"tasks.{', tasks.'.join(tasks)}: a stage cannot change the parameters of a head")
        self.tasks = merged
        for name, task in tasks.items():
            self.head(name).options = task.options

    def head_parameters(self, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """Parameters of the heads of `names` (None: of all), tied ones once."""
        wanted = self.heads if names is None else nn.ModuleList([self.heads[name] for name in names])
        return list(wanted.parameters())

    @torch.no_grad()
    def adopt(self, tensors: Mapping[str, Tensor], where: str) -> list[str]:
        """Lets heads start from BERT's own pre-training heads, as far as they are among `tensors` of file `where`.

        Returns the names of the tasks whose did. Raises WeightsError for a part of a head, or one of another shape.
        """
        adopted = []
        for name in self.tasks:
            own = self.head(name).published()
            found = {key: tensors[key] for key in own if key in tensors}
            if not found:
                continue
            weights.check_keys(own, found, where)
            for key, parameter in own.items():
                parameter.copy_(found[key])
            adopted.append(name)
        return adopted

    def _own(self, heads: nn.Module) -> dict[str, Tensor]:
        """Parameters and buffers of heads by name: what is tied once, under its first name; the encoder's not at all."""
        encoder = {id(p) for p in self.encoder.parameters()}
        tensors = itertools.chain(heads.named_parameters(), heads.named_buffers())
        return {key: t for key, t in tensors if id(t) not in encoder}

    # ---- Files -------------------------------------------------------------------------------------------------

    def save(self, directory: Path, recipe_toml: str, tokenizer: SavesTokenizer | None = None) -> None:
        """Writes a model directory: encoder and tokenizer as Hugging Face has them, heads.safetensors, recipe.toml."""
        self.encoder.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save(directory)
        heads = {key: t.detach().contiguous().cpu() for key, t in self._own(self.heads).items()}
        write_bytes(directory / "heads.safetensors", safetensors_bytes(heads))
        write_text(directory / "recipe.toml", recipe_toml)

    @classmethod
    def load(cls, directory: Path | str, **overrides: Any) -> MultitaskModel:
        """The model that `save` wrote, in evaluation mode; `overrides` replace values of the encoder's configuration.

        Raises ConfigError (WeightsError among them) naming the file and what is wrong with it.
        """
        directory = Path(directory)
        for name in ("recipe.toml", "heads.safetensors"):
            if (directory / "best" / name).is_file() and not (directory / name).is_file():
                raise ConfigError(f"{directory}: the output of a training run; its model is {directory / 'best'}")
            if not (directory / name).is_file():
                raise ConfigError(f"{directory}: no trained model, it holds no {name}")
        recipe = Recipe.load(str(directory / "recipe.toml"))
        try:
            tasks = build_tasks(recipe)
        except ConfigError as error:
            raise ConfigError(f"{directory / 'recipe.toml'}: {error}") from None
        encoder = BertModel.from_pretrained(directory, local_files_only=True, **overrides)
        model = cls(encoder, tasks, recipe.model.pooling)
        found = weights.read_safetensors(directory / "heads.safetensors")
        wanted = model._own(model.heads)
        weights.check_keys(wanted, found, str(directory / "heads.safetensors"))
        with torch.no_grad():
            for key, tensor in wanted.items():
                tensor.copy_(found[key])
        return model.eval()


def _build_heads(tasks: Mapping[str, Task], encoder: BertModel) -> nn.ModuleDict:
    shared: dict[str, nn.Module] = {WORDS: encoder.word_embedding}
    return nn.ModuleDict({name: task.build_head(encoder.config, shared) for name, task in tasks.items()})


def _rectangle(packed: PackedBatch, offsets: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences between `offsets` as word ids, token types and mask [n, S], padded to their own longest."""
    lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64, device=packed.tokens.device)
    types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (begin, length) in enumerate(zip(offsets, lengths, strict=False)):
        ids[row, :length] = packed.tokens[begin : begin + length]
        types[row, :length] = packed.types[begin : begin + length]
        mask[row, :length] = 1
    return ids, types, mask


def _pool_padded(hidden: Tensor, mask: Tensor, mode: Pooling, encoder: BertModel) -> Tensor:
    """hidden [n, S, H], mask [n, S] -> [n, H], as course code writes it."""
    if mode == "cls":
        return hidden[:, 0]
    if mode == "pooler":
        return encoder.pool(hidden[:, 0])
    attended = mask[:, :, None].bool()
    if mode == "max":
        return hidden.masked_fill(~attended, -torch.inf).amax(1)
    return (hidden * attended).sum(1) / mask.sum(1, keepdim=True)
