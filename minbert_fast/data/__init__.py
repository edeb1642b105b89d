# SPDX-License-Identifier: Apache-2.0
"""Data files to training batches: read, check, tokenize with a cache, sample, pack."""

from minbert_fast.data.files import read_table
from minbert_fast.data.formats import Layout, add_format
from minbert_fast.data.labels import Label
from minbert_fast.data.sample import sample_directory
from minbert_fast.data.tokenizer import Tokenizer

__all__ = ["Label", "Layout", "Tokenizer", "add_format", "read_table", "sample_directory"]
