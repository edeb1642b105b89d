# SPDX-License-Identifier: Apache-2.0
"""From the flags of `train` to a recipe: every flag, one file, chosen tasks, whole tables, mixed-up places; the help."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import minbert_fast
from minbert_fast import __main__ as entry
from minbert_fast import train
from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError
from minbert_fast.data import sample_directory
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import build_tasks


def recipe_from(*arguments: str) -> Recipe:
    return train.build_recipe(train.parser().parse_args(arguments))


def test_every_flag_reaches_the_recipe() -> None:
    flags = "--data d --model m --epochs 7 --max-steps 3 --batch-size 5 --lr 0.5 --seed 9 --precision bf16"
    more = "--surgery none --dropout 0.25 --freeze --patience 2"
    recipe = recipe_from(*flags.split(), *more.split())
    assert (recipe.model.freeze, recipe.training.patience) == (True, 2)
    assert recipe_from("--epochs", "0.25").training.epochs == 0.25
    assert (recipe.data.directory, recipe.model.name, recipe.model.dropout) == ("d", "m", 0.25)
    training = recipe.training
    assert (training.epochs, training.max_steps, training.batch_size, training.seed) == (7, 3, 5, 9)
    assert (training.precision, recipe.optimizer.lr, recipe.surgery.method) == ("bf16", 0.5, "none")


def test_set_overrides_flags_and_flags_override_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'extends = "default"\n[optimizer]\nlr = 0.1\n[training]\nepochs = 4\nseed = 1\n'
    )
    mine = ("--recipe", str(tmp_path / "mine.toml"))
    assert recipe_from(*mine).optimizer.lr == 0.1
    assert recipe_from(*mine, "--option", "finetune").optimizer.lr == 1e-5
    assert recipe_from(*mine, "--option", "finetune", "--lr", "0.2").optimizer.lr == 0.2
    last = recipe_from(*mine, "--option", "finetune", "--lr", "0.2", "--epochs", "5", "--set", "optimizer.lr=0.3")
    assert (last.optimizer.lr, last.training.epochs, last.training.seed) == (0.3, 5, 1)


def test_the_courses_dropout_is_that_of_the_heads() -> None:
    """The encoder keeps its own: at 0.5 in the encoder, an epoch of SST scored 0.327 instead of 0.457."""
    recipe = recipe_from("--model", "m", "--hidden_dropout_prob", "0.5")
    assert recipe.model.dropout is None
    assert {name: task.options.dropout for name, task in build_tasks(recipe).items()} == dict.fromkeys(
        recipe.tasks, 0.5
    )
    recipe = recipe_from("--recipe", "enhancing-final", "--hidden_dropout_prob", "0.5")
    assert all(getattr(task.options, "dropout", 0.5) == 0.5 for task in build_tasks(recipe).values())
    assert not hasattr(build_tasks(recipe)["mlm"].options, "dropout")
    last = recipe_from("--model", "m", "--hidden_dropout_prob", "0.5", "--set", "tasks.sentiment.dropout=0.2")
    assert [task.options.dropout for task in build_tasks(last).values()] == [0.2, 0.5, 0.5]
    one = recipe_from("--data", __file__, "--text", "a", "--label", "b", "--hidden_dropout_prob", "0.4")
    assert one.tasks["b"]["dropout"] == 0.4
    with pytest.raises(ConfigError, match=r"dropout = 1\.5: expected 0 <= dropout < 1"):
        build_tasks(recipe_from("--model", "m", "--hidden_dropout_prob", "1.5"))


def test_the_courses_option_brings_the_starters_defaults() -> None:
    for option, lr in (("pretrain", 1e-3), ("finetune", 1e-5)):
        recipe = recipe_from("--option", option)
        assert recipe.model.freeze == (option == "pretrain")
        assert (recipe.training.epochs, recipe.training.batch_size, recipe.optimizer.lr) == (10, 8, lr)
        assert (recipe.optimizer.schedule, recipe.optimizer.warmup, recipe.optimizer.clip) == ("constant", 0.0, 0.0)
        assert (recipe.model.pooling, recipe.model.dropout) == ("pooler", None)
        assert {task.options.dropout for task in build_tasks(recipe).values()} == {0.3}


def test_only_the_tiny_model_uses_the_demonstration_recipe() -> None:
    assert recipe_from().name == "demonstration"
    assert recipe_from("--data", "d").name == "demonstration"
    assert recipe_from("--model", "m").name == "default"
    assert recipe_from("--set", "model.name=m").name == "default"
    assert recipe_from("--recipe", "default").name == "default"


# ---- One file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    path = tmp_path / "my reviews.csv"
    path.write_text("review,stars\nfine,4\n")
    return str(path)


def test_one_file_is_one_task(reviews: str) -> None:
    recipe = recipe_from("--data", reviews, "--text", "review", "--label", "star rating", "--model", "m")
    assert recipe.tasks == {
        "star-rating": {"kind": "", "data": {"train": reviews, "text": ["review"], "label": "star rating"}}
    }
    assert (recipe.name, recipe.data.directory) == ("default", "")
    more = ("--dev", "dev.csv", "--id", "key", "--kind", "pair-classification", "--tasks", "same")
    recipe = recipe_from("--data", reviews, "--text", "a,b", "--label", "same", *more)
    source = {"train": reviews, "dev": "dev.csv", "text": ["a", "b"], "label": "same", "id": "key"}
    assert recipe.tasks == {"same": {"kind": "pair-classification", "data": source}}
    recipe = recipe_from("--data", reviews, "--text", "review", "--kind", "masked-lm")
    assert recipe.tasks == {"my-reviews": {"kind": "masked-lm", "data": {"train": reviews, "text": ["review"]}}}


def test_set_reaches_into_the_task_of_a_file(reviews: str) -> None:
    recipe = recipe_from(
        "--data", reviews, "--text", "review", "--label", "stars", "--set", "tasks.stars.data.quoting='none'"
    )
    assert list(recipe.tasks) == ["stars"]
    assert recipe.tasks["stars"]["data"]["quoting"] == "none"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "FILE"], "a file; --text COLUMN names its text and --label COLUMN its labels"),
        (["--data", "FILE", "--text", "review"], "names its labels; for text without labels, choose a --kind"),
        (["--data", ".", "--text", "review"], "--text review: describes --data FILE, and . is no file"),
        (["--label", "stars"], "--label stars: describes --data FILE"),
        (["--data", "FILE", "--text", "review", "--label", "words"], "tasks.words: this name is reserved"),
    ],
)  # fmt: skip
def test_flags_of_a_file_that_do_not_fit(reviews: str, arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from(*(reviews if word == "FILE" else word for word in arguments))
    assert expected in str(caught.value)


# ---- Tasks and tables ----------------------------------------------------------------------------------------------


def test_tasks_picks_tasks_from_the_recipe_and_its_stages() -> None:
    assert list(recipe_from("--tasks", "similarity,sentiment").tasks) == ["sentiment", "similarity"]
    assert list(recipe_from("--tasks", "sentiment,nli").tasks) == ["sentiment", "nli"]
    staged = recipe_from("--recipe", "bertology-nli-all", "--tasks", "sentiment,nli")
    assert {name for stage in staged.resolved_stages() for name in stage.tasks} == {"sentiment", "nli"}
    with pytest.raises(ConfigError, match=r"--tasks sentimnt: recipe demonstration has sentiment, paraphrase"):
        recipe_from("--tasks", "sentimnt")


def test_a_flag_that_a_stage_does_not_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """`--epochs` changed the stages without epochs of their own alone, without a word."""
    staged = recipe_from("--recipe", "bertology-nli-triplet", "--epochs", "0.5", "--lr", "1e-4")
    epochs = [stage.training.epochs for stage in staged.resolved_stages()]
    kept = [number for number, each in enumerate(epochs, start=1) if each != 0.5]
    assert len(kept) == 1
    line = f"stage {kept[0]} does not use training.epochs = 0.5: it sets {epochs[kept[0] - 1]:g} itself"
    assert capsys.readouterr().out == line + "\n"
    recipe_from("--recipe", "bertology-nli-triplet", "--lr", "1e-4", "--set", "tasks.sentiment.weight=2.0")
    recipe_from("--recipe", "bertology-nli-triplet", "--epochs", f"{epochs[kept[0] - 1]}")
    assert not capsys.readouterr().out


def test_a_whole_table_replaces_and_a_key_is_merged() -> None:
    """`tasks={sentiment={}}` was merged without a word, so that three tasks were trained."""
    assert recipe_from("--set", "tasks={sentiment={}}").tasks == {"sentiment": {}}
    both = recipe_from("--set", "tasks={sentiment={}}", "--set", "tasks.paraphrase.weight=2.0")
    assert both.tasks == {"sentiment": {}, "paraphrase": {"weight": 2.0}}
    assert len(recipe_from("--set", "tasks.sentiment.weight=2.0").tasks) == 3
    assert recipe_from("--lr", "0.5", "--set", "optimizer={warmup=0.3}").optimizer.lr == Recipe().optimizer.lr


# ---- Places that are mixed up --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output of a run, as far as its place matters."""
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "config.json").write_text("{}")
    return tmp_path / "run"


