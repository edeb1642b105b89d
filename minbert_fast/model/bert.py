# SPDX-License-Identifier: Apache-2.0
"""The drop-in minBERT encoder (Devlin et al. 2019): the course's names, one body, two ways through it.

    model(input_ids, attention_mask) -> {"last_hidden_state": [B, S, H], "pooler_output": [B, H]}   course code
    model(packed_batch)              -> {"last_hidden_state": [N, H]}                               no padding

The layers below read the same either way: a *pass* (`minbert_fast/model/passes.py`) says where a weight comes from (the
parameter itself, or a view of the flat bf16 copy) and where its gradient goes (`.grad`, or per task into J).

Shapes: B sentences, S positions, N packed tokens, H hidden, h heads, d = H / h, F intermediate.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minbert_fast.model import inference, weights
from minbert_fast.model.config import BertConfig, Pooling
from minbert_fast.model.packing import PackedBatch
from minbert_fast.model.passes import Attend, Attention, AutogradPass, DenseRows, PackedRows, Pass
from minbert_fast.ops import backend


class BertSelfAttention(nn.Module):
    """Multi-head self-attention: query, key and value as one product, then softmax(q k^T / sqrt(d)) v."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, run: Pass, attend: Attend) -> Tensor:
        qkv = run.linear(hidden, self.query, self.key, self.value)  # [N, 3 H]
        return attend(qkv.unflatten(-1, (3, self.num_attention_heads, -1)))  # [N, 3, h, d] -> [N, H]


class BertLayer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attention = BertSelfAttention(config)
        self.attention_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.interm_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.out_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.out_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, run: Pass, attend: Attend) -> Tensor:
        context = self.self_attention(hidden, run, attend)  # [N, H]
        branch = run.product(context, self.attention_dense)  # [N, H]; the bias joins add_norm
        hidden = run.add_norm(branch, self.attention_dense, hidden, self.attention_layer_norm)
        inner = run.bias_gelu(run.product(hidden, self.interm_dense), self.interm_dense)  # [N, F]
        branch = run.product(inner, self.out_dense)  # [N, H]
        return run.add_norm(branch, self.out_dense, hidden, self.out_layer_norm)


