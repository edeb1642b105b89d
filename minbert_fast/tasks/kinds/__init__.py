# SPDX-License-Identifier: Apache-2.0
"""The kinds of tasks, one file each, and what several of them share.

To add a kind, add a file like `regression.py` and import it here.
"""

from minbert_fast.tasks.kinds import (  # noqa: F401  (each registers its kind)
    classification,
    contrastive,
    multilabel,
    pair_classification,
    pair_regression,
    pretraining,
    ranking,
    regression,
)
