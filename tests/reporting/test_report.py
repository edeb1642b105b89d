# SPDX-License-Identifier: Apache-2.0
"""The report: self-contained and escaped HTML with the numbers of the files, also for incomplete and damaged runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from minbert_fast.common.cli import run
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.report import main
from minbert_fast.reporting import charts
from minbert_fast.reporting.comparison import write_comparison
from minbert_fast.reporting.report import write_report
from minbert_fast.reporting.runs import read_run
from minbert_fast.reporting.task_sections import task_section

EVIL = '<script>alert("x")</script> & <img src=http://evil/>'
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Checker(HTMLParser):
    """Collects tags and text; asserts that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert checker.open == []
    return checker


def details() -> dict[str, Any]:
    worst = {"id": "a<b", "sentences": [EVIL, "plain"], "label": 0, "prediction": 1, "probability": 0.9, "error": 0.9}
    sentiment = {
        "kind": "sentiment", "primary": "sentiment_accuracy", "classes": ["bad", "so <so>", "good"],
        "metrics": {"sentiment_accuracy": 138 / 151, "sentiment_macro_f1": 0.88, "sentiment_loss": 0.4},
        "ids": [str(i) for i in range(151)], "labels": [0] * 70 + [1] * 41 + [2] * 40,
        "predictions": [0] * 70 + [1] * 41 + [1] * 13 + [2] * 27,
        "confusion": [[70, 0, 0], [0, 41, 0], [0, 13, 27]], "average_precision": [1.0, 0.8, 0.97],
        "distribution": {
            "edges": None, "train": [300, 200, 0], "train_rows": 500, "labels": [70, 41, 40], "predictions": [70, 54, 27]
        },
        "calibration": {"bins": [[0.55, 0.4, 51], [0.95, 1.0, 100]], "error": 0.0838}, "worst": [worst] * 9,
    }  # fmt: skip
    similarity = {
        "kind": "similarity", "primary": "similarity_pearson", "classes": None,
        "metrics": {"similarity_pearson": 0.5}, "ids": ["1", "2", "3"], "labels": [0.0, 5.0, 2.0],
        "predictions": [1.0, None, 2.5], "worst": [worst | {"label": 5.0, "prediction": None, "probability": None}],
        "distribution": {
            "edges": [0.0, 2.5, 5.0], "train": None, "train_rows": None, "labels": [2, 1], "predictions": [1, 1]
        },
    }  # fmt: skip
    return {"split": "dev", "tasks": {"sentiment": sentiment, "similarity": similarity}}


def make_run(directory: Path, steps: int = 40, lr: float = 1e-3) -> Path:
    records = []
    for step in range(1, steps + 1):
        cosine = 0.5 if step % 4 else -0.25
        record = {
            "step": step, "epoch": step / 10, "stage": int(step > 20), "lr": lr * (steps - step),
            "loss/sentiment": 2.0 / step, "loss/similarity": None if step == 7 else 0.5,
            "cosine/sentiment|similarity": cosine, "cosine/paraphrase|sentiment": -0.25 if step % 4 == 1 else 0.5,
            "grad_norm": 1.0,
            "conflicts": float(cosine < 0), "tokens": 100 * step, "step_seconds": 0.25,
        }  # fmt: skip
        records.append(record)
        if step % 10 == 0:
            record = {"step": step, "epoch": step / 10, "stage": int(step > 20)}
            record |= {"dev/sentiment_accuracy": step / 100, "dev/score": step / 80, "dev/sentiment_macro_f1": 0.1}
            record |= {"dev/sentiment_loss": 3.0 / step, "train/sentiment_accuracy": step / 50}
            records.append(record)
    summary = {
        "dev": {
            "sentiment_accuracy": 138 / 151, "sentiment_macro_f1": 0.88, "sentiment_loss": 0.4, "similarity_pearson": 0.5,
            "score": 0.6543,
        },
        "untrained": {"sentiment_accuracy": 0.2345, "sentiment_macro_f1": 0.1, "score": 0.5, "similarity_pearson": 0.1},
        "train": {"sentiment_accuracy": 0.9753},
        "steps": steps, "seconds": 100.0, "tokens": 4000, "device": "cpu", "backend": "fast", "precision": "fp32",
        "best": {"step": 40, "score": 0.6543}, "command": f"python -m minbert_fast.train --output 'a b' {EVIL}",
        "timings": {"data": 5.0, "steps": 75.0, "evaluation": 10.0}, "versions": {"torch": "2.99"}, "notices": [EVIL],
        "demonstration": True,
    }  # fmt: skip
    (directory / "predictions").mkdir(parents=True)
    (directory / "best").mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "predictions" / "details.json").write_text(json.dumps(details()))
    values = {
        "surgery": {"method": "pcgrad"},
        "optimizer": {"lr": lr},
        "published": {"dev": {"sentiment_accuracy": 0.5678}},
    }
    recipe = Recipe().with_values(values, "test")
    (directory / "best" / "recipe.toml").write_text(recipe.to_toml())
    return directory


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_run(tmp_path_factory.mktemp("runs") / "first")
    write_report(directory)
    return directory


