# SPDX-License-Identifier: Apache-2.0
"""Data: reading and checking files, tokenizing with a cache, sampling, collating; the demonstration."""

from minbert_fast.data.buckets import EXACT, Buckets, choose_buckets
from minbert_fast.data.cache import default_cache_dir, load_tokens, tokenize_table
from minbert_fast.data.collate import Collator, evaluation_batches, pin, training_batches
from minbert_fast.data.files import BadRow, Table, TableReader, read_table
from minbert_fast.data.formats import (
    FORMATS,
    MAIN_TASKS,
    DataError,
    Discovery,
    FileFormat,
    Label,
    add_format,
    find_tables,
)
from minbert_fast.data.lines import read_sentences
from minbert_fast.data.prefetch import prefetch
from minbert_fast.data.pretraining import Corpus, Made, Maker, Masking, Pairing, all_pairs, all_sentences
from minbert_fast.data.sample import Sample, sample_directory
from minbert_fast.data.sampling import SCHEMES, Draw, Sampler
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import Encoder, Text, Tokens, TokenTable, cut, join
from minbert_fast.data.vocabulary import Vocabulary

__all__ = [
    "EXACT",
    "FORMATS",
    "MAIN_TASKS",
    "SCHEMES",
    "BadRow",
    "Buckets",
    "Collator",
    "Corpus",
    "DataError",
    "Discovery",
    "Draw",
    "Encoder",
    "FileFormat",
    "Label",
    "Made",
    "Maker",
    "Masking",
    "Pairing",
    "Sample",
    "Sampler",
    "Table",
    "TableReader",
    "Text",
    "TokenTable",
    "Tokenizer",
    "Tokens",
    "Vocabulary",
    "add_format",
    "all_pairs",
    "all_sentences",
    "choose_buckets",
    "cut",
    "default_cache_dir",
    "evaluation_batches",
    "find_tables",
    "join",
    "load_tokens",
    "pin",
    "prefetch",
    "read_sentences",
    "read_table",
    "sample_directory",
    "tokenize_table",
    "training_batches",
]
