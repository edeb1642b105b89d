# SPDX-License-Identifier: Apache-2.0
"""The output directory: one run at a time, one record per step, no half-written files, one-line errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minbert_fast.common.errors import RunError
from minbert_fast.common.storage import write_json
from minbert_fast.tasks import build_task
from minbert_fast.trainer.outputs import MetricsLog, RunDirectory, unused_directory
from minbert_fast.trainer.results import copy_predictions
from tests.small import read_records


def test_records_of_one_step_replace_each_other(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.open()
    log.write({"step": 1, "loss/a": 0.5})
    log.write({"step": 2, "loss/a": 0.25})
    log.write({"step": 2, "loss/a": 0.25, "dev/score": 1.0})
    log.write({"step": 3})
    log.close()
    expected = [{"step": 1, "loss/a": 0.5}, {"step": 2, "loss/a": 0.25, "dev/score": 1.0}, {"step": 3}]
    assert read_records(tmp_path) == expected


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.open()
    log.write({"step": 1, "loss/a": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    log.close()
    assert read_records(tmp_path) == [{"step": 1, "loss/a": None, "grad_norm": None, "lr": 0.1}]


def test_reopening_keeps_earlier_records_and_drops_incomplete_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\nnonsense\n{"step": 3}\n{"step": 4}\n{"step": 2')
    log = MetricsLog(path)
    log.open(before_step=3)
    log.write({"step": 3, "again": True})
    log.close()
    assert read_records(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    log.open()
    log.close()
    assert path.read_text() == ""


def test_files_that_a_kill_left_half_written_go_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    left = [tmp_path / place / ".writing-curve.svg.123" for place in (".", "plots")]
    for path in left:
        path.write_text("half")
    (tmp_path / "plots" / "curve.svg").write_text("whole")
    with RunDirectory(tmp_path) as files:
        files.prepare("", {})
    assert not any(path.exists() for path in left)
    assert (tmp_path / "plots" / "curve.svg").exists()


def test_a_full_disk_gives_a_one_line_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.open()
    log._file.close()
    log._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(RunError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        log.write({"step": 1})
    log.close()


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run"), pytest.raises(RunError, match=rf"another run .*process {os.getpid()} on"):
        RunDirectory(tmp_path / "run").__enter__()
    with RunDirectory(tmp_path / "run"):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from minbert_fast.trainer.outputs import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match=f"process {holder.pid}"):
        RunDirectory(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    for _ in range(50):  # the kernel closes a killed process's files with a delay
        try:
            with RunDirectory(tmp_path):
                return
        except RunError:
            time.sleep(0.1)
    pytest.fail("the lock outlived its process")


def test_a_directory_that_cannot_be_created_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"run: cannot be written \(Not a directory\)"):
        RunDirectory(tmp_path / "file" / "run").__enter__()


def test_the_directory_of_a_run_without_results_is_removed(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "mine").mkdir()
    with RunDirectory(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()


def test_directories_set_aside_are_brought_back(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as files:
        files.prepare("", {})
        files.write_directory("best", lambda d: (d / "a").write_text("due") and None)
        files.set_aside("best", "predictions")
        files.write_directory("best", lambda d: (d / "a").write_text("provisional") and None)
        files.bring_back("best", "predictions")
        assert (tmp_path / "best" / "a").read_text() == "due"
        files.bring_back("best", "predictions")
        assert (tmp_path / "best" / "a").read_text() == "due"


def test_clearing_removes_results_and_nothing_else(tmp_path: Path) -> None:
    """Also each task's best model: a later run may not replace it."""
    (tmp_path / "notes.txt").write_text("mine")
    with RunDirectory(tmp_path) as files:
        files.prepare("", {})
        files.metrics.open()
        write_json(tmp_path / "summary.json", {})
        for name in ("best", "best-a", "last", "predictions"):
            files.write_directory(name, lambda d: None)
        assert files.holds_run
        files.clear()
        assert not files.holds_run
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt"]


def test_a_run_that_goes_on_is_not_finished(tmp_path: Path) -> None:
    """Killed again, it would be taken for a finished one by the summary of its first part."""
    with RunDirectory(tmp_path) as files:
        write_json(tmp_path / "summary.json", {"finished": True})
        files.prepare("", {})
    assert not (tmp_path / "summary.json").exists()


def test_unused_directories_are_numbered(tmp_path: Path) -> None:
    assert unused_directory(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert unused_directory(tmp_path / "a") == tmp_path / "a-3"


def test_the_courses_flags_copy_predictions_by_the_data_of_a_task_not_by_its_name(tmp_path: Path) -> None:
    tasks = {"stars": build_task("stars", {"kind": "sentiment", "stem": "mine"})}
    written = tmp_path / "predictions" / "mine-dev-output.csv"
    written.parent.mkdir()
    written.write_text("of stars")
    target, said = tmp_path / "out" / "sst.csv", list[str]()
    copy_predictions(tasks, RunDirectory(tmp_path), {("sentiment", "dev"): target}, said.append)
    assert target.read_text() == "of stars"
    assert said == []