class BertModel(nn.Module):
    """BERT with the course's attribute names; weights from `from_pretrained`, or drawn as BERT draws them."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: a layer's activations are computed again in the backward pass
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.pos_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.tk_type_embedding = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embed_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bert_layers = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])
        self.pooler_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The last hidden state, and for rectangular input the pooler's output.

        input_ids [B, S] word ids, attention_mask [B, S] (1 attended, 0 not, anywhere; None: all attended),
        token_type_ids [B, S] (None: all 0); or one PackedBatch. Positions with mask 0 give zeros and influence nothing.
        Sentences longer than the model's positions are truncated with a warning (their outputs beyond are zeros).
        """
        if isinstance(input_ids, PackedBatch):
            return {"last_hidden_state": self.encode_packed(AutogradPass(self.config, self.training), input_ids)}
        hidden = self.last_hidden_state(input_ids, attention_mask, token_type_ids)
        return {"last_hidden_state": hidden, "pooler_output": self.pool(hidden[:, 0])}

    def pool(self, first: Tensor) -> Tensor:
        """The pooler: tanh(W h + b) of each sentence's first token [B, H]."""
        return torch.tanh(self.pooler_dense(first.to(self.pooler_dense.weight.dtype)))

    def encode_packed(self, run: Pass, batch: PackedBatch) -> Tensor:
        """The last hidden state of a packed batch [N, H], with weights and gradients as `run` says."""
        rows = PackedRows(batch)
        hidden = run.embed(rows, self)
        for number, layer in enumerate(self.layers()):
            run.enter(number, hidden)
            hidden = layer(hidden, run, run.attend(rows))
        return hidden

    def _checkpointed(self, layer: BertLayer, hidden: Tensor, run: AutogradPass, rows: Attention) -> Tensor:
        """A layer of which only the input is kept; its second run draws the same dropout as its first."""
        site = run.sites

        def again(hidden: Tensor) -> Tensor:
            run.sites = site
            out: Tensor = layer(hidden, run, run.attend(rows))
            return out

        out: Tensor = checkpoint(again, hidden, use_reentrant=False)
        return out

    def encode(
        self,
        sentences: Sequence[str],
        tokenizer: inference.Encodes,
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """One vector a sentence, fp32 [n, H]: sorted by length, packed, without gradients and dropout.

        `tokenizer` is `minbert_fast.data.Tokenizer.from_pretrained(directory)`. `dtype` is the precision of the products
        (None: the parameters' own). `progress` is told how many sentences each batch had. `Predictor` keeps converted
        weights between calls. Raises ValueError for a single string or a `max_length` below 2.
        """
        snapshot = inference.Snapshot(self, dtype or self.word_embedding.weight.dtype)
        return inference.encode(
            snapshot,
            sentences,
            tokenizer,
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            progress=progress,
        )

    def last_hidden_state(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The last hidden state [B, S, H] of rectangular input, as `forward` has it."""
        limit = self.config.max_position_embeddings
        batch, length = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if length > limit:
            count = int((mask[:, limit:] != 0).any(1).sum())
            warnings.warn(f"{count} of {batch} sentences exceed {limit} positions and were truncated", stacklevel=3)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        drop_padding = backend.drops_padding(input_ids)
        rows = DenseRows.of(input_ids[:, :limit], mask[:, :limit], types[:, :limit], drop_padding)
        run = AutogradPass(self.config, self.training)
        hidden = run.embed(rows, self)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers():
            hidden = self._checkpointed(layer, hidden, run, rows) if again else layer(hidden, run, run.attend(rows))
        return rows.rectangle(hidden, length)

    def layers(self) -> list[BertLayer]:
        """The encoder's layers, bottom first."""
        return [layer for layer in self.bert_layers if isinstance(layer, BertLayer)]

    def one_pass_parameters(self) -> list[nn.Parameter]:
        """Parameters whose per-task gradients the packed encoder writes itself, in the flat buffer's order.

        All of the encoder but the word embedding (its gradient is row-sparse) and the pooler (a head in all but name).
        Query, key and value stand together, so that they are one matrix.
        """
        modules = [self.pos_embedding, self.tk_type_embedding, self.embed_layer_norm]
        parameters = [p for module in modules for p in module.parameters()]
        for layer in self.layers():
            attend = layer.self_attention
            qkv = (attend.query, attend.key, attend.value)
            parameters += [m.get_parameter(kind) for kind in ("weight", "bias") for m in qkv]
            for module in (layer.attention_dense, layer.attention_layer_norm, layer.interm_dense, layer.out_dense):
                parameters += module.parameters()
            parameters += layer.out_layer_norm.parameters()
        return parameters

    # ---- Weights -------------------------------------------------------------------------------------------------

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, output_loading_info: Literal[False] = False, **keywords: Any
    ) -> BertModel: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, output_loading_info: Literal[True], **keywords: Any
    ) -> tuple[BertModel, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config: BertConfig | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        output_loading_info: bool = False,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> BertModel | tuple[BertModel, dict[str, Any]]:
        """The encoder of a Hugging Face directory, a hub name, a course `.pt` file or a `.safetensors` file.

        Keywords mean what they mean to transformers: `state_dict` replaces the stored tensors (under the course's or
        Hugging Face's names); `output_loading_info` returns (model, {"missing_keys", "unexpected_keys", ...}); `dtype`
        (by its older name `torch_dtype`) is that of the parameters, "auto" the file's, None fp32; `subfolder` is a
        folder of the directory; `revision`, `cache_dir`, `token`, `force_download` and `local_files_only` go to the hub.
        `overrides` replace values of the configuration (say `hidden_dropout_prob=0.3`). `config`, or a `config.json`
        beside it, serves a `.pt` file whose heads are not 64 wide. A missing pooler is drawn afresh and a task's head
        is left, each with a warning. Raises WeightsError or ConfigError naming the file and what is wrong with it.
        """
        weights.check_overrides(overrides, inspect.signature(cls.from_pretrained).parameters)
        path = weights.resolve(
            str(name_or_path),
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        where = str(path) if state_dict is None else "state_dict"
        found, tensors, left = weights.read(path, state_dict)
        base = config or found or weights.infer_config(tensors, where)
        chosen = BertConfig.from_mapping({**vars(base), **overrides}, str(path))
        if hasattr(chosen, "name_or_path"):
            object.__setattr__(chosen, "name_or_path", str(name_or_path))
        with torch.device("meta"):  # whatever sizes a file declares, memory is taken for what it really holds
            wanted = cls(chosen).state_dict()
        wanted.pop(weights.POSITIONS, None)
        missing = {key for key in wanted if key.startswith("pooler_dense.")}
        if any(key in tensors for key in missing):
            missing = set()
        weights.check_keys({k: t for k, t in wanted.items() if k not in missing}, tensors, where)
        model = cls(chosen).to(weights.chosen_dtype(dtype, torch_dtype, tensors))
        if missing:
            warnings.warn(f"{where} has no pooler: it starts from fresh random weights", stacklevel=2)
        if left:
            warnings.warn(f"{where}: the encoder alone is loaded; left out: {weights.some(left)}", stacklevel=2)
        model.load_state_dict(dict(tensors), strict=False)
        info = {"missing_keys": missing, "unexpected_keys": set(left), "mismatched_keys": set(), "error_msgs": []}
        return (model.eval(), info) if output_loading_info else model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` as transformers' AutoModel loads them, bit for bit."""
        weights.write(Path(directory), self.config, self.state_dict())