def test_a_model_in_place_of_data(run: Path) -> None:
    model, data = str(sample_directory().model), str(sample_directory().data)
    with pytest.raises(ConfigError) as caught:
        recipe_from("--data", model, "--model", data)
    assert str(caught.value) == (
        f"--data {model}: holds a model and no data files; did you mean --data {data} --model {model}?"
    )
    with pytest.raises(ConfigError, match=f"--data {run}: holds a model .*; --model {run / 'best'} uses it"):
        recipe_from("--data", str(run))


@pytest.mark.parametrize(
    ("command", "flag", "more"),
    [
        ("train", "--model", ["--output", "new"]),
        ("encode", "--model", ["--input", str(sample_directory().data / "sts-dev.csv"), "--output", "x.npy"]),
        ("predict", "--checkpoint", ["--task", "sentiment", "--input", "x", "--output", "y"]),
        ("evaluate", "--checkpoint", ["--data", str(sample_directory().data)]),
        ("export", "--checkpoint", ["--format", "huggingface", "--output", "exported"]),
    ],
)
def test_data_or_a_run_in_place_of_a_model(
    command: str,
    flag: str,
    more: list[str],
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run.parent)
    more = ["--column", "sentence1", *more] if command == "encode" else more
    main = importlib.import_module(f"minbert_fast.{command}").main
    (run / "predictions").mkdir()
    for path, problem in {
        run: f"its model is {run / 'best'}",
        run / "predictions": f"its model is {run / 'best'}",
        sample_directory().data: "holds data files, expected the directory of a model",
    }.items():
        assert cli.run(main, [flag, str(path), *more]) == 2
        assert problem in capsys.readouterr().err
    assert not (run.parent / "new").exists()


