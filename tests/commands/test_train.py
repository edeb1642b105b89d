# SPDX-License-Identifier: Apache-2.0
"""`python -m minbert_fast.train` from its command line: flags, output files, one-line errors."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from minbert_fast import train
from minbert_fast.common import cli
from minbert_fast.data import sample_directory
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.trainer import disk
from minbert_fast.trainer.checkpoint import CheckpointStore
from minbert_fast.trainer.outputs import RunDirectory, saved_recipe_path
from tests.small import DEV_ROWS, error_line, read_records, small_data, small_run

TIMES = ("step_seconds", "time")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """A second thread would slow down these tiny models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a finished run of 10 steps."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.run(train.main, small_run(data, output, "--recipe", "demonstration", "--lr", "1e-3")) == 0
    return output


@pytest.fixture(scope="module")
def _stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "stopped"
    flags = ("--recipe", "demonstration", "--lr", "1e-3", "--stop-after", "1")
    assert cli.run(train.main, small_run(data, output, *flags)) == 0
    return output


@pytest.fixture
def stopped(_stopped: Path, tmp_path: Path) -> Path:
    """A copy of the output of a run that was stopped after the first of 10 steps."""
    return shutil.copytree(_stopped, tmp_path / "run")


def losses(output: Path) -> np.ndarray:
    records = [record for record in read_records(output) if "lr" in record]
    return np.array(
        [[record[f"loss/{task}"] for task in ("sentiment", "paraphrase", "similarity")] for record in records]
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """Runs a command that must fail; returns its single line on standard error."""
    capsys.readouterr()
    assert cli.run(train.main, arguments) == status
    return error_line(capsys).strip()


# ---- Output files -------------------------------------------------------------------------------------


def test_every_file_is_there(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    for folder in ("best", "last"):
        for name in ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "heads.safetensors"):
            assert f"{folder}/{name}" in names
        assert f"{folder}/recipe.toml" in names
    assert {f"predictions/{name}-dev-output.csv" for name in ("sst", "para", "sts")} <= names
    assert {"metrics.jsonl", "summary.json", "report.html"} <= names
    assert any(name.startswith("plots/") for name in names)
    assert [name for name in names if name.startswith("checkpoints/")] == ["checkpoints/recipe.toml"]
    assert not any(".writing-" in name for name in names)


def test_the_summary_holds_scores_and_facts(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    dev = summary["dev"]
    score = (dev["sentiment_accuracy"] + dev["paraphrase_accuracy"] + (dev["similarity_pearson"] + 1) / 2) / 3
    assert dev["score"] == pytest.approx(score)
    assert summary["untrained"].keys() == dev.keys()
    assert (summary["steps"], summary["device"], summary["backend"]) == (10, "cpu", "fast")
    assert summary["tokens"] == read_records(finished)[-1]["tokens"] > 0
    assert summary["seconds"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["best"]["score"] == dev["score"]
    assert {"data", "forward", "backward", "optimizer", "steps", "evaluation"} <= summary["timings"].keys()
    assert sum(summary["timings"].values()) == pytest.approx(summary["seconds"])


def test_each_step_has_one_record(finished: Path) -> None:
    found = read_records(finished)
    assert [r["step"] for r in found] == list(range(11))
    assert [r["step"] for r in found if "dev/score" in r] == [0, 5, 10]
    wanted = {"step", "epoch", "lr", "loss/sentiment", "loss/paraphrase", "loss/similarity", "grad_norm", "conflicts"}
    for record in found[1:]:
        assert wanted | {"tokens", "step_seconds"} <= record.keys()


def test_transformers_load_the_models(finished: Path) -> None:
    model = transformers.AutoModel.from_pretrained(finished / "best")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "best")
    batch = tokenizer(["the plot was great"], return_tensors="pt")
    assert model(**batch).last_hidden_state.isfinite().all()


def test_the_recipe_is_saved_with_every_value(finished: Path, tmp_path: Path) -> None:
    text = (finished / "last" / "recipe.toml").read_text()
    values = tomllib.loads(text)
    assert values["optimizer"]["lr"] == 1e-3
    assert values["training"]["batch_size"] == 8
    assert Recipe.load(str(finished / "last" / "recipe.toml")).to_toml() == text


def test_predictions_have_the_courses_format(finished: Path) -> None:
    lines = (finished / "predictions" / "para-dev-output.csv").read_text().splitlines()
    assert lines[0] == "id \t Predicted_Is_Paraphrase "
    assert len(lines) == DEV_ROWS + 1
    assert all(line.split(" , ")[1].strip() in ("0.0", "1.0") for line in lines[1:])


def test_both_backends_take_the_same_steps(data: Path, tmp_path: Path) -> None:
    for backend in ("fast", "reference"):
        flags = ("--backend", backend, "--dropout", "0", "--max-steps", "3", "--lr", "1e-3", "--surgery", "none")
        heads = [f"tasks.{task}.dropout=0.0" for task in ("sentiment", "paraphrase", "similarity")]
        more = [word for value in heads for word in ("--set", value)]
        assert cli.run(train.main, small_run(data, tmp_path / backend, *flags, *more)) == 0
    np.testing.assert_allclose(losses(tmp_path / "fast"), losses(tmp_path / "reference"), rtol=2e-4)
    spread = np.ptp(losses(tmp_path / "fast"), axis=0)
    assert (spread > 1e-3).all()


def test_the_same_seed_gives_the_same_bits(data: Path, finished: Path, tmp_path: Path) -> None:
    again = small_run(data, tmp_path / "again", "--recipe", "demonstration", "--lr", "1e-3")
    other = small_run(data, tmp_path / "other", "--recipe", "demonstration", "--seed", "5", "--max-steps", "1")
    assert cli.run(train.main, again) == cli.run(train.main, other) == 0
    for name in ("last/model.safetensors", "last/heads.safetensors", "best/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()
    assert (losses(tmp_path / "other")[0] != losses(finished)[0]).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits_on_several_threads(
    data: Path, tmp_path: Path, threads: None, precision: str
) -> None:
    """Two runs with two threads; the second one is interrupted and resumed."""
    torch.set_num_threads(2)
    flags = ("--lr", "1e-3", "--precision", precision, "--max-steps", "3")
    assert cli.run(train.main, small_run(data, tmp_path / "once", *flags)) == 0
    assert cli.run(train.main, small_run(data, tmp_path / "again", *flags, "--stop-after", "1")) == 0
    assert cli.run(train.main, small_run(data, tmp_path / "again", *flags, "--resume")) == 0
    for name in ("last/model.safetensors", "last/heads.safetensors", "best/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


# ---- Flags -------------------------------------------------------------------------------------------------


def test_the_courses_command_line(data: Path, tmp_path: Path) -> None:
    """The command line of the course's handout, with its prediction paths."""
    files = {"sst": "ids-sst", "para": "quora", "sts": "sts"}
    flags = [f"--{k}_{s}={data / f'{stem}-{s}.csv'}" for k, stem in files.items() for s in ("train", "dev")]
    flags += [f"--{short}_dev_out={tmp_path / 'out' / f'{short}.csv'}" for short in files]
    flags += ["--sst_test", str(data / "ids-sst-dev.csv"), "--sst_test_out", str(tmp_path / "out" / "sst-test.csv")]
    flags += ["--option", "pretrain", "--batch_size", "16", "--hidden_dropout_prob", "0.2", "--epochs", "1"]
    flags += ["--seed", "3", "--output", str(tmp_path / "run"), "--set", f"data.cache={data / 'cache'}"]
    assert cli.run(train.main, flags) == 0
    recipe = Recipe.load(str(tmp_path / "run" / "best" / "recipe.toml"))
    assert recipe.model.freeze
    assert (recipe.optimizer.lr, recipe.training.batch_size, recipe.model.dropout) == (1e-3, 16, None)
    assert {options["dropout"] for options in recipe.tasks.values()} == {0.2}
    for short in files:
        written = tmp_path / "run" / "predictions" / f"{short}-dev-output.csv"
        assert (tmp_path / "out" / f"{short}.csv").read_bytes() == written.read_bytes()
    assert len((tmp_path / "out" / "sst-test.csv").read_text().splitlines()) == DEV_ROWS + 1
    trained = transformers.AutoModel.from_pretrained(tmp_path / "run" / "last").state_dict()
    initial = transformers.AutoModel.from_pretrained(sample_directory().model).state_dict()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in trained.items()), "heads only"


def test_help_names_every_flag_of_the_contract() -> None:
    text = train.parser().format_help()
    flags = (
        "recipe data text label model output tasks epochs max-steps stop-after batch-size lr freeze patience seed device "
        "precision backend surgery resume set"
    )
    for name in flags.split():
        assert f"--{name}" in text


def test_help_works_from_the_command_line() -> None:
    command = [sys.executable, "-m", "minbert_fast.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout
    assert done.stderr == ""


# ---- Missing tasks ------------------------------------------------------------------------------


def test_a_missing_task_file_drops_the_task_and_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_data(tmp_path / "data")
    for name in ("quora-train.csv", "quora-dev.csv", "sts-dev.csv"):
        (tmp_path / "data" / name).unlink()
    output, all_rows = tmp_path / "run", ("--set", "data.holdout=0")
    assert cli.run(train.main, small_run(tmp_path / "data", output, "--max-steps", "2", *all_rows)) == 0
    assert "paraphrase" in capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["dev"]) == {"sentiment_accuracy", "sentiment_macro_f1", "sentiment_loss", "score"}
    assert summary["notices"][1:] == [
        f"no quora-train.csv in {tmp_path / 'data'}: task paraphrase is left out",
        "no dev rows for similarity: trained, not evaluated",
    ]
    assert set(Recipe.load(str(output / "best" / "recipe.toml")).tasks) == {"sentiment", "similarity"}
    assert "loss/paraphrase" not in read_records(output)[-1]


def test_without_dev_files_the_last_model_is_best(data: Path, tmp_path: Path) -> None:
    small_data(tmp_path / "data")
    for path in (tmp_path / "data").glob("*-dev.csv"):
        path.unlink()
    output, all_rows = tmp_path / "run", ("--set", "data.holdout=0", "--set", 'stages=[{training={start="best"}}]')
    flags = ("--max-steps", "2", "--patience", "3", *all_rows)
    assert cli.run(train.main, small_run(tmp_path / "data", output, *flags)) == 0
    assert (output / "best" / "model.safetensors").read_bytes() == (output / "last" / "model.safetensors").read_bytes()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["dev"] == {}
    assert any("not evaluated; best/ will be the last model" in line for line in summary["notices"])
    useless = "has no effect: without dev rows there are no evaluations"
    assert [line for line in summary["notices"] if useless in line] == [
        f"training.patience = 3 {useless}",
        f"training.start = 'best' {useless}",
    ]


def test_tasks_without_a_named_file_are_reported(data: Path, tmp_path: Path) -> None:
    flags = small_run(data, tmp_path / "run", "--max-steps", "1", "--sst_train", str(data / "ids-sst-train.csv"))
    del flags[flags.index("--data") : flags.index("--data") + 2]
    assert cli.run(train.main, flags) == 0
    notices = json.loads((tmp_path / "run" / "summary.json").read_text())["notices"]
    assert "no train file named for paraphrase, similarity: left out" in notices
    assert any(line.startswith("no dev rows for sentiment: 4 of 40 training rows are held out") for line in notices)


def test_a_run_first_prints_its_plan(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(train.main, small_run(data, tmp_path / "run", "--max-steps", "1")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("no --model: trains the embedded tiny model")
    assert lines[1].startswith(
        "recipe demonstration: 1 steps on cpu in fp32, fast backend; training rows: sentiment 40, paraphrase 40, "
        f"similarity 40; results in {tmp_path / 'run'} (about "
    )
    assert lines[2].startswith("step 0: ")


def test_bad_rows_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_data(tmp_path / "data")
    with (folder / "sts-train.csv").open("a") as file:
        file.write("99\tbroken row\n")
    output = tmp_path / "run"
    assert cli.run(train.main, small_run(folder, output, "--max-steps", "1", "--set", "data.max_bad_rows=0.1")) == 0
    assert f"{folder / 'sts-train.csv'}:42: " in capsys.readouterr().out
    error = fails(capsys, *small_run(folder, tmp_path / "strict", "--max-steps", "1"))
    assert "sts-train.csv" in error
    assert "1.0%" in error


# ---- Resume ------------------------------------------------------------------------------------------------


def comparable(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in r.items() if key not in TIMES} for r in read_records(output)]


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_a_cut_run_resumes_to_the_same_bytes(tmp_path: Path, backend: str) -> None:
    """Two epochs of two steps, cut within the first epoch and within the second."""
    data = small_data(tmp_path / "data", train_rows=16)
    flags = ("--lr", "1e-3", "--backend", backend, "--set", "checkpoint.every=2")
    assert cli.run(train.main, small_run(data, tmp_path / "whole", *flags)) == 0
    assert cli.run(train.main, small_run(data, tmp_path / "cut", *flags, "--stop-after", "1")) == 0
    assert cli.run(train.main, small_run(data, tmp_path / "cut", *flags, "--stop-after", "3", "--resume")) == 0
    stopped = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (stopped["finished"], stopped["ended"]) == (False, "stopped after step 3 of 4: --resume continues")
    assert cli.run(train.main, small_run(data, tmp_path / "cut", *flags, "--resume")) == 0
    for name in (
        "last/model.safetensors",
        "last/heads.safetensors",
        "best/model.safetensors",
        "best/heads.safetensors",
    ):
        whole, cut = ((tmp_path / run / name).read_bytes() for run in ("whole", "cut"))
        assert whole == cut, name
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "cut")]
    for key in ("dev", "untrained", "best", "steps", "tokens", "finished", "ended"):
        assert summaries[0][key] == summaries[1][key]


def test_a_run_remembers_its_settings(data: Path, tmp_path: Path) -> None:
    flags = ("--recipe", "wish-ema", "--lr", "1e-3", "--seed", "3", "--set", "training.evaluate_untrained=false")
    assert cli.run(train.main, small_run(data, tmp_path / "whole", *flags, "--max-steps", "3")) == 0
    assert cli.run(train.main, small_run(data, tmp_path / "cut", *flags, "--max-steps", "3", "--stop-after", "1")) == 0
    # A further flag is laid over the saved settings, not over those of the demonstration.
    more = ("--set", "checkpoint.every=1", "--stop-after", "2")
    assert cli.run(train.main, ["--resume", "--output", str(tmp_path / "cut"), *more]) == 0
    assert cli.run(train.main, ["--resume", "--output", str(tmp_path / "cut")]) == 0
    whole, cut = ((tmp_path / run / "last" / "model.safetensors").read_bytes() for run in ("whole", "cut"))
    assert whole == cut
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["steps"] == 3


def test_a_run_remembers_its_backend(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named after the bug: the line of a stopped run, `--resume --output DIR`, failed: 'backend was "reference"'."""
    flags = ("--backend", "reference", "--max-steps", "2", "--stop-after", "1")
    assert cli.run(train.main, small_run(data, tmp_path, *flags)) == 0
    again = ["--resume", "--output", str(tmp_path)]
    assert 'backend was "reference", now "fast"' in fails(capsys, *again, "--backend", "fast")
    assert cli.run(train.main, again) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["backend"], summary["finished"]) == ("reference", True)


def test_a_saved_recipe_alone_is_no_run(data: Path, tmp_path: Path) -> None:
    """A run that ended before its first checkpoint leaves only its recipe, so the next one needs no --overwrite."""
    own = saved_recipe_path(tmp_path / "run")
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert cli.run(train.main, small_run(data, tmp_path / "run", "--max-steps", "1")) == 0
    assert Recipe.load(str(own)).data.directory == str(data)


def test_a_run_remembers_the_precision_that_auto_meant(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begun in bf16 could not go on on a processor without it: no flag was the one that it was started with.

    With the very precision of the run it was refused too: 'recipe.training.precision was "auto"'.
    """
    flags = ("--precision", "auto", "--max-steps", "3", "--stop-after", "1")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    assert cli.run(train.main, small_run(data, tmp_path / "run", *flags)) == 0
    for native in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(f"torch.cpu.{native}", lambda: False)
    again = ("--resume", "--output", str(tmp_path / "run"))
    assert 'precision was "bf16", now "fp32"' in fails(capsys, *again, "--precision", "fp32")
    assert cli.run(train.main, [*again, "--precision", "bf16", "--stop-after", "2"]) == 0
    assert cli.run(train.main, again) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["precision"], summary["finished"]) == ("bf16", True)
    assert "training.precision was 'auto', now 'fp32'" in fails(capsys, *again, "--precision", "fp32")
    assert cli.run(train.main, [*again, "--precision", "bf16"]) == 0


def test_a_run_remembers_its_trackers_and_where_its_predictions_go(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run wrote neither, without a word."""
    monkeypatch.chdir(tmp_path)
    flags = ("--max-steps", "2", "--stop-after", "1", "--report-to", "csv", "--sst_dev_out", "out/sst.csv")
    copy = tmp_path / "out" / "sst.csv"
    assert cli.run(train.main, small_run(data, tmp_path / "begun", *flags)) == 0
    (tmp_path / "begun" / "metrics.csv").unlink()
    monkeypatch.chdir("/")
    for more, tracked in (((), True), (("--report-to", "none"), False)):
        run = shutil.copytree(tmp_path / "begun", tmp_path / f"run-{tracked}")
        copy.unlink()
        assert cli.run(train.main, ["--resume", "--output", str(run), *more]) == 0
        assert copy.read_bytes() == (run / "predictions" / "sst-dev-output.csv").read_bytes()
        assert (run / "metrics.csv").exists() == tracked
    copy.unlink()
    late = tmp_path / "late.csv"  # beside the copy that the run began with
    assert cli.run(train.main, ["--resume", "--output", str(run), "--para_dev_out", str(late)]) == 0
    assert late.read_bytes() == (run / "predictions" / "para-dev-output.csv").read_bytes()
    assert copy.read_bytes() == (run / "predictions" / "sst-dev-output.csv").read_bytes()


def test_resuming_a_different_run_lists_the_differences(
    data: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = small_run(data, stopped, "--recipe", "demonstration", "--lr", "1e-3", "--resume")
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file() and p.name != ".lock"}
    error = fails(capsys, *same, "--lr", "0.5")
    assert (
        "recipe.optimizer.lr was 0.001, now 0.5; give --resume alone, or with the flags that the run was started with"
        in error
    )
    assert "recipe.training.seed was 11711, now 4" in fails(capsys, *same, "--seed", "4")
    assert 'backend was "fast", now "reference"' in fails(capsys, *same, "--backend", "reference")
    changed = small_data(tmp_path / "changed")
    lines = (changed / "sts-train.csv").read_text().splitlines(keepends=True)
    (changed / "sts-train.csv").write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert "has changed since" not in error
    error = fails(capsys, *same, "--data", str(changed))
    assert "data.train.similarity.hash was" in error
    assert "if a data file has changed since, restore it, or start a new run under another --output" in error
    other = tmp_path / "model"
    model = transformers.BertModel(transformers.BertConfig.from_pretrained(sample_directory().model))
    model.save_pretrained(other)
    for name in ("tokenizer.json", "vocab.txt"):
        (other / name).write_bytes((sample_directory().model / name).read_bytes())
    assert "model.weights was" in fails(capsys, *same, "--model", str(other))
    assert {p: p.read_bytes() for p in before} == before


def test_resuming_with_moved_data_and_output_works(stopped: Path, tmp_path: Path) -> None:
    """Paths, logging and checkpoint intervals may change on resume."""
    moved = small_data(tmp_path / "moved")
    more = ("--lr", "1e-3", "--resume", "--stop-after", "2", "--set", "checkpoint.every=1")
    assert cli.run(train.main, small_run(moved, stopped, *more)) == 0
    assert read_records(stopped)[-1]["step"] == 2


def test_a_run_resumed_from_another_directory_finds_its_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(sample_directory().model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    more = ("--model", "model", "--sts_train", "data/sts-train.csv", "--stop-after", "1", "--max-steps", "2")
    assert cli.run(train.main, small_run(Path("data"), Path("run"), *more)) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert cli.run(train.main, ["--resume", "--output", "../run"]) == 0
    recipe = Recipe.load("../run/best/recipe.toml")
    assert recipe.data.files["similarity"]["train"] == str(tmp_path / "data" / "sts-train.csv")
    assert (recipe.model.name, recipe.data.directory) == (str(tmp_path / "model"), str(tmp_path / "data"))


def test_resuming_without_a_checkpoint_starts_from_the_beginning(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed before its first checkpoint has left its recipe alone."""
    shutil.rmtree(next((stopped / "checkpoints").glob("step-*")))
    assert cli.run(train.main, ["--resume", "--output", str(stopped), "--stop-after", "1"]) == 0
    assert "starting from the beginning" in capsys.readouterr().out


def test_resuming_what_is_no_run_names_the_likely_one(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped --output started the demonstration."""
    (finished.parent / "empty").mkdir()
    for mistyped, problem in {
        finished.with_name("finishd"): f"no such directory; did you mean {finished}?",
        finished.parent: f"holds no run; did you mean {finished}?",
        finished / "best": f"holds no run; did you mean {finished}?",
        finished.with_name("empty"): "holds no run; to start a new run, leave --resume out",
    }.items():
        before = sorted(finished.parent.iterdir())
        assert f"--resume --output {mistyped}: {problem}" in fails(capsys, "--resume", "--output", str(mistyped))
        assert sorted(finished.parent.iterdir()) == before


def test_resuming_a_finished_run_says_so(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    own = small_run(data, run, "--recipe", "demonstration", "--lr", "1e-3", "--resume")
    for flags in (["--resume", "--output", str(run)], own):
        assert cli.run(train.main, flags) == 0
        assert capsys.readouterr().out == (
            f"{run}: finished after 10 steps, nothing is left to do; train on from its model with "
            f"--model {run / 'last'} --output DIR\n"
        )
    assert "a different, finished run: optimizer.lr was 0.001, now 0.5" in fails(capsys, *own, "--lr", "0.5")
    assert "finished after 10 steps and kept no checkpoint" in fails(capsys, *own, "--max-steps", "12")
    assert {p: p.read_bytes() for p in before} == before


def test_a_run_killed_while_it_wrote_its_report_writes_it_when_resumed(finished: Path, tmp_path: Path) -> None:
    """A chart cut short stayed in plots/, beside a report of before the run was resumed last."""
    run = shutil.copytree(finished, tmp_path / "run")
    litter = run / "plots" / ".writing-confusion-paraphrase.svg.2159"
    litter.write_text("<svg")
    report = run / "report.html"
    report.write_text("of an earlier part of the run")
    os.utime(report, ns=(0, (run / "summary.json").stat().st_mtime_ns - 1))
    assert cli.run(train.main, ["--resume", "--output", str(run)]) == 0
    assert "<svg" in report.read_text()
    assert not litter.exists()


def test_a_finished_run_that_kept_a_checkpoint_can_be_made_longer(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(data, tmp_path / "run", "--max-steps", "1", "--set", "checkpoint.keep=1")
    assert cli.run(train.main, run) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000001"]
    assert cli.run(train.main, ["--resume", "--output", str(tmp_path / "run"), "--max-steps", "3"]) == 0
    assert "the run now has 3 steps, not 1: its learning rate follows the new length" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
    assert [r["step"] for r in read_records(tmp_path / "run")] == list(range(4))
    error = fails(capsys, "--resume", "--output", str(tmp_path / "run"), "--max-steps", "2")
    assert "the run now has 2 steps, not 3" in error


# ---- One-line errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epochs", "many"], "--epochs: invalid float value: 'many'"),
        (["--epochs", "-1"], "command line: training.epochs = -1.0: expected 0 or more"),
        (["--batch-size", "0"], "batch_size = 0: expected 1 or more"),
        (["--lr", "nan"], "lr = nan: expected 0 or more"),
        (["--precision", "fp16"], "invalid choice: 'fp16'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--max-step", "3"], "unrecognized arguments: --max-step 3; did you mean --max-steps?"),
        (["--recipe", "nonsense"], "recipe 'nonsense': no such recipe; known: "),
        (["--recipe", "bset"], "recipe 'bset': no such recipe; did you mean best?"),
        (["--recipe", "absent.toml"], "absent.toml: cannot be read (No such file or directory)"),
        (["--set", "nonsense"], "--set 'nonsense': expected section.key=value"),
        (["--set", "training.epoch=3"], "unknown key 'epoch'; did you mean 'epochs'?"),
        (["--set", "seed=3"], "command line: unknown key 'seed'; did you mean 'training.seed'?"),
        (["--set", "lr=1"], "did you mean 'optimizer.lr' or 'weighting.lr'?"),
        (["--set", "training.seed=x"], "command line: training.seed = 'x': expected a whole number"),
        (["--set", "optimizer.schedule=sawtooth"], "expected one of linear, cosine, exponential, constant"),
        (["--set", "tasks.sentiment.dropout=2"], "dropout"),
        (["--set", "tasks.parafrase.weight=1"], "parafrase"),
        (["--set", "tasks.words.kind='sentiment'"], "tasks.words: this name is reserved, choose another"),
        (["--surgery", "nonsense"], "nonsense"),
        (["--data", "/absent"], "/absent"),
        (["--model", "./absent"], "./absent"),
        (["--sst_train", "/absent.csv"], "/absent.csv"),
        (["--resume"], "--resume needs --output"),
        (["--use_gpu", "--device", "cpu"], "choose one"),
        (["--set", "training.select=beauty"], "training.select = 'beauty'"),
        (["--set", "data.files.novels={train='x'}"], "novels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    output = [] if arguments == ["--resume"] else ["--output", str(tmp_path / "run")]
    error = fails(capsys, *output, "--max-steps", "1", "--set", f"data.cache={tmp_path}", *arguments)
    assert expected in error
    assert not (tmp_path / "run").exists()


def test_a_course_checkpoint_without_its_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({}, tmp_path / "course.pt")
    error = fails(capsys, "--model", str(tmp_path / "course.pt"), "--output", str(tmp_path / "run"))
    assert f"{tmp_path / 'course.pt'}: no vocab.txt next to it" in error


def test_cuda_without_a_device_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "CUDA" in fails(capsys, "--device", "cuda", "--output", str(tmp_path / "run"))
    assert "CUDA" in fails(capsys, "--use_gpu", "--output", str(tmp_path / "run"))


def test_a_used_output_directory_needs_resume_or_overwrite(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(data, tmp_path / "run", "--max-steps", "1")
    assert cli.run(train.main, run) == 0
    before = (tmp_path / "run" / "summary.json").read_bytes()
    assert "--resume continues it, --overwrite replaces it" in fails(capsys, *run, status=1)
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    assert cli.run(train.main, [*run, "--overwrite", "--seed", "2"]) == 0
    assert (tmp_path / "run" / "summary.json").read_bytes() != before


def test_two_runs_in_one_directory(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory(tmp_path / "run"):
        assert "another run is writing here" in fails(capsys, *small_run(data, tmp_path / "run"), status=1)


def test_an_output_that_cannot_be_written(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    error = fails(capsys, *small_run(data, tmp_path / "file"), status=1)
    assert f"{tmp_path / 'file'}: cannot be written (it is a file, expected a directory)" in error
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "Permission denied" in fails(capsys, *small_run(data, tmp_path / "locked" / "run"), status=1)


@pytest.fixture
def files_up_to_100_kb() -> Iterator[None]:
    """Longer writes of this process fail with EFBIG: like a full disk, without a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal that comes before the error
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_size_limit_gives_a_one_line_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files_up_to_100_kb: None
) -> None:
    run = small_run(data, tmp_path / "run", "--max-steps", "1", "--set", "training.evaluate_untrained=false")
    assert "cannot be written (File too large)" in fails(capsys, *run, status=1)


def test_training_works_in_a_thread(data: Path, tmp_path: Path) -> None:
    """Notebooks may call the trainer from a thread, where Python allows no signal handlers."""
    status: list[int] = []
    flags = small_run(data, tmp_path / "run", "--max-steps", "1")
    thread = threading.Thread(target=lambda: status.append(cli.run(train.main, flags)))
    thread.start()
    thread.join()
    assert status == [0]


AS_A_MODULE = ["-m", "minbert_fast.env"]
AS_A_SCRIPT = ["-c", "import sys; sys.argv = ['bin/minbert-fast', 'env']; import minbert_fast.__main__"]


@pytest.mark.parametrize(
    ("command", "chosen", "expected"),
    [
        (AS_A_MODULE, {}, "10000"),
        (AS_A_SCRIPT, {}, "10000"),
        (AS_A_MODULE, {"GOMP_SPINCOUNT": "7"}, "7"),
        (AS_A_MODULE, {"OMP_WAIT_POLICY": "active"}, "None"),
        (["-c", "import minbert_fast"], {}, "None"),
    ],
)
def test_waiting_threads_leave_a_busy_machine_to_others(
    tmp_path: Path, command: list[str], chosen: dict[str, str], expected: str
) -> None:
    """On a busy machine a demonstration took 110 s; it takes 20 s if waiting OpenMP threads go to sleep early.

    The variable must be set before torch loads: a stand-in for torch prints it.
    """
    (tmp_path / "torch.py").write_text("import os; print(os.environ.get('GOMP_SPINCOUNT')); raise SystemExit")
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | chosen
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


# ---- Going on from a trained model -------------------------------------------------------------------------------


def test_heads_of_a_trained_model_continue(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--model runs/first/best` drew the heads anew without a word, and called its scores untrained."""
    more = ("--model", str(finished / "best"), "--epochs", "0")
    assert cli.run(train.main, small_run(data, tmp_path / "same", *more)) == 0
    out = capsys.readouterr().out
    assert (
        f"--model {finished / 'best'} is a trained model: heads of sentiment, paraphrase, similarity continue\n" in out
    )
    before, after = (json.loads((run / "summary.json").read_text())["dev"] for run in (finished, tmp_path / "same"))
    assert after == pytest.approx(before, abs=1e-6)
    tasks = 'tasks={paraphrase={features=["cosine"]}, sentiment={}, similarity={kind="paraphrase"}}'
    other = small_run(data, tmp_path / "other", "--model", str(finished / "best"), "--max-steps", "1", "--set", tasks)
    assert cli.run(train.main, other) == 0
    out = capsys.readouterr().out
    assert "paraphrase drawn anew (another shape); similarity drawn anew (another kind)" in out
    assert "untrained" not in out


def test_overwrite_does_not_remove_the_model_that_it_starts_from(
    data: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = finished / "best"
    error = fails(capsys, *small_run(data, finished, "--model", str(best), "--overwrite"))
    assert f"--overwrite would remove --model {best}; choose another --output" in error
    assert (best / "model.safetensors").is_file()


def test_predictions_that_the_run_does_not_have_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--sst_test_out FILE` without test rows was ignored."""
    target = tmp_path / "sst-test.csv"
    assert (
        cli.run(train.main, small_run(data, tmp_path / "run", "--max-steps", "1", "--sst_test_out", str(target))) == 0
    )
    line = f"{target}: not written, the run has no test predictions of sentiment"
    assert line in capsys.readouterr().out
    assert line in json.loads((tmp_path / "run" / "summary.json").read_text())["notices"]


def test_overwrite_with_a_mistake_in_the_data_keeps_the_finished_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, *small_run(tmp_path / "typo", finished, "--overwrite"))
    assert "typo: does not exist" in error
    assert (finished / "best" / "model.safetensors").is_file()
    assert (finished / "summary.json").is_file()


# ---- Disk space ---------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was one for each data file."""
    (tmp_path / "cache").touch()
    flags = ["--set", f"data.cache={tmp_path / 'cache' / 'tokens'}", "--max-steps", "1"]
    assert cli.run(train.main, small_run(data, tmp_path / "run", *flags)) == 0
    assert capsys.readouterr().out.count("no token cache there") == 1


def test_a_run_without_room_is_refused_before_its_first_step(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: (10**9, 10**9 - 10**6, 10**6))
    error = fails(capsys, *small_run(data, tmp_path / "run"), status=1)
    assert "the run needs about" in error
    assert "1.0 MB are free: choose another --output" in error
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: (0, 0, 0))  # a file system that reports no sizes
    assert cli.run(train.main, small_run(data, tmp_path / "run", "--max-steps", "1")) == 0


@pytest.mark.parametrize("more", [(), ("--set", "training.ema=0.9", "--set", "checkpoint.keep=3"), ("--freeze",)])
def test_the_estimated_room_is_what_the_run_takes(
    data: Path, tmp_path: Path, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[disk.Room] = []
    monkeypatch.setattr(disk, "check_room", lambda room, directory: rooms.append(room))
    sizes: list[int] = []
    held: list[int] = []

    def prune(store: CheckpointStore, keep: int) -> None:
        sizes.append(size(tmp_path / "run"))
        held.append(len(list(store.folder.glob("step-*"))))
        real(store, keep)

    real = CheckpointStore.prune
    monkeypatch.setattr(CheckpointStore, "prune", prune)
    flags = small_run(data, tmp_path / "run", "--max-steps", "4", "--set", "checkpoint.every=1", *more)
    assert cli.run(train.main, flags) == 0
    # Tokenizer and report have the same size for any model, small beside a real one.
    fixed = 2 * sum((tmp_path / "run" / "best" / name).stat().st_size for name in ("tokenizer.json", "vocab.txt"))
    fixed += sum(size(tmp_path / "run" / name) for name in ("plots", "report.html", "metrics.jsonl"))
    (room,) = rooms
    assert room.finished == pytest.approx(size(tmp_path / "run") - fixed, rel=0.2)
    assert max(held) == 1 + (3 if "checkpoint.keep=3" in more else 2), "the newest may be damaged"
    new = size(tmp_path / "run" / "best")  # is complete before the old one is removed
    assert room.running == pytest.approx(max(sizes) + new, rel=0.05)


def size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