def test_many_notices_are_folded(tmp_path):
    directory = make_run(tmp_path / "run")
    summary = json.loads((directory / "summary.json").read_text())
    summary["notices"] = [f"notice {i}" for i in range(9)]
    (directory / "summary.json").write_text(json.dumps(summary))
    text = write_report(directory).read_text()
    assert "<summary>9 notices</summary>" in text
    assert "notice 8" in text


def test_the_page_is_self_contained(full):
    page = parse(full / "report.html")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base"}
    source = (full / "report.html").read_text()
    assert not re.search(r"url\(|@import|https?://(?!evil)", source)
    for _, attributes in page.tags:
        assert not {"src", "srcset", "onclick", "onload", "onerror"} & set(attributes)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        if tag == "a":
            assert (attributes["href"] or "").removeprefix("#") in ids


def test_sentences_and_commands_are_escaped(full):
    source = (full / "report.html").read_text()
    assert EVIL not in source
    assert "<script" not in source
    assert EVIL in "".join(parse(full / "report.html").text)
    assert "so <so>" in "".join(parse(full / "report.html").text)


def test_charts_are_described_and_scrollable_elements_have_tab_stops(full):
    page = parse(full / "report.html")
    images = [a for tag, a in page.tags if tag == "svg"]
    assert images
    assert all(a.get("role") == "img" and a.get("aria-label") for a in images)
    scrollers = [a for _, a in page.tags if a.get("class") == "scroll"]
    assert scrollers
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in scrollers)
    source = (full / "report.html").read_text()
    for rule in ("prefers-color-scheme: dark", "@media print", "width=device-width", ":focus-visible"):
        assert rule in source


def test_numbers_on_the_page_are_those_of_the_files(full):
    text = " ".join("".join(parse(full / "report.html").text).split())
    assert text.count("0.914") == 1  # a score stands on the page once
    for expected in (
        "0.914", "0.654", "0.234 before training", "0.975 on training rows", "0.464 for always answering “bad”",
        "0.568 published", "In 50.0% of the 40 logged steps", "5.0 s", "expected error 0.084", "so <so>410.761.000.860.80",
        "other10 s10.0%",  # 10 of the 100 seconds belong to no part
        "0 bad60.0%46.4%46.4%",  # of the training labels, the labels, the predictions
        "2 to 312.500.00",  # a label, its mean prediction and their spread
        "0.000.330.68",  # 27 of the 40 examples of class "good" were predicted as good, 13 as "so <so>"
        "250.0 ms", "an epoch of steps 20 s", "50 tokens a second", "torch", "2.99", "pcgrad", "A demonstration", "3 more",
    ):  # fmt: skip
        assert expected in text, expected
    assert text.index("steps1:15 min75.0%") < text.index("data5.0 s5.0%")
    first, last = (np.mean([2 / step for step in steps]) for steps in (range(1, 5), range(37, 41)))
    assert f"sentiment{first:.4g}{last:.4g}0.05" in text


def test_plots_are_standalone_files(full):
    names = {path.stem for path in (full / "plots").iterdir()}
    assert names >= {
        "dev", "loss-sentiment", "loss-similarity", "lr", "cosine", "similarity", "confusion-sentiment",
        "confusion-sentiment-normalised", "calibration-sentiment", "distribution-sentiment", "distribution-similarity",
        "overfitting-sentiment_accuracy",
    }  # fmt: skip
    loss = (full / "plots" / "loss-sentiment.svg").read_text()
    assert ">training<" in loss
    assert ">dev<" in loss

    def place(share: float) -> str:
        return f"{charts.LEFT + share * (charts.WIDTH - charts.LEFT - charts.RIGHT):.1f}"

    assert f'class="mark" x1="{place(19 / 39)}"' in loss  # step 20 of 1 to 40 is the first stage's last
    assert ">4<" in (full / "plots" / "overfitting-sentiment_accuracy.svg").read_text()  # epochs, not steps
    assert f"M{place(0.55)} " in (full / "plots" / "calibration-sentiment.svg").read_text()  # the probability is on x
    for path in (full / "plots").iterdir():
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("viewBox") == f"0 0 {charts.WIDTH} {charts.HEIGHT}"
        for element in root.iter():
            for key in ("x", "y", "x1", "x2", "y1", "y2"):
                value = element.get(key)
                assert value is None or -1 <= float(value) <= charts.WIDTH + 1
        assert "nan" not in path.read_text()


