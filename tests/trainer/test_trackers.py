# SPDX-License-Identifier: Apache-2.0
"""`--report-to`: trackers get every record once, also of resumed runs; one that fails gives a warning."""

from __future__ import annotations

import csv
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from minbert_fast import train
from minbert_fast.common import cli
from minbert_fast.trainer import trackers
from minbert_fast.trainer.trackers import Trackers, check_trackers, open_trackers
from tests.small import error_line, read_records, small_data, small_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


class Recorder:
    def __init__(self, fail_at: int | None = None) -> None:
        self.seen: list[Any] = []
        self.closed = False
        self.fail_at = fail_at

    def write(self, record: Any) -> None:
        if record["step"] == self.fail_at:
            raise ConnectionError("no network")
        self.seen.append(dict(record))

    def close(self) -> None:
        self.closed = True


def test_a_replaced_record_is_passed_on_once() -> None:
    recorder = Recorder()
    follow = Trackers([recorder])
    for record in ({"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 2, "a": 2, "dev/score": 3}):
        follow(record)
    follow.close()
    assert recorder.seen == [{"step": 1, "a": 1}, {"step": 2, "a": 2, "dev/score": 3}]
    assert recorder.closed


def test_a_failing_tracker_is_dropped_and_the_others_continue() -> None:
    bad, good = Recorder(fail_at=2), Recorder()
    follow = Trackers([bad, good])
    follow({"step": 1})
    follow({"step": 2})
    with pytest.warns(UserWarning, match=r"Recorder failed \(no network\)"):
        follow({"step": 3})
    follow.close()
    assert [r["step"] for r in bad.seen] == [1]
    assert [r["step"] for r in good.seen] == [1, 2, 3]


def test_a_failure_without_a_message_is_named_by_its_class() -> None:
    class Silent(Recorder):
        def write(self, record: Any) -> None:
            raise TimeoutError

    follow = Trackers([Silent()])
    follow({"step": 1})
    with pytest.warns(UserWarning, match=r"Silent failed \(TimeoutError\)"):
        follow({"step": 2})


def test_csv_holds_every_record_of_a_resumed_run(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = small_run(data, output, "--report-to", "csv", "--set", "checkpoint.every=2")
    assert cli.run(train.main, [*flags, "--stop-after", "4"]) == 0
    assert cli.run(train.main, [*flags, "--resume"]) == 0
    with (output / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = read_records(output)
    assert [int(row["step"]) for row in rows] == [record["step"] for record in expected] == list(range(11))
    for row, record in zip(rows, expected, strict=True):
        for key, value in row.items():
            assert value == ("" if record.get(key) is None else str(record[key])), key


def test_wandb_gets_the_records_and_resumes_its_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    def init(**options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    fake = ModuleType("wandb")
    fake.__dict__.update(init=init, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    output = tmp_path / "run"
    flags = small_run(data, output, "--report-to", "wandb", "--set", "checkpoint.every=2")
    assert cli.run(train.main, [*flags, "--stop-after", "4"]) == 0
    assert cli.run(train.main, [*flags, "--resume"]) == 0
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["config"]["training.batch_size"] == 8
    assert {step for step, _ in logged} == set(range(11))
    last = read_records(output)[-1]
    assert logged[-1][1]["dev/score"] == last["dev/score"]
    assert cli.run(train.main, [*flags, "--overwrite", "--max-steps", "1"]) == 0
    assert started[2]["id"] != started[0]["id"]


def test_tensorboard_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with closing(open_trackers(["tensorboard"], tmp_path, 0, {})) as follow:
        follow({"step": 1, "loss/a": 0.5, "dev/score": None, "skipped": ["a"]})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert seen.Tags()["scalars"] == ["loss/a"]
    assert seen.Scalars("loss/a")[0].value == 0.5


def test_mistakes_are_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    assert cli.run(train.main, small_run(data, tmp_path / "run", "--report-to", "csv,mlflow")) == 2
    error = error_line(capsys)
    assert "--report-to mlflow: expected none or a comma-separated list of tensorboard, wandb, csv" in error
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed \(pip install 'minbert-fast\[wandb\]'\)"):
        check_trackers(["wandb"])


def test_a_failed_login_gives_a_one_line_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: Any) -> Any:
        raise PermissionError("no API key\nlong advice")

    fake = ModuleType("wandb")
    fake.__dict__.update(init=init, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert cli.run(train.main, small_run(data, tmp_path / "run", "--report-to", "wandb")) == 1
    error = capsys.readouterr().err
    assert "--report-to wandb: cannot start (no API key)" in error
    assert "Traceback" not in error
