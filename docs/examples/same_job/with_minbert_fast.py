# SPDX-License-Identifier: Apache-2.0
"""Two tasks on one encoder: classes of single texts, grades of pairs. README, "Your own data", compares the lines."""

import sys

from minbert_fast import fit

model, output = sys.argv[1:]
result = fit(
    {"training": {"epochs": 2, "batch_size": 16}},
    data={
        "verdict": {"train": "reviews.csv", "text": "review", "label": "verdict"},
        "alike": {"train": "alike.csv", "text": ["first", "second"], "label": "grade"},
    },
    model=model,
    output=output,
)
print(result.metrics)
print(result.predictor.predict("verdict", ["A wonderful cake."]))
