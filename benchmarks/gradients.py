# SPDX-License-Identifier: Apache-2.0
"""Gradient matrices J for the surgery benchmark: random ones, and those of a real step on the embedded sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minbert_fast import BertConfig, BertModel
from minbert_fast.common import huge_pages
from minbert_fast.common.schema import build
from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.collate import Collator
from minbert_fast.data.formats import find_tables
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel, build_tasks

#: The benchmarked encoders, and their numbers of parameters (with the pooler).
CONFIGS = {
    "MiniLM-L6": BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "BERT-base": BertConfig(),
}
PARAMETERS = {"MiniLM-L6": 22_713_216, "BERT-base": 109_482_240}


def random_gradients(tasks: int, parameters: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """J [T, P] of realistic magnitude; rows share a common part, so that some pairs of tasks conflict."""
    generator = torch.Generator(device).manual_seed(0)
    J = huge_pages.zeros(tasks, parameters, dtype=dtype, device=device)
    for task, row in enumerate(J):
        row.copy_(torch.randn(parameters, generator=generator, device=device).mul_(1e-3 * (1 + task)))
        if task:
            row.add_(J[0], alpha=0.3 * (-1) ** task)
    return J


def real_gradients(model: str, device: torch.device) -> Tensor:
    """J [3, P] of the three course tasks with 32 examples each; the word embedding has all its rows."""
    recipe = build(Recipe, {"surgery": {"method": "pcgrad"}}, "benchmark")
    torch.manual_seed(0)
    network = MultitaskModel(BertModel(CONFIGS[model]), build_tasks(recipe), recipe.model.pooling).to(device)
    sample = sample_directory()
    tokenizer = Tokenizer.from_pretrained(sample.model)
    tables = {}
    for name, task in network.tasks.items():
        path = find_tables(sample.data, "train", (task.layout,)).paths[task.layout]
        tables[name] = tokenize_table(read_table(path, task.layout), tokenizer)
    batch = Collator(tables, max_length=128)({name: np.arange(32) for name in tables})
    step = OnePassStep(network, recipe, torch.float32)
    step(batch.to(device), 1.0)
    flat, words = step.flat, step.gradients.words(batch.packed.num_words, CONFIGS[model].hidden_size)
    J = huge_pages.zeros(3, flat.words_end, device=device)
    J[:, : flat.shared_end] = step.gradients.J
    ids = batch.packed.word_ids[: batch.packed.num_words].to(device).long()
    flat.view(J, network.encoder.word_embedding.weight).index_copy_(1, ids, words)
    return J
