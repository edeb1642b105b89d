# SPDX-License-Identifier: Apache-2.0
"""Training under real faults of disks, permissions, memory, numbers and texts: one-line errors, no lost results."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minbert_fast import BertModel, Predictor, train
from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError
from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.model.sentence_modules import read
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel
from tests.small import MODEL_FILES, ODD_TEXTS, error_line, read_records, small_data, small_run

pytestmark = pytest.mark.usefixtures("one_thread")


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 1) -> str:
    """Runs a training that must fail; returns its single line on standard error."""
    capsys.readouterr()
    assert cli.run(train.main, arguments) == status
    return error_line(capsys).strip()


# ---- Disks --------------------------------------------------------------------------------------------------------------


def own_mounts() -> list[str]:
    """A command prefix that gives a process private mounts; skips the test if mounting is not allowed."""
    prefix = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    try:
        subprocess.run([*prefix, "mount", "-t", "tmpfs", "none", "/mnt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({error})")
    return prefix


@pytest.mark.ci
def test_full_read_only_and_forbidden_disks_are_one_line_and_lose_nothing(tmp_path: Path) -> None:
    prefix = own_mounts()
    data = small_data(tmp_path / "data")
    (tmp_path / "disk").mkdir()
    command = [*prefix, sys.executable, "-m", "tests.small_disk"]
    folders = [data, tmp_path / "disk", tmp_path / "copy"]
    done = subprocess.run(
        [*command, *map(str, folders)], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    attempts = {name: (status, error) for name, status, error in map(json.loads, done.stdout.splitlines())}
    reasons = {
        "read-only": "Read-only file system",
        "forbidden": "Permission denied",
        "full": "No space left on device",
    }
    status, error = attempts["no room"]
    assert status == 1
    assert re.match(r"error: \S+: the run needs about .* MB are free: choose another --output", error)
    for name, reason in reasons.items():
        status, error = attempts[name]
        assert status == 1
        assert error.count("\n") == 1, error
        assert error.startswith(f"error: {tmp_path / 'disk' / 'run'}"), error
        assert f"cannot be written ({reason})" in error
    assert "the checkpoint of step" in attempts["full"][1]
    assert attempts["begun"] == attempts["in the end"] == (0, "")
    flags = ("--lr", "1e-3", "--epochs", "1", "--set", "training.evaluate_untrained=false")
    assert cli.run(train.main, small_run(data, tmp_path / "whole", *flags)) == 0
    for name in MODEL_FILES:
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# ---- Numbers ------------------------------------------------------------------------------------------------------------


def test_losses_that_stay_non_finite_stop_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learning rate is so large that the first step makes all later losses overflow."""
    data = small_data(tmp_path / "data")
    flags = ("--lr", "1e30", "--epochs", "9", "--set", "training.max_skipped=4", "--set", "optimizer.warmup=0.0")
    error = fails(capsys, small_run(data, tmp_path / "run", *flags))
    assert "4 steps in a row had losses or gradients that are not finite" in error
    assert "a lower --lr may help" in error
    place = re.search(rf"examples ({re.escape(str(data))}/[\w.-]+):(\d+)", error)
    assert place, error
    assert 2 <= int(place[2]) <= len(Path(place[1]).read_text().splitlines())
    assert MultitaskModel.load(tmp_path / "run" / "last") is not None
    records = read_records(tmp_path / "run")
    skipped = [record for record in records if "skipped" in record]
    assert len(skipped) == 4
    assert set(skipped[-1]["skipped"]) <= {"sentiment", "paraphrase", "similarity"}


