# SPDX-License-Identifier: Apache-2.0
"""The multitask model: one shared encoder, and one head per task for that task's part of a packed batch.

    packed batch -> encoder -> hidden [N, H] -> one embedding per sentence [B, H] -> each task's rows -> head -> loss

Shapes: N token rows, B sentences, S tokens of the longest sentence, n examples of a task, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minbert_fast.common import imports
from minbert_fast.common.device import shapes_alone
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_bytes, write_text
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.model import weights
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import Pooling
from minbert_fast.model.packing import PackedBatch
from minbert_fast.model.weight_files import read_safetensors
from minbert_fast.ops.pooling import pool
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks.base import WORD_EMBEDDING, Head, HeadOutput, Task, TaskInput, build_task
from minbert_fast.tasks.consistency import ConsistencyLoss
from minbert_fast.tasks.presets import PRESETS

BEGUN = "stages begun"  # key in the metadata of heads.safetensors


def build_tasks(recipe: Recipe, begun: int = 0) -> dict[str, Task]:
    """All tasks of the recipe and of its stages, in order. Raises ConfigError for a mistake in their options.

    A task has the options of the last of the first `begun` stages that trains it; before that, those of the recipe, or of
    the first stage that names it.
    """
    tables = dict(recipe.tasks)
    stages = recipe.resolved_stages()
    for stage in stages:
        for name, options in stage.tasks.items():
            ours = tables.setdefault(name, options)
            if "data" not in ours and "data" in options and str(ours.get("kind") or name) not in PRESETS:
                tables[name] = {**ours, "data": options["data"]}  # its columns
    for stage in stages[:begun]:
        for name, options in stage.tasks.items():
            first = {"data": tables[name]["data"]} if "data" in tables[name] else {}  # judges the whole run
            tables[name] = {key: value for key, value in options.items() if key != "data"} | first
    files = imports.missing(recipe.imports)
    try:
        return {name: build_task(name, options) for name, options in tables.items()}
    except ConfigError as error:
        if not files:
            raise
        flags = " ".join(f"--import {file}" for file in files)
        raise ConfigError(f"{error}; made with {', '.join(files)}: add {flags}") from None


class MultitaskModel(nn.Module):
    """`encoder` and one head for each of `tasks`. A module that heads share is one object with one name."""

    def __init__(self, encoder: BertModel, tasks: Mapping[str, Task], pooling: Pooling = "mean") -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.tasks = dict(tasks)
        self.begun = 0  # stages of the recipe that have begun: `tasks` have the options of their last ones
        device = next(encoder.parameters()).device
        self.heads = _build_heads(self.tasks, encoder, pooling).to(device, torch.float32)

    # ---- From hidden states to losses --------------------------------------------------------------------------

    def inputs(self, batch: MultitaskBatch, hidden: Tensor) -> dict[str, TaskInput]:
        """The input of each task's head; hidden [N, H] is the encoder's output for `batch.packed`.

        Each sentence has one vector, fp32; that of an empty sentence is zero (pooler: tanh(bias)).
        """
        cu_seqlens = batch.packed.cu_seqlens
        blocks = [batch.num_examples(name) for name in batch.tasks for _ in range(batch.arity[name])]
        pooled: dict[Pooling, tuple[Tensor, ...]] = {}  # [n, H] of each block; one split, whose backward is one `cat`
        inputs = {}
        block = 0
        for name in batch.tasks:
            mode = self.tasks[name].pooling or self.pooling
            if mode not in pooled:
                vectors = pool(hidden, cu_seqlens[: sum(blocks) + 1], "cls" if mode == "pooler" else mode)
                vectors = self.encoder.pool(vectors).float() if mode == "pooler" else vectors
                pooled[mode] = vectors.split(blocks)
            end = block + batch.arity[name]
            inputs[name] = TaskInput(
                embeddings=pooled[mode][block:end],
                hidden=hidden,
                cu_seqlens=cu_seqlens,
                max_seqlen=batch.packed.max_seqlen,
                first=sum(blocks[:block]),
                labels=batch.labels.get(name),
                pooling=mode,
            )
            block = end
        return inputs

    def outputs(self, batch: MultitaskBatch, hidden: Tensor) -> dict[str, HeadOutput]:
        """The output of each task's head for hidden [N, H], the encoder's output. No synchronisation with the device."""
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = self.inputs(batch, hidden)
            return {name: self.head(name)(inputs[name]) for name in batch.tasks}

    def losses(
        self, batch: MultitaskBatch, hidden: Tensor, consistency: ConsistencyLoss | None = None
    ) -> dict[str, Tensor]:
        """Each task's mean loss times its weight, scalars in the order of `batch.tasks`.

        A task without examples in this batch gives 0 with zero gradients. `consistency` is the loss of duplicated
        examples (None: no penalty). No synchronisation with the device.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            outputs = self.outputs(batch, hidden)
            return {name: self.loss(name, output, batch, consistency) for name, output in outputs.items()}

    def losses_padded(self, batch: MultitaskBatch, consistency: ConsistencyLoss | None = None) -> dict[str, Tensor]:
        """The same losses in the style of a course project: padded, eager, one encoder call per column of sentences."""
        offsets = batch.packed.cu_seqlens.tolist()
        first = 0
        losses = {}
        for name in batch.tasks:
            mode = self.tasks[name].pooling or self.pooling
            n, arity = batch.num_examples(name), batch.arity[name]
            ends = offsets[first : first + n * arity + 1]
            rows = [self.encoder.word_embedding.weight[:0]]  # [0, H], for a task without examples
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
                pooling=mode,
            )
            losses[name] = self.loss(name, self.head(name)(inputs), batch, consistency)
            first += n * arity
        return losses

    def _encode_padded(self, packed: PackedBatch, offsets: list[int], mode: Pooling) -> tuple[Tensor, Tensor]:
        """Pooled vectors [n, H] and token rows of the sentences between `offsets`, from the encoder's own modules."""
        spans = [slice(begin, end) for begin, end in itertools.pairwise(offsets)]
        columns = (packed.tokens.long(), packed.types.long(), torch.ones_like(packed.tokens).long())
        ids, types, mask = (pad_sequence([column[span] for span in spans], batch_first=True) for column in columns)
        hidden = self.encoder.stock(ids, mask, types)  # [n, S, H]
        pooled = pool_padded(hidden, mask, mode, self.encoder)
        return pooled.to(torch.promote_types(pooled.dtype, torch.float32)), hidden[mask.bool()]

    def loss(
        self, name: str, output: HeadOutput, batch: MultitaskBatch, consistency: ConsistencyLoss | None = None
    ) -> Tensor:
        """The mean loss of task `name` times its weight, from its head's output; 0 without examples.

        With several processes, this is the part of the step's mean that this process's examples contribute.
        """
        if batch.num_examples(name) == 0:
            return output.scores.sum()  # the sum of no elements: 0, and part of the autograd graph
        head, labels = self.head(name), batch.labels.get(name)
        if name in batch.duplicated:
            loss = (consistency or ConsistencyLoss()).loss(head, output, labels)
        else:
            loss = head.loss(output, labels)
        weight = self.tasks[name].weight * batch.loss_fraction(name)
        return loss if weight == 1 else loss * weight

    def head(self, name: str) -> Head:
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    # ---- Stages and parameters ---------------------------------------------------------------------------------

    def check_stage(self, tasks: Mapping[str, Task]) -> None:
        """Raises ConfigError for a task without a head, or if the options need parameters of other shapes."""
        merged = self.tasks | dict(tasks)
        for name in tasks:
            if name not in self.heads:
                raise ConfigError(f"tasks.{name}: the model has no head of this name (it has {', '.join(self.heads)})")
        with shapes_alone():
            heads = _build_heads(merged, self.encoder, self.pooling)
            needed = {key: t.shape for key, t in self._head_tensors(heads).items()}
        if needed != {key: t.shape for key, t in self._head_tensors(self.heads).items()}:
            raise ConfigError(f"tasks.{', tasks.'.join(tasks)}: a stage cannot change the parameters of a head")

    def configure(self, tasks: Mapping[str, Task], begun: int = 0) -> None:
        """Sets the options of `tasks` in stage number `begun`, counted from 1. Raises as `check_stage`."""
        self.check_stage(tasks)
        self.begun = begun
        self.tasks = self.tasks | dict(tasks)
        for name, task in tasks.items():
            self.head(name).configure(task.options)
        self.heads.to(next(self.encoder.parameters()).device)  # new buffers, such as class weights

    def head_parameters(self, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """Parameters of the heads called `names` (None: all heads), shared ones once."""
        return list(nn.ModuleList(self.heads[name] for name in (self.heads if names is None else names)).parameters())

    @torch.no_grad()
    def load_pretraining_heads(self, tensors: Mapping[str, Tensor], where: str) -> list[str]:
        """Initialises heads from BERT's own pre-training heads, if `tensors` of file `where` contain them.

        Returns the names of the initialised tasks. Raises WeightsError for an incomplete head or a wrong shape.
        """
        loaded = []
        for name in self.tasks:
            parameters = self.head(name).published_parameters()
            found = {key: tensors[key] for key in parameters if key in tensors}
            if not found:
                continue
            weights.check_keys(parameters, found, where)
            for key, parameter in parameters.items():
                parameter.copy_(found[key])
            loaded.append(name)
        return loaded

    @torch.no_grad()
    def continue_heads(self, directory: Path) -> tuple[list[str], dict[str, str]]:
        """Copies the heads of the trained model in `directory` to the heads of the same name, kind, classes and shapes.

        Returns the names of the copied heads, and the reason for each other one. Raises ConfigError or WeightsError for
        a damaged model.
        """
        trained = MultitaskModel.load(directory)
        copied: list[str] = []
        reasons: dict[str, str] = {}
        for name, task in self.tasks.items():
            if name not in trained.heads:
                reasons[name] = "not in that model"
                continue
            then = trained.tasks[name]
            ours, theirs = self.head(name).state_dict(), trained.head(name).state_dict()
            if (then.kind, then.class_names) != (task.kind, task.class_names):
                reasons[name] = "another kind" if then.kind != task.kind else "other classes"
            elif {key: t.shape for key, t in ours.items()} != {key: t.shape for key, t in theirs.items()}:
                reasons[name] = "another shape"
            else:
                self.head(name).load_state_dict(theirs)
                copied.append(name)
        return copied, reasons

    def _head_tensors(self, heads: nn.Module) -> dict[str, Tensor]:
        """Parameters and saved buffers of heads by name, without the encoder's; a shared one has the first head's name."""
        encoder, saved = {id(p) for p in self.encoder.parameters()}, heads.state_dict().keys()
        tensors = itertools.chain(heads.named_parameters(), heads.named_buffers())
        return {key: t for key, t in tensors if id(t) not in encoder and key in saved}

    # ---- Files -------------------------------------------------------------------------------------------------

    def save(self, directory: Path, recipe_toml: str, tokenizer: Tokenizer | None = None) -> None:
        """Writes a model directory: encoder and tokenizer in Hugging Face layout, heads.safetensors, recipe.toml.

        The metadata of heads.safetensors say how many stages had begun, since a stage may change how a score is read.
        """
        self.encoder.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save(directory)
        heads = {key: t.detach().contiguous().cpu() for key, t in self._head_tensors(self.heads).items()}
        write_bytes(directory / "heads.safetensors", safetensors_bytes(heads, {BEGUN: str(self.begun)}))
        write_text(directory / "recipe.toml", recipe_toml)

    @classmethod
    def load(cls, directory: Path | str, **overrides: Any) -> MultitaskModel:
        """Reads a model that `save` wrote, in evaluation mode; `overrides` replace values of the encoder's configuration.

        Raises ConfigError (or its subclass WeightsError) naming the file and the problem.
        """
        directory = Path(directory)
        weights.check_place(directory)
        for name in ("recipe.toml", "heads.safetensors"):
            if not (directory / name).is_file():
                raise ConfigError(f"{directory}: no trained model, it holds no {name}")
        recipe = Recipe.load(str(directory / "recipe.toml"))
        heads = directory / "heads.safetensors"
        found = read_safetensors(heads)
        with safe_open(heads, "pt") as file:
            text = (file.metadata() or {}).get(BEGUN, "0")
        begun, most = int(text) if text.isascii() and text.isdigit() else -1, len(recipe.resolved_stages())
        if not 0 <= begun <= most:
            raise ConfigError(f"{heads}: its {BEGUN} are {text!r}, expected a number from 0 to {most}")
        try:
            tasks = build_tasks(recipe, begun)
        except ConfigError as error:
            raise ConfigError(f"{directory / 'recipe.toml'}: {error}") from None
        encoder = BertModel.from_pretrained(directory, local_files_only=True, **overrides)
        model = cls(encoder, tasks, recipe.model.pooling)
        model.begun = begun
        expected = model._head_tensors(model.heads)
        weights.check_keys(expected, found, str(heads))
        with torch.no_grad():
            for key, tensor in expected.items():
                tensor.copy_(found[key])
        return model.eval()


class _Heads(nn.ModuleDict):
    """Heads by name; also by names that nn.ModuleDict refuses, because it has such attributes, such as `type`."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


def _build_heads(tasks: Mapping[str, Task], encoder: BertModel, pooling: Pooling) -> _Heads:
    for name, task in tasks.items():
        if getattr(task.options, "extra_layers", 0) and (task.pooling or pooling) == "pooler":
            where = f'tasks.{name}: extra_layers with pooling = "pooler", which belongs to the encoder'
            raise ConfigError(f'{where}: set tasks.{name}.pooling to "mean", "cls" or "max"')
    shared: dict[str, nn.Module] = {WORD_EMBEDDING: encoder.word_embedding}
    return _Heads({name: task.build_head(encoder.config, shared) for name, task in tasks.items()})


def pool_padded(hidden: Tensor, mask: Tensor, mode: Pooling, encoder: BertModel) -> Tensor:
    """hidden [n, S, H], mask [n, S] -> [n, H], as in course code."""
    if mode == "cls":
        return hidden[:, 0]
    if mode == "pooler":
        return encoder.pool(hidden[:, 0])
    attended = mask[:, :, None].bool()
    if mode == "max":
        return hidden.masked_fill(~attended, -torch.inf).amax(1)
    return (hidden * attended).sum(1) / mask.sum(1, keepdim=True)
