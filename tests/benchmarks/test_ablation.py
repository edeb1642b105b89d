# SPDX-License-Identifier: Apache-2.0
"""The ablation: disjoint training and dev rows, the values of every variant, the table of scores."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import ablation
from minbert_fast.common.schema import plain
from minbert_fast.data import sample_directory
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.runs import flatten
from tests.small import small_data


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def test_the_split_contains_every_training_row_once(tmp_path: Path) -> None:
    source = sample_directory().data
    ablation.hold_out(source, tmp_path)
    for name in ("ids-sst", "quora", "sts"):
        head, *every = rows(source / f"{name}-train.csv")
        parts = [rows(tmp_path / f"{name}-{split}.csv") for split in ("train", "dev")]
        assert [part[0] for part in parts] == [head, head]
        assert sorted(parts[0][1:] + parts[1][1:]) == sorted(every)
        assert len(parts[1]) - 1 == len(every) // 10


def test_variants_differ_in_what_they_name() -> None:
    seen = {}
    for variant in ablation.VARIANTS:
        recipe = ablation.build_recipe(variant, 1, Path("data"), None)
        encoders = tuple(recipe.tasks[name]["encoder"] for name in ("paraphrase", "similarity"))
        batches = tuple(task.get("batch_size") for task in recipe.tasks.values())
        weights = tuple(task.get("weight", 1) for task in recipe.tasks.values())
        seen[variant] = (recipe.training.epochs, *encoders, recipe.regularisation.r_drop, batches, weights)
        assert (recipe.training.seed, recipe.optimizer.lr) == (1, 1e-4)
        assert list(recipe.tasks)[:3] == ["sentiment", "paraphrase", "similarity"]
    best = Recipe.load("best").tasks
    batches = tuple(task.get("batch_size", 32) for task in best.values())
    weights = tuple(task.get("weight", 1) for task in best.values())
    equal, even = (32, 32, 32), (1, 1, 1)
    assert list(seen.values()) == [
        (1, "bi", "bi", 0, equal, even),
        (1, "cross", "bi", 0, equal, even),
        (1, "cross", "both", 0, equal, even),
        (1, "cross", "both", 0, (*equal, 8), (*even, 0.5)),
        (2, "cross", "both", 0, batches, (*even, 0.5)),
        (2, "cross", "both", 0, batches, weights),
        (1, "cross", "bi", 1, equal, even),
    ]


def test_an_idea_changes_one_thing_of_the_whole_recipe() -> None:
    """All else is as in `best`, and no idea lacks the reviews or is one of the parts."""
    assert not set(ablation.IDEAS) & set(ablation.VARIANTS)
    whole = plain(ablation.build_recipe("best", 1, Path("data"), None))
    for idea in list(ablation.IDEAS)[1:]:
        changed = plain(ablation.build_recipe(idea, 1, Path("data"), None))
        assert len([key for key in whole if whole[key] != changed[key]]) == 1, idea
        assert list(changed["tasks"]) == list(whole["tasks"])


def test_a_screen_tries_every_two_ideas_in_all_combinations_equally_often() -> None:
    start = flatten(plain(ablation.build_recipe("best", 1, Path("data"), None)))
    for screened, screen in zip(ablation.SCREENED, ablation.SCREENS, strict=True):
        assert len(screen) == 8
        for one, other in itertools.combinations(screened, 2):
            met = Counter((one in ideas, other in ideas) for ideas in screen.values())
            assert set(met.values()) == {2}
            assert len(met) == 4
        for variant, ideas in screen.items():
            whole = flatten(plain(ablation.build_recipe(variant, 1, Path("data"), None)))
            assert whole["regularisation.r_drop"] == 0
            for idea in screened:
                alone = flatten(plain(ablation.build_recipe(idea, 1, Path("data"), None)))
                changed = [key for key in {*alone, *start} if alone.get(key) != start.get(key)]
                assert changed, idea
                assert all((whole.get(key) == alone.get(key)) == (idea in ideas) for key in changed), (variant, idea)


def test_effects_are_the_gains_that_the_screens_were_made_with() -> None:
    """Scores that are sums of the ideas' gains, with a difference of 0.002 between two seeds."""
    gains = {idea: 0.001 * place for screened in ablation.SCREENED for place, idea in enumerate(screened, -2)}

    def run(variant: str, ideas: Sequence[str], noise: float) -> dict[str, object]:
        score = 0.7 + sum(gains[idea] for idea in ideas) + noise
        return {"variant": variant, "scores": dict.fromkeys(ablation.METRICS, score)}

    assert len(ablation.SCREEN) == 15, "the run without any idea is in both screens"
    one = [run(variant, ideas, 0.0) for variant, ideas in ablation.SCREEN.items()]
    two = [*one, *(run(variant, ideas, 0.002) for variant, ideas in ablation.SCREEN.items())]
    for idea, gain in gains.items():
        (line,) = (line for line in ablation.effects(one).splitlines() if f"| {idea} " in line)
        assert line.count(f" {gain:+.4f} |") == 4
        (line,) = (line for line in ablation.effects(two).splitlines() if f"| {idea} " in line)
        assert line.count(f" {gain:+.4f} ± 0.0007 |") == 4, "2 * 0.0014 / 4"


def test_runs_give_a_table_and_a_second_call_only_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = {name: ablation.VARIANTS[name] for name in list(ablation.VARIANTS)[1:3]}
    monkeypatch.setattr(ablation, "SERIES", {"parts": few})
    whole = ablation.build_recipe
    monkeypatch.setattr(
        ablation, "build_recipe", lambda *a: whole(*a).with_values({"training": {"max_steps": 2}}, "test")
    )
    arguments = ["--data", str(small_data(tmp_path / "data")), "--output", str(tmp_path / "runs"), "--seeds", "1", "2"]
    assert ablation.main([*arguments, "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["runs"]
    assert [(run["variant"], run["seed"]) for run in found] == [(name, seed) for seed in (1, 2) for name in few]
    for run in found:
        summary = json.loads(
            (tmp_path / "runs" / f"parts-{list(few).index(run['variant'])}-{run['seed']}" / "summary.json").read_text()
        )
        assert run["scores"] == {metric: summary["dev"][metric] for metric in ablation.METRICS}
        assert run["steps"] == 2
    printed = capsys.readouterr().out
    assert ablation.table(found) in printed
    written = [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("summary.json"))]
    assert ablation.main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("summary.json"))] == written


def test_the_table_has_means_and_deviations() -> None:
    def run(variant: str, value: float) -> dict[str, object]:
        return {"variant": variant, "scores": dict.fromkeys(ablation.METRICS, value)}

    text = ablation.table([run("a", 0.5), run("b", 0.25), run("a", 0.7)])
    assert "| a (2 seeds)" in text
    assert "| b (1 seed) " in text
    assert "0.600 ± 0.141" in text
    assert "0.250 |" in text
