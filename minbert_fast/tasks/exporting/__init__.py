# SPDX-License-Identifier: Apache-2.0
"""The files of a model directory for another library: an encoder, a stock classifier, an ONNX graph.

Each function writes weights, configuration and tokenizer to an existing folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from minbert_fast.common.storage import write_json
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.model import sentence_modules
from minbert_fast.model.sentence_modules import SentenceModules
from minbert_fast.tasks.exporting import classifier, onnx_graph
from minbert_fast.tasks.inference.predictor import Predictor


def write_encoder(folder: Path, model: Predictor, *, modules: bool) -> None:
    """Writes the encoder as transformers' AutoModel loads it; with `modules`, also as SentenceTransformer does."""
    model.encoder.save_pretrained(folder)
    model.tokenizer.save(folder)
    if modules:
        _write_modules(folder, model)


def write_classifier(folder: Path, model: Predictor, task: str) -> str:
    """Writes the head of `task` as AutoModelForSequenceClassification loads it; returns a note for the user, or "".

    Raises ConfigError for a head that no stock class of transformers computes.
    """
    found = classifier.classifier_of(model.multitask(), task)
    classifier.write(folder, model.encoder, found)
    _write_tokenizer(folder, model)
    notes = []
    if found.pooling == "cls":
        notes.append(
            "Its class is DebertaV2ForSequenceClassification: that of BERT has a tanh layer behind the first token."
        )
    if found.own_decision:
        notes.append(f"Task {task} decides at a threshold of its own; transformers names the most likely class.")
    return " ".join(notes)


def write_onnx(folder: Path, model: Predictor, task: str | None, *, int8: bool) -> str:
    """Writes the encoder (`task` None) or a head as an ONNX graph; returns how its numbers compare with the model's.

    The configuration is transformers', so that libraries which run ONNX models find the pooling or the class names in it.
    Raises ConfigError for a missing library, RunError for a head that cannot be traced.
    """
    _write_tokenizer(folder, model)
    written = onnx_graph.write(folder, model, task, int8=int8)
    config = json.loads(model.encoder.config.to_json())
    if task is None:
        _write_modules(folder, model)
    elif written.problem is not None:
        names = written.contents.classes or (task,)
        config |= classifier.labels_config(names, written.problem) | {
            "architectures": ["BertForSequenceClassification"]
        }
    write_json(folder / "config.json", config)
    what = "vectors" if task is None else "probabilities" if written.contents.classes else "predictions"
    where = f"On {len(onnx_graph.SAMPLES)} sentences its {what}{' with 8-bit weights' if int8 else ''}"
    return (
        f"{where} are at most {written.difference:.1e} away from those in fp32 (the largest is {written.largest:.3g})."
    )


def _write_tokenizer(folder: Path, model: Predictor) -> None:
    """Writes the tokenizer with the model's own maximum length, to which `truncation=True` cuts in transformers."""
    Tokenizer(model.tokenizer.vocabulary, model.max_length).save(folder)


def _write_modules(folder: Path, model: Predictor) -> None:
    """Writes sentence-transformers' files to the encoder's folder."""
    dense = model.encoder.pooler_dense
    pooler = {"weight": dense.weight, "bias": dense.bias} if model.pooling == "pooler" else None
    hidden = model.encoder.config.hidden_size
    cut = model.width if model.width < hidden else None
    modules = SentenceModules(folder, model.pooling, model.normalize, model.max_length, model.prompt, pooler, cut)
    sentence_modules.write(folder, modules, hidden)
