# SPDX-License-Identifier: Apache-2.0
"""The same job with transformers: its models have one head, so the module, the loop and the files are one's own."""

import csv
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup

directory, output = sys.argv[1:]
epochs, batch_size = 2, 16


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    random.Random(1).shuffle(rows)
    held = len(rows) // 10
    return rows[held:], rows[:held]


class TwoTasks(nn.Module):
    def __init__(self, directory, classes):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(directory)
        self.verdict = nn.Linear(self.encoder.config.hidden_size, classes)

    def embed(self, batch):
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def grade(self, first, second):
        return F.cosine_similarity(self.embed(first), self.embed(second))


def tokens(texts):
    return tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")


def verdict_loss(rows):
    labels = torch.tensor([classes.index(row["verdict"]) for row in rows])
    return F.cross_entropy(model.verdict(model.embed(tokens([row["review"] for row in rows]))), labels)


def alike_loss(rows):
    first, second = (tokens([row[column] for row in rows]) for column in ("first", "second"))
    grades = torch.tensor([(float(row["grade"]) - low) / (high - low) for row in rows])
    return F.mse_loss(model.grade(first, second), grades)


reviews, reviews_dev = read("reviews.csv")
pairs, pairs_dev = read("alike.csv")
classes = sorted({row["verdict"] for row in reviews})
grades = [float(row["grade"]) for row in pairs]
low, high = min(grades), max(grades)
tokenizer = AutoTokenizer.from_pretrained(directory)
model = TwoTasks(directory, len(classes))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
steps = epochs * -(-max(len(reviews), len(pairs)) // batch_size)
schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
model.train()
for step in range(steps):
    losses = []
    for rows, loss in ((reviews, verdict_loss), (pairs, alike_loss)):
        begin = step * batch_size % len(rows)
        losses.append(loss((rows + rows)[begin : begin + batch_size]))
    optimizer.zero_grad()
    sum(losses).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
model.eval()
with torch.no_grad():
    guesses = model.verdict(model.embed(tokens([row["review"] for row in reviews_dev]))).argmax(-1).tolist()
    found = model.grade(*(tokens([row[column] for row in pairs_dev]) for column in ("first", "second"))).numpy()
    right = [classes[guess] == row["verdict"] for guess, row in zip(guesses, reviews_dev, strict=True)]
    print(np.mean(right), np.corrcoef(found, [float(row["grade"]) for row in pairs_dev])[0, 1])
    print(classes[model.verdict(model.embed(tokens(["A wonderful cake."]))).argmax(-1).item()])
Path(output).mkdir(parents=True, exist_ok=True)
model.encoder.save_pretrained(output)
tokenizer.save_pretrained(output)
torch.save(model.verdict.state_dict(), Path(output, "verdict.pt"))
Path(output, "heads.json").write_text(json.dumps({"classes": classes, "low": low, "high": high}))