# ---- Memory -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limits the address space to a quarter of a gigabyte more than now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits addresses as Linux does")
def test_memory_that_runs_out_names_the_batch(
    tmp_path: Path, little_memory: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = "".join(f"{row}\tid{row}\t{'good film ' * 60}\t{row % 5}\n" for row in range(2_000))
    (data / "ids-sst-train.csv").write_text(f"\tid\tsentence\tsentiment\n{rows}")
    error = fails(capsys, small_run(data, tmp_path / "run", "--batch-size", "2000", "--set", "data.holdout=0"))
    assert "out of memory at step 1, a batch of 2000 examples with 256,000 tokens" in error
    assert "lower --batch-size (now 2000) or --set data.max_length (now 128)" in error


# ---- Texts --------------------------------------------------------------------------------------------------------------


def test_texts_of_every_kind_train_and_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_data(tmp_path / "data")
    for split in ("train", "dev"):
        with (data / f"ids-sst-{split}.csv").open("a", encoding="utf-8") as file:
            file.writelines(f"{row}\tid{row}\t{text}\t{row % 5}\n" for row, text in enumerate(ODD_TEXTS))
        with (data / f"sts-{split}.csv").open("a", encoding="utf-8") as file:
            file.writelines(f"{row}\tid{row}\t{text}\t{ODD_TEXTS[-row]}\t2.5\n" for row, text in enumerate(ODD_TEXTS))
    output = tmp_path / "run"
    flags = ("--lr", "1e-3", "--epochs", "1", "--set", "data.max_bad_rows=0.0")
    assert cli.run(train.main, small_run(data, output, *flags)) == 0
    assert json.loads((output / "summary.json").read_text())["skipped_steps"] == 0
    predictions = (output / "predictions" / "sst-dev-output.csv").read_text().splitlines()
    assert len(predictions) == len((data / "ids-sst-dev.csv").read_text(encoding="utf-8").split("\n")) - 1
    predictor = Predictor.from_pretrained(output / "best")
    assert abs(predictor.encode(ODD_TEXTS)).max() < float("inf")
    assert len(predictor.similarity([(text, text) for text in ODD_TEXTS])) == len(ODD_TEXTS)


# ---- Files that are none, and names that lead elsewhere -----------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the sample model's directory."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in sample_directory().model.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "directory"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_model_files_that_are_no_files_are_refused_at_once(model: Path, name: str, kind: str) -> None:
    """Without the check, opening a FIFO would wait for a writer forever."""
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name) if kind == "fifo" else (model / name).mkdir()
    load = Tokenizer.from_pretrained if name.startswith("tokenizer") else BertModel.from_pretrained
    with pytest.raises(ValueError, match=re.escape(str(model))) as caught:
        load(model)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
def test_recipes_that_are_no_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    reasons = {"fifo": "not a regular file", "folder": "Is a directory", "loop": "Too many levels of symbolic links"}
    for name, reason in reasons.items():
        with pytest.raises(ConfigError, match=rf"{name}.toml: cannot be read \({reason}\)"):
            Recipe.load(str(tmp_path / f"{name}.toml"))


@pytest.mark.parametrize("path", ["../other", "a/../../other", "/etc", "..", "1_Pooling/../../other"])
def test_modules_that_lead_out_of_their_directory_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "modules.json").write_text(
        json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": path}])
    )
    with pytest.raises(ConfigError, match=r"modules.json: .* leads out of the directory"):
        read(tmp_path)


@pytest.mark.parametrize("path", ["../secret.toml", "/etc/secret.toml", "a/../../secret.toml"])
def test_a_recipe_extends_files_of_its_own_folder_only(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.toml").write_text("[training]\nepochs = 3\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "recipe.toml").write_text(f'extends = "{path}"\n')
    with pytest.raises(ConfigError, match=r"recipe.toml: extends: .* leads out of the directory"):
        Recipe.load(str(tmp_path / "model" / "recipe.toml"))
    (tmp_path / "model" / "base.toml").write_text("[training]\nepochs = 3\n")
    (tmp_path / "model" / "recipe.toml").write_text('extends = "base.toml"\n')
    assert Recipe.load(str(tmp_path / "model" / "recipe.toml")).training.epochs == 3
