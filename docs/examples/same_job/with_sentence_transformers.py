# SPDX-License-Identifier: Apache-2.0
"""The same job with sentence-transformers: it trains both, but a head of single texts is a loss and is not saved."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
from torch import nn
from torch.nn import functional as F

directory, output = sys.argv[1:]


class Classifier(nn.Module):
    def __init__(self, model, classes):
        super().__init__()
        self.model = model
        self.linear = nn.Linear(model.get_sentence_embedding_dimension(), classes)

    def forward(self, features, labels):
        (texts,) = features
        return F.cross_entropy(self.linear(self.model(texts)["sentence_embedding"]), labels)


model = SentenceTransformer(directory, device="cpu")
reviews = Dataset.from_csv("reviews.csv")
classes = sorted(set(reviews["verdict"]))
reviews = reviews.map(lambda row: {"label": classes.index(row["verdict"])}, remove_columns="verdict")
pairs = Dataset.from_csv("alike.csv").rename_column("grade", "label")
low, high = min(pairs["label"]), max(pairs["label"])
pairs = pairs.map(lambda row: {"label": (row["label"] - low) / (high - low)})
reviews, pairs = (rows.train_test_split(test_size=0.1, seed=1) for rows in (reviews, pairs))
classifier = Classifier(model, len(classes))
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        output_dir=f"{output}-checkpoints",
        num_train_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=2e-5,
        warmup_steps=1,
        report_to="none",
        use_cpu=True,
    ),
    train_dataset={"verdict": reviews["train"], "alike": pairs["train"]},
    loss={"verdict": classifier, "alike": losses.CosineSimilarityLoss(model)},
)
trainer.train()
with torch.no_grad():
    vectors = model.encode(reviews["test"]["review"], convert_to_tensor=True)
    guesses = classifier.linear(vectors).argmax(-1)
    print((guesses == torch.tensor(reviews["test"]["label"])).float().mean().item())
    test = pairs["test"]
    print(EmbeddingSimilarityEvaluator(test["first"], test["second"], test["label"])(model))
    print(classes[classifier.linear(model.encode(["A wonderful cake."], convert_to_tensor=True)).argmax(-1).item()])
model.save_pretrained(output)
torch.save(classifier.linear.state_dict(), Path(output, "verdict.pt"))
Path(output, "heads.json").write_text(json.dumps({"classes": classes, "low": low, "high": high}))
