# SPDX-License-Identifier: Apache-2.0
"""The metadata of model cards, as huggingface_hub reads them back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from minbert_fast import BertModel, Predictor
from minbert_fast.common.schema import build
from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.model_card import model_card
from minbert_fast.reporting.usage import usage
from minbert_fast.tasks import MultitaskModel, build_task, build_tasks


def test_the_scores_are_a_model_index(tmp_path: Path) -> None:
    """By task and metric, under the hub's names; without the overall score, losses and values that are not numbers."""
    torch.manual_seed(0)
    tasks = {"reviews": {"kind": "sentiment"}, "similarity": {}, "reviews_two": {"kind": "sentiment"}}
    recipe = build(Recipe, {"tasks": tasks}, "test")
    small = MultitaskModel(BertModel.from_pretrained(sample_directory().model), build_tasks(recipe))
    source = tmp_path / "run" / "best"
    small.save(source, recipe.to_toml(), Tokenizer.from_pretrained(sample_directory().model))
    dev = {
        "reviews_accuracy": 0.4321, "reviews_macro_f1": 0.2, "reviews_loss": 1.5, "reviews_two_accuracy": 0.9,
        "similarity_pearson": 0.7, "similarity_spearman": None, "score": 0.8,
    }  # fmt: skip
    (source.parent / "summary.json").write_text(json.dumps({"dev": dev}))
    model = Predictor.from_pretrained(source, device="cpu")
    text = model_card(model, source, "someone/my-model", "sentence-transformers")
    card = ModelCard(text)
    assert (card.data.library_name, card.data.model_name) == ("sentence-transformers", "my-model")
    found = {(r.task_name, r.task_type, r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("reviews", "text-classification", "ids-sst", "accuracy"): 0.4321,
        ("reviews", "text-classification", "ids-sst", "f1"): 0.2,
        ("reviews_two", "text-classification", "ids-sst", "accuracy"): 0.9,
        ("similarity", "sentence-similarity", "sts", "pearsonr"): 0.7,
    }
    assert {r.dataset_split for r in card.data.eval_results} == {"dev"}
    assert "| similarity Spearman | - | - |" in text


def test_a_model_without_scores_has_a_valid_card(tmp_path: Path) -> None:
    source = sample_directory().model
    model = Predictor.from_pretrained(source, device="cpu")
    card = ModelCard(model_card(model, source, "a: name # with signs", "huggingface"))
    assert card.data.eval_results is None
    assert "sentence-transformers" not in card.data.tags


def test_the_code_of_a_card_reads_every_text_of_an_example() -> None:
    data = {"train": "found.csv", "text": ["query", "answer", "no", "never"]}
    task = build_task("find", {"kind": "ranking", "data": data})
    heads = MultitaskModel(BertModel.from_pretrained(sample_directory().model), {"find": task})
    model = Predictor(heads.encoder, Tokenizer.from_pretrained(sample_directory().model), heads=heads)
    code, own = usage(model, "found", "onnx", "find")
    assert "[*firsts, *seconds, *thirds, *texts_4]" in code
    assert own.count('["') == 4
