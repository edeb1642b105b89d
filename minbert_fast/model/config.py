# SPDX-License-Identifier: Apache-2.0
"""The encoder's shape: `BertConfig` mirrors a Hugging Face `config.json`."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minbert_fast.common.schema import ConfigError, build, check, plain
from minbert_fast.common.storage import read_json

Pooling = Literal["mean", "cls", "max", "pooler"]

# Keys of a Hugging Face configuration without a field here, and the accepted values. Both activations are the exact GELU.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": ("gelu", "gelu_python"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
}


@dataclass
class BertConfig:
    """The encoder's shape, with the field names of a Hugging Face `config.json`. Raises ConfigError when impossible.

    Fields may be set until a model is built from them; `BertModel(config)` checks them again.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    name_or_path: str = field(default="", compare=False)  # where the weights came from; no part of the shape

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ConfigError for the first field that is impossible."""
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
            check(0 < getattr(self, name) < 2**31, f"{name} = {getattr(self, name)}: expected a positive size")
        check(0 < self.max_position_embeddings <= 2**20, f"max_position_embeddings = {self.max_position_embeddings}")
        check(0 <= self.num_hidden_layers <= 1000, f"num_hidden_layers = {self.num_hidden_layers}: expected 0 to 1000")
        check(0 <= self.pad_token_id < self.vocab_size, f"pad_token_id = {self.pad_token_id}: expected a word id")
        check(self.type_vocab_size >= 1, f"type_vocab_size = {self.type_vocab_size}: expected at least 1")
        check(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size = {self.hidden_size} is no multiple of num_attention_heads = {self.num_attention_heads}",
        )
        check(self.layer_norm_eps > 0, f"layer_norm_eps = {self.layer_norm_eps}: expected a positive number")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            check(0.0 <= getattr(self, name) < 1.0, f"{name} = {getattr(self, name)}: expected 0 <= p < 1")
        check(self.initializer_range >= 0, f"initializer_range = {self.initializer_range}: expected 0 or more")

    @classmethod
    def of(cls, config: object) -> BertConfig:
        """A copy of `config`, or the fields that another class has as attributes: the starter's, or transformers'.

        Raises ConfigError for a configuration that is impossible.
        """
        if isinstance(config, cls):
            config.check()
            return copy.copy(config)
        check(
            hasattr(config, "__dict__"), f"config = {config!r:.60}: expected a BertConfig; from_pretrained takes a name"
        )
        return cls.from_mapping(vars(config), type(config).__name__)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> BertConfig:
        """From a Hugging Face configuration: unknown keys are ignored, but another architecture is refused."""
        for key, accepted in FIXED.items():
            if values.get(key) not in (*accepted, None):
                raise ConfigError(f"{where}: {key} = {values[key]!r}: expected {accepted[0]!r}")
        known = {key: values[key] for key in cls.__dataclass_fields__ if values.get(key) is not None}
        return build(cls, known, where)

    @classmethod
    def from_file(cls, path: Path) -> BertConfig:
        """From a `config.json`; raises ConfigError naming the file, the key and what was expected."""
        return cls.from_mapping(read_json(path), str(path))

    def to_json(self) -> str:
        """A `config.json` that transformers' AutoModel understands."""
        stock = {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
        }
        shape = plain(self)
        del shape["name_or_path"]
        return json.dumps(stock | shape, indent=2, sort_keys=True) + "\n"
