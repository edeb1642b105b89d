# SPDX-License-Identifier: Apache-2.0
"""A drop-in minBERT with a packed, one-pass multitask training step."""

import sys

from minbert_fast.common import cli, onednn_cache
from minbert_fast.common.version import __version__
from minbert_fast.model import packing
from minbert_fast.model.bert import BertLayer, BertModel, BertSelfAttention
from minbert_fast.model.config import BertConfig
from minbert_fast.model.patching import patch
from minbert_fast.recipes import recipe
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.optim import AdamW
from minbert_fast.surgery.course import PCGrad
from minbert_fast.tasks.predictor import Predictor

__all__ = [
    "AdamW",
    "BertConfig",
    "BertLayer",
    "BertModel",
    "BertSelfAttention",
    "PCGrad",
    "Predictor",
    "Recipe",
    "__version__",
    "patch",
]

# Import paths of earlier versions.
sys.modules |= {f"{__name__}.cli": cli, f"{__name__}.config": recipe, f"{__name__}.packing": packing}

onednn_cache.limit_caches()
