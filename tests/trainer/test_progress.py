# SPDX-License-Identifier: Apache-2.0
"""The estimate of the time left excludes an evaluation before the first step."""

from __future__ import annotations

import sys

import pytest
import tqdm.auto

from minbert_fast.trainer import progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_printed_lines_exclude_the_first_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    shown = progress.Progress(0, 101)
    clock.now += 600
    shown.say("step 0: score 0.5")
    clock.now += 20
    shown.advance({"sentiment": 1.5}, 100.0)
    clock.now += 20
    shown.say("step 1: score 0.5")  # later evaluations count, since more will follow
    shown.advance(None, 100.0)
    assert capsys.readouterr().out.splitlines() == [
        "step 0: score 0.5",
        "step 1/101, 2000 s left: sentiment 1.500, 100 tokens/s",
        "step 1: score 0.5",
        "step 2/101, 1980 s left: sentiment 1.500, 100 tokens/s",
    ]


def test_the_bar_excludes_the_first_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = progress.Progress(5, 100)  # a resumed run
    start = shown._bar.start_t
    shown._bar.last_print_t = start = start - 600
    shown._bar.start_t = start
    shown.say("step 5: score 0.5")
    assert shown._bar.format_dict["elapsed"] < 60
    shown.advance(None, 100.0)
    start = shown._bar.start_t
    shown.say("step 6: score 0.5")
    assert shown._bar.start_t == start
    shown.close()


def test_a_notebook_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error is no terminal there, and still a bar is shown: tqdm's widget."""
    shown: list[dict[str, object]] = []

    class Widget(tqdm.tqdm):
        def __init__(self, **options: object) -> None:
            shown.append(options)
            super().__init__(**options | {"disable": True})

    Widget.__module__ = "tqdm.notebook"
    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    progress.Progress(0, 10)
    progress.Progress(0, 10, visible=False)
    assert [options["disable"] for options in shown] == [False, True]
    assert "file" not in shown[0]
