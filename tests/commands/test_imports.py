# SPDX-License-Identifier: Apache-2.0
"""`--import FILE.py`: a task of one's own works in every command; a model remembers the file and never brings it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from minbert_fast import evaluate, export, predict, train
from minbert_fast.common import cli, imports
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.extras.weighting import METHODS as WEIGHTINGS
from minbert_fast.tasks.base import KINDS
from tests.small import error_line, read_records, small_data, small_run

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = '''
from minbert_fast.tasks import register
from minbert_fast.tasks.kinds.classification import ClassificationTask


@register("mood")
class MoodTask(ClassificationTask):
    """Classification under another name."""
'''


@pytest.fixture
def mood(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mood.py"
    path.write_text(FILE)
    yield path
    forget()


def forget() -> None:
    """Ends this process's knowledge of imported files, as a new process would begin."""
    KINDS.pop("mood", None)
    WEIGHTINGS.pop("equal_losses", None)
    imports._digests.clear()


def run_in_new_process(main: object, *arguments: object) -> int:
    forget()
    return cli.run(main, [str(word) for word in arguments])  # type: ignore[arg-type]


def test_a_task_of_ones_own_in_every_command(mood: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = small_data(tmp_path / "data"), tmp_path / "run"
    flags = small_run(data, output, "--max-steps", "4", "--set", 'tasks={mood={data="sentiment"}}')
    assert run_in_new_process(train.main, *flags, "--import", mood, "--stop-after", 2) == 0
    best = output / "best"
    assert list(Recipe.load(str(best / "recipe.toml")).imports) == ["mood.py"]
    assert not list(output.rglob("*.py")), "a model directory brings no code"
    where = ["--checkpoint", best]
    commands = [
        (predict.main, *where, "--task", "mood", "--input", data / "ids-sst-dev.csv", "--output", tmp_path / "out.csv"),
        (export.main, *where, "--format", "huggingface", "--output", tmp_path / "exported"),
        (train.main, "--resume", "--output", output),
        (train.main, *small_run(data, tmp_path / "further", "--model", best, "--max-steps", 1)),
    ]  # fmt: skip
    for main, *arguments in commands:
        capsys.readouterr()
        assert run_in_new_process(main, *arguments) == 2
        error = capsys.readouterr().err
        assert "tasks.mood.kind = 'mood'" in error
        assert "made with mood.py: add --import mood.py" in error
        assert run_in_new_process(main, *arguments, "--import", mood) == 0
    assert json.loads((output / "summary.json").read_text())["steps"] == 4


@pytest.mark.filterwarnings("always:.*is not the file that the model was trained with")
def test_a_changed_file_is_another_run_and_a_warning_elsewhere(
    mood: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = small_data(tmp_path / "data"), tmp_path / "run"
    flags = small_run(data, output, "--max-steps", "4", "--set", 'tasks={mood={data="sentiment"}}')
    assert run_in_new_process(train.main, *flags, "--import", mood, "--stop-after", 2) == 0
    mood.write_text(FILE + "# changed\n")
    assert run_in_new_process(train.main, "--resume", "--output", output, "--import", mood) == 2
    assert "recipe.imports.mood.py was" in capsys.readouterr().err
    scored = ["--checkpoint", output / "best", "--sentiment", data / "ids-sst-dev.csv", "--import", mood]
    assert run_in_new_process(evaluate.main, *scored) == 0
    assert "warning: mood.py is not the file that the model was trained with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("import nonsense_that_is_absent", "ModuleNotFoundError: No module named 'nonsense_that_is_absent'"),
        ("def (", "SyntaxError: "),
    ],
)
def test_a_file_that_fails_is_one_line(
    tmp_path: Path, content: str | None, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    assert run_in_new_process(train.main, "--import", path) == 2
    assert error_line(capsys).startswith(f"error: --import {path}: {problem}")


def test_loss_weights_of_ones_own_survive_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, example = small_data(tmp_path / "data"), Path(__file__).parents[2] / "docs" / "examples" / "equal_losses.py"
    flags = ("--max-steps", "4", "--set", "weighting.method=equal_losses", "--set", "logging.every=1")
    for run, more in (("whole", ()), ("cut", ("--stop-after", "2"))):
        command = small_run(data, tmp_path / run, *flags, *more, "--import", str(example))
        assert run_in_new_process(train.main, *command) == 0
    assert run_in_new_process(train.main, "--import", example, "--resume", "--output", tmp_path / "cut") == 0
    whole, cut = ((tmp_path / run / "last" / "model.safetensors").read_bytes() for run in ("whole", "cut"))
    assert whole == cut
    records = read_records(tmp_path / "cut")
    *_, before, last = [record for record in records if "weight/sentiment" in record]
    losses = [record["loss/sentiment"] for record in records if "loss/sentiment" in record][:-1]
    assert last["weight/sentiment"] == pytest.approx(len(losses) / sum(losses))
    assert before["weight/sentiment"] != last["weight/sentiment"]
    forget()
    assert cli.run(train.main, small_run(data, tmp_path / "none", *flags)) == 2
    assert "expected one of none, uncertainty, dwa, famo, random" in capsys.readouterr().err
