# SPDX-License-Identifier: Apache-2.0
"""A drop-in minBERT with a packed, one-pass multitask training step."""

from minbert_fast import products
from minbert_fast.bert import BertModel
from minbert_fast.config import BertConfig
from minbert_fast.optim import AdamW
from minbert_fast.patching import patch
from minbert_fast.pcgrad import PCGrad
from minbert_fast.predictor import Predictor
from minbert_fast.version import __version__

__all__ = ["AdamW", "BertConfig", "BertModel", "PCGrad", "Predictor", "__version__", "patch"]

products.bound_caches()
