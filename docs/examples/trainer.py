# SPDX-License-Identifier: Apache-2.0
"""The transformers Trainer on a patched model: one more line than without minbert_fast.

python docs/examples/trainer.py [--model DIR|HUB_NAME] [--output DIR] [--steps N]

Fine-tunes a classifier of five sentiments on the sample data that ships with minbert_fast. Needs transformers and
accelerate.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import transformers

import minbert_fast
from minbert_fast.data import read_table, sample_directory


class Reviews(torch.utils.data.Dataset):
    """Rows of a sentiment file in the format that the Trainer expects."""

    def __init__(self, split: str, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        table = read_table(sample_directory().data / f"ids-sst-{split}.csv", "sentiment")
        self.inputs = tokenizer(table.sentences[0], truncation=True)["input_ids"]
        self.labels = table.labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> dict[str, object]:
        return {"input_ids": self.inputs[row], "labels": int(self.labels[row])}


def main() -> dict[str, float]:
    """Trains and evaluates; returns the scores."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default=str(sample_directory().model))
    flags.add_argument("--output", default="runs/trainer")
    flags.add_argument("--steps", type=int, default=200)
    options = flags.parse_args()

    transformers.set_seed(1)  # the classifier's weights are drawn before the Trainer sets its own seed
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=5)
    minbert_fast.patch(model)  # the one line

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Reviews("train", tokenizer),
        eval_dataset=Reviews("dev", tokenizer),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda seen: {"accuracy": float(np.mean(seen.predictions.argmax(-1) == seen.label_ids))},
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    scores = main()
    print(f"accuracy {scores['eval_accuracy']:.3f}")
