# SPDX-License-Identifier: Apache-2.0
"""A drop-in minBERT with a packed, one-pass multitask training step."""

from minbert_fast.version import __version__

__all__ = ["__version__"]