@pytest.mark.parametrize("missing", ["summary.json", "metrics.jsonl", "predictions/details.json", "best/recipe.toml"])
def test_a_missing_file_affects_only_its_own_section(tmp_path, missing):
    directory = make_run(tmp_path / "run")
    (directory / missing).unlink()
    page = parse(write_report(directory))
    assert sum(tag == "h2" for tag, _ in page.tags) >= 6


def test_a_run_without_a_model_has_its_recipe_beside_its_checkpoints(tmp_path):
    """A comparison called the surgery of an aborted run "none"."""
    directory = make_run(tmp_path / "run")
    (directory / "best").rename(directory / "checkpoints")
    assert read_run(directory).surgery == "pcgrad"


def test_damaged_files_are_reported(tmp_path):
    directory = make_run(tmp_path / "run")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n{"step": 41, "loss/senti')
    (directory / "predictions" / "details.json").write_text("{")
    text = "".join(parse(write_report(directory)).text)
    assert "metrics.jsonl: 2 damaged lines were left out" in text
    assert "details.json cannot be read" in text
    assert len(read_run(directory).records) == 40


def test_lines_of_one_step_are_merged_and_later_values_win(tmp_path):
    """A resumed run takes some steps again; an evaluation has a line of its own."""
    directory = make_run(tmp_path / "run")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "grad_norm": 3.0}\n')
    last = read_run(directory).records[-1]
    assert (last["grad_norm"], last["loss/sentiment"], last["dev/score"]) == (3.0, 0.05, 0.5)


def test_a_run_without_steps_or_tasks_has_a_report(tmp_path):
    (tmp_path / "summary.json").write_text('{"dev": {}, "steps": 0, "seconds": 0.0, "timings": {}}')
    (tmp_path / "metrics.jsonl").write_text("")
    text = "".join(parse(write_report(tmp_path)).text)
    assert "No dev scores" in text
    assert "No gradient cosines" in text


def test_comparison_marks_the_best_and_lists_what_differs(full, tmp_path):
    other = make_run(tmp_path / "second", lr=2e-3)
    summary = json.loads((other / "summary.json").read_text())
    summary["dev"]["score"] = 0.7
    (other / "summary.json").write_text(json.dumps(summary))
    path = write_comparison([full, other], tmp_path / "cmp.html")
    source = path.read_text()
    parse(path)
    assert "<b>0.7000</b>" in source
    assert "<b>0.6543</b>" not in source
    assert "optimizer.lr" in source
    assert "optimizer.eps" not in source
    assert "<b>0.9139 ± 0.0" in source
    assert source.count("+0.312, 25%") == 4  # of each pair of tasks in each run
    assert EVIL not in source


