# SPDX-License-Identifier: Apache-2.0
"""A drop-in minBERT with a packed, one-pass multitask training step."""

import os
import sys

# A command (`python -m minbert_fast.train`, `minbert-fast train`) sets this before torch loads libgomp, unless the user has
# chosen.
if os.path.basename(sys.argv[0]) in ("-m", "minbert-fast") and "OMP_WAIT_POLICY" not in os.environ:
    # OpenMP threads that wait at a barrier spin for seconds by default, and take the core from a thread that works
    # whenever other processes share the machine. With this bound they sleep after about 0.1 ms.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from minbert_fast.common import cli, onednn_cache
from minbert_fast.common.version import __version__
from minbert_fast.model import packing
from minbert_fast.model.bert import BertLayer, BertModel, BertSelfAttention
from minbert_fast.model.config import BertConfig
from minbert_fast.model.patching import patch
from minbert_fast.recipes import recipe
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.optim import AdamW
from minbert_fast.surgery.wrapper import PCGrad
from minbert_fast.tasks.inference.predictor import Predictor
from minbert_fast.trainer.fit import fit

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
    "fit",
    "patch",
]

# Import paths of earlier versions, which still work.
sys.modules |= {f"{__name__}.cli": cli, f"{__name__}.config": recipe, f"{__name__}.packing": packing}

onednn_cache.limit_caches()