# ---- Help, and the installed command -------------------------------------------------------------------------------


def test_the_help_fits_a_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = train.parser().format_help()
    assert text.count("\n") <= 40
    assert max(map(len, text.splitlines())) <= 84
    assert "--sst_train" not in text
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--help-course"])
    course = capsys.readouterr().out
    assert "--sst_train" in course
    assert "--use_gpu" in course


def test_the_entry_point_knows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    package = Path(entry.__file__).parent
    files = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    assert files | {"recipes"} == set(entry.COMMANDS)
    for module, _ in entry.COMMANDS.values():
        assert callable(importlib.import_module(f"minbert_fast.{module}").main)
    assert cli.run(entry.main, []) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in entry.COMMANDS)
    assert cli.run(entry.main, ["trian"]) == 2
    assert "'trian': no such command; did you mean train?" in capsys.readouterr().err
    assert cli.run(entry.main, ["env", "--json"]) == 0
    assert '"minbert_fast"' in capsys.readouterr().out


def test_the_entry_point_imports_only_the_chosen_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [f"minbert_fast.{name}" for name in ("train", "search", "export")]
    for module in (*others, entry.__name__):  # as in a new process
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.delattr(minbert_fast, module.rpartition(".")[2], raising=False)
    monkeypatch.setattr(sys, "argv", ["minbert-fast", "recipes"])
    assert importlib.import_module(entry.__name__).script() == 0
    assert "default" in capsys.readouterr().out
    assert not sys.modules.keys() & others