def test_command(full, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(main, [str(full)]) == 0
    assert run(main, [str(full), str(full)]) == 0
    assert (tmp_path / "comparison.html").is_file()
    assert capsys.readouterr().out.splitlines() == [str(full / "report.html"), "comparison.html"]
    for arguments, message in (([str(tmp_path)], "holds neither"), (["nowhere"], "no such directory"), ([], "DIR")):
        assert run(main, arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


# ---- Charts ----------------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_within():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = float(rng.normal() * 10.0 ** rng.integers(-6, 6))
        high = low + float(rng.random() * 10.0 ** rng.integers(-6, 6)) + 1e-7
        values = charts.round_ticks(low, high)
        assert 2 <= len(values) <= 7
        assert all(low - 1e-6 * (high - low) <= v <= high + 1e-6 * (high - low) for v in values)


def test_neighbouring_ticks_have_different_labels():
    for values, names in (
        ([0.0, 5e-4, 1e-3, 1.5e-3, 2e-3], ["0", "5e-4", "1e-3", "1.5e-3", "2e-3"]),
        ([1e-4, 1.5e-4], ["1e-4", "1.5e-4"]),
        ([0.05, 0.1], ["0.05", "0.1"]),
        ([1500.0, 2e6, 2.5e11], ["1,500", "2e6", "2.5e11"]),
    ):
        assert [charts.format_tick(value) for value in values] == names


def test_downsampling_keeps_means_and_gaps():
    x = np.arange(4000.0)
    y = np.where((x >= 1000) & (x < 2000), np.nan, x)
    thin_x, thin_y = charts.downsample(x, y)
    assert len(thin_x) == charts.MAX_POINTS
    assert thin_y[0] == pytest.approx(np.mean(y[:10]))
    assert np.isnan(thin_y[100:200]).all()
    assert np.isfinite(thin_y[200:]).all()


def test_running_mean_is_a_centred_mean():
    rng = np.random.default_rng(0)
    y = rng.normal(size=100)
    y[50] = np.nan
    means = charts.running_mean(y)  # 3 points on either side
    for i in (0, 10, 50, 99):
        assert means[i] == pytest.approx(np.nanmean(y[max(0, i - 3) : i + 4]))


def test_a_line_breaks_at_a_gap():
    y = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    svg = charts.line_chart("test", [charts.Series("a", np.arange(5.0), y)], "step")
    (path,) = re.findall(r'class="line s0" d="([^"]+)"', svg)
    assert path.count("M") == 2
    assert path.count("L") == 2


def test_no_two_series_look_alike():
    """Regression: the seventh line had the colour and the dashes of the first."""
    many = [charts.Series(str(i), np.arange(3.0), np.arange(3.0) + i, marked=True) for i in range(12)]
    svg = charts.line_chart("test", many, "step")
    looks = re.findall(r'class="line (s\d)"( stroke-dasharray="[^"]+")?', svg)
    assert len(set(looks)) == 12


def test_series_of_one_point_or_none_give_valid_charts():
    for values in ([1.0], [np.nan], []):
        svg = charts.line_chart("test", [charts.Series("a", np.arange(float(len(values))), np.array(values))], "step")
        ElementTree.fromstring(svg)
        assert "nan" not in svg


def test_an_isolated_point_is_drawn():
    """Regression: the loss charts of a run with a single logged step were empty."""
    y = np.array([1.0, 2.0, np.nan, 4.0, np.nan])
    svg = charts.line_chart("test", [charts.Series("a", np.arange(5.0), y)], "step")
    (dots,) = re.findall(r'class="points s0" d="([^"]+)"', svg)
    assert dots.count("h0") == 1
    assert "points" in charts.line_chart("test", [charts.Series("a", np.arange(1.0), np.ones(1))], "step")
    assert "points" not in charts.line_chart("test", [charts.Series("a", np.arange(2.0), np.ones(2))], "step")


def test_class_names_fit_into_the_matrix_chart():
    names = ["negative", "somewhat negative", "neutral", "somewhat positive", "a class of the longest name there is"]
    for chosen in (names, names[-2:]):
        svg = charts.matrix_chart("test", np.eye(len(chosen)), chosen, "{:.2f}".format)
        for x, text in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]+)<', svg):
            assert float(x) >= charts.CHARACTER * len(text)


def test_a_matrix_is_shaded_by_its_rows_and_labelled_with_its_cells():
    svg = charts.matrix_chart("test", np.array([[3, 1], [0, 4]]), ["a", "b"], "{:.0f}".format)
    assert re.findall(r"--heat\) / ([\d.]+)", svg) == ["0.450", "0.150", "0.000", "0.600"]
    assert re.findall(r'class="strong"[^>]+>(\d)<', svg) == ["3", "1", "0", "4"]


def test_bars_of_a_group_stand_side_by_side():
    svg = charts.bar_chart("test", [("a", np.array([1.0, 0.5])), ("b", np.array([0.5, 1.0]))], ["x", "y"], "")
    bars = [
        (float(x), float(base) - float(top)) for x, base, top in re.findall(r'd="M([\d.]+) ([\d.]+)V([\d.]+)"', svg)
    ]
    first, second = bars[:2], bars[2:]
    order = [x for pair in zip(first, second, strict=True) for x, _ in pair]
    assert order == sorted(set(order))
    heights = [height for _, height in bars]
    assert heights == pytest.approx([heights[0], heights[0] / 2, heights[0] / 2, heights[0]], abs=0.2)


def test_of_many_classes_the_most_frequent_mistakes_and_the_worst_classes_come_first():
    """Class 12 is taken for class 3 five times, and class 3 for class 7 once."""
    names = [f"c{i:02}" for i in range(13)]
    labels = np.repeat(np.arange(13), 10)
    predictions = labels.copy()
    predictions[120:125], predictions[30] = 3, 7
    confusion = np.zeros((13, 13), int)
    np.add.at(confusion, (labels, predictions), 1)
    task = {"classes": names, "labels": labels.tolist(), "predictions": predictions.tolist()}
    html = task_section("topic", task | {"confusion": confusion.tolist()}, {})
    mistakes, by_class = (re.findall(r"<tr><td>(c\d+)</td>", part) for part in html.split("By class"))
    assert mistakes == ["c12", "c03"]
    assert by_class[:3] == ["c12", "c03", "c07"]
