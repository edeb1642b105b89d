# SPDX-License-Identifier: Apache-2.0
"""The table of `reproduce`: its comparisons of rows, and the file of finished rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minbert_fast.common.schema import ConfigError
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting import published
from minbert_fast.trainer import reproduction


def row_with(recipe: str, rows: dict[str, int], **dev: float) -> dict[str, Any]:
    """A finished row whose published dev scores are 0.5."""
    stated = {"dev": dict.fromkeys(dev, 0.5), "train": {}, "test": {}}
    return {
        "recipe": recipe,
        "published": stated,
        "measured": {"dev": dev},
        "dev_rows": rows,
        "failure": "",
        "without": [],
        **dict.fromkeys(published.CONDITIONS),
    }


@pytest.mark.parametrize(
    ("gain", "holds"),
    [(0.09, "yes"), (-0.09, "no"), (0.08, "unclear"), (-0.08, "unclear"), (0.0, "unclear")],
)
def test_a_comparison_within_the_noise_of_the_dev_rows_is_unclear(gain: float, holds: str) -> None:
    """0.391 against 0.390 counted as "gradient surgery helps: yes"."""
    frozen = row_with("sbert-sst-frozen", {"sentiment": 300}, sentiment_accuracy=0.5)
    full = row_with("sbert-sst-full", {"sentiment": 300}, sentiment_accuracy=0.5 + gain)
    text = published.comparisons({row["recipe"]: row for row in (frozen, full)})
    (line,) = (line for line in text.splitlines() if line.startswith("| fine-tuning the encoder"))
    margin, word = (cell.strip() for cell in line.split("|")[-3:-1])
    assert word == holds
    assert float(margin) == pytest.approx(0.081, abs=0.0015)  # 2 sqrt(2 * 0.25 / 300) = 0.0816


def test_a_row_that_ran_without_some_of_its_data_is_not_compared() -> None:
    """Without SNLI and MNLI, "triplets beat regression" compared the triplets with a run that had read no NLI at all."""
    counts = {"sentiment": 100, "paraphrase": 100, "similarity": 100}
    scores = {"sentiment_accuracy": 0.5, "paraphrase_accuracy": 0.7, "similarity_pearson": 0.8}
    names = "bertology-nli-triplet", "bertology-nli-regression"
    rows = {name: row_with(name, counts, **scores) for name in names}
    assert "triplets beat regression" in published.comparisons(rows)
    rows["bertology-nli-regression"]["without"] = ["snli", "mnli"]
    assert published.comparisons(rows) == ""


@pytest.mark.parametrize(
    "changed", [{"epochs_scale": 0.2}, {"max_steps": 9}, {"weights": "others"}, {"data": "others"}]
)
def test_rows_under_other_conditions_are_not_compared(changed: dict[str, Any]) -> None:
    """A whole epoch against a fifth of one counted as "the cosine beats a linear layer: yes"."""
    names = "finetune-cosine", "finetune-baseline"
    rows = {name: row_with(name, {"similarity": 100}, similarity_pearson=0.8) for name in names}
    assert "the cosine beats" in published.comparisons(rows)
    rows["finetune-baseline"] |= changed
    assert published.comparisons(rows) == ""


def test_standard_errors_of_the_columns() -> None:
    counts = {"sentiment": 100, "paraphrase": 400, "similarity": 101}
    row = row_with("x", counts, sentiment_accuracy=0.5, paraphrase_accuracy=0.9, similarity_pearson=0.6)
    sentiment, paraphrase, similarity = 0.05, 0.015, 0.064  # sqrt(.25/100), sqrt(.09/400), (1 - .36)/sqrt(100)
    for column, expected in (
        ("sentiment", sentiment),
        ("similarity", similarity),
        ("mean", (sentiment**2 + paraphrase**2 + similarity**2) ** 0.5 / 3),
        ("score", (sentiment**2 + paraphrase**2 + (similarity / 2) ** 2) ** 0.5 / 3),
    ):
        assert published.standard_error(row, column) == pytest.approx(expected), column


def test_a_results_file_of_another_shape_is_an_error_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for text, reason in (("{", "Expecting"), ("[1]", "not subscriptable"), ('[{"recipe": "a"}]', "row a lacks one of")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason) as error:
            reproduction.read_rows(path)
        assert "\n" not in str(error.value)


def test_a_name_selects_its_recipe_before_the_report_that_begins_with_it() -> None:
    """`reproduce siamese` trained all eight rows of that report."""
    assert reproduction.select_names(["siamese"]) == ["siamese"]
    assert reproduction.select_names(["finetune"]) == [n for n in published.published_names() if n[:8] == "finetune"]
    assert "siamese-similarity-mse" in reproduction.select_names(["siamese*"])


def test_epochs_are_scaled_in_every_stage_and_stay_whole_where_tasks_take_turns() -> None:
    stages = {"training": {"epochs": 2.0, "seed": 3}}, {"training": {"epochs": 5.0}, "data": {"scheme": "sequential"}}
    recipe = Recipe().with_values({"training": {"epochs": 4.0}, "stages": [{}, *stages]}, "test")
    found = [stage.training for stage in reproduction.scale_epochs(recipe, 0.25).resolved_stages()]
    assert [(each.epochs, each.seed) for each in found] == [(1.0, 11711), (0.5, 3), (1.0, 11711)]
    turns = Recipe().with_values({"data": {"scheme": "sequential"}}, "test")
    assert reproduction.scale_epochs(turns, 0.25).training.epochs == 1.0


def test_the_score_and_the_mean_of_a_row() -> None:
    scores: dict[str, float | None] = {"cfimdb_accuracy": 0.5, "paraphrase_accuracy": 0.75, "similarity_pearson": 0.5}
    assert published.score(scores) == pytest.approx((0.5 + 0.75 + 0.75) / 3)
    assert published.plain_mean(scores) == pytest.approx((0.5 + 0.75 + 0.5) / 3)
    assert published.score(scores | {"score": 0.9}) == 0.9, "as the report states it"
    for metric in scores:
        partial = scores | {metric: None, "score": 0.9}
        assert published.score(partial) is published.plain_mean(partial) is None


def test_a_finished_row_belongs_to_its_values_and_backend_wherever_its_folders_are() -> None:
    def fingerprint(backend: str = "fast", **values: Any) -> str:
        return reproduction.fingerprint(Recipe().with_values(values, "test"), backend)

    moved = {"directory": "/there/data", "cache": "/tmp/cache", "held_out": {"sentiment": "hash"}}
    assert fingerprint(data={"directory": "/here/data"}) == fingerprint(data=moved)
    assert fingerprint(model={"name": "/here/bert"}) == fingerprint(model={"name": "/there/bert"})
    others = [{"training": {"seed": 2}}, {"data": {"directory": "data"}}, {"model": {"name": "bert"}}]
    assert len({fingerprint(), fingerprint("reference"), *(fingerprint(**values) for values in others)}) == 5
