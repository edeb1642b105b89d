# SPDX-License-Identifier: Apache-2.0
"""`python -m minbert_fast.recipes` lists every recipe, shows one as TOML that loads again, and describes every key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError, build
from minbert_fast.recipes import __main__ as recipes
from minbert_fast.recipes.keys import keys_of
from minbert_fast.recipes.recipe import Recipe, parse_assignments, recipe_names
from minbert_fast.tasks import build_tasks
from tests.small import error_line


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_the_list_names_every_recipe_and_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.run(recipes.main, ["list"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= max(columns, 67)  # a name with its scores needs 67
    for name in recipe_names():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        recipe = Recipe.load(name)
        assert recipe.name == name
        assert recipe.description
        assert all(f"{value:.3f}" in line for value in recipe.published.dev.values())
        assert all(word in printed for word in recipe.description.split())
        if recipe.source:  # below its report's heading
            heading = max(i for i, text in enumerate(lines[: lines.index(line)]) if not text.startswith(" ") and text)
            assert lines[heading].split()[-1] == recipe.source.split()[-1]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_shown_loads_again_with_every_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(recipes.main, ["show", name]) == 0
    printed = capsys.readouterr().out
    recipe, shown = Recipe.load(name), build(Recipe, tomllib.loads(printed), "printed")
    assert build_tasks(shown) == build_tasks(recipe)
    for then, now in zip(recipe.resolved_stages(), shown.resolved_stages(), strict=True):
        assert build_tasks(now) == build_tasks(then)
        assert replace(now, tasks=then.tasks) == then
        assert then.training.epochs > 0
    for task, options in build_tasks(recipe).items():
        for name in (f.name for f in fields(options.options)):
            value = getattr(options.options, name)
            assert f"{name} = " in printed or value is None or isinstance(value, Mapping), f"{task}.{name}"
    assert ("# optimizer.head_lr: " in printed) == (recipe.optimizer.head_lr is None)


def test_keys_describe_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    """Each key of each section, and of each kind of task, has a type and a default; the recipe's own have a line."""
    assert cli.run(recipes.main, ["keys"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "  optimizer.lr = 2e-05   (number)" in printed
    assert printed[printed.index('  training.start = "last"   (last | best | whole number)') + 1].startswith(
        "      a stage's"
    )
    groups = list(recipes.key_groups())
    for _, prefix, keys in groups:
        for key in keys:
            assert f"  {prefix}{key.name} = {key.default}   ({key.type})" in printed
            assert key.line or prefix == "tasks.NAME.", f"{prefix}{key.name} has no comment"
    named = {prefix + key.name for _, prefix, keys in groups for key in keys}
    sections = {f.name: getattr(Recipe(), f.name) for f in fields(Recipe)}
    for section, options in sections.items():
        inner = [f"{section}.{f.name}" for f in fields(options)] if is_dataclass(options) else [section]
        assert named >= {*inner}
    assert {"tasks.NAME.weight", "tasks.NAME.extra_layers", "tasks.NAME.features", "tasks.NAME.rate"} <= named


def test_keys_finds_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(recipes.main, ["keys", "warmup"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["[optimizer]", "  optimizer.warmup = 0.1   (number)"]
    assert cli.run(recipes.main, ["keys", "elephant"]) == 2
    assert "no key's name or meaning holds this" in capsys.readouterr().err


def test_comments_are_read_in_every_layout() -> None:
    """One line, several lines, an inherited field, and no comment at all."""
    found = {key.name: key for key in keys_of(Child)}
    assert [found[name].line for name in ("one", "several", "bare", "own")] == [
        "the first",
        "the second",
        "",
        "the last",
    ]
    assert [found[name].type for name in ("one", "several", "bare", "own")] == [
        "whole number",
        "table of number",
        "a | b",
        "list of text",
    ]
    assert [found[name].default for name in ("one", "several", "bare", "own")] == ["1", "{}", "unset", '["x"]']


@dataclass(frozen=True)
class Parent:
    one: int = 1  # the first
    several: Mapping[str, float] = field(  # the second
        default_factory=dict
    )
    bare: Literal["a", "b"] | None = None


@dataclass(frozen=True)
class Child(Parent):
    own: tuple[str, ...] = ("x",)  # the last


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "nothing"], "no such recipe"),
        (["show"], "show NAME"),
        (["list", "default"], "show NAME"),
        (["dance"], "dance"),
    ],
)
def test_errors_are_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(recipes.main, arguments) == 2
    assert expected in error_line(capsys)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ('tasks = ["sentiment"]', "stages[0].tasks = ['sentiment']: expected a table of keys"),
        ("tasks = { sentiment = false }", "stages[0].tasks.sentiment = False: expected a table of keys"),
        ('model = "cls"', "stages[0].model = 'cls': expected a table of keys"),
        ("training = 3", "stages[0].training = 3: expected a table of keys"),
        ("stages = [{}]", "stages[0].stages: a stage has no stages of its own"),
    ],
)
def test_a_stage_that_is_no_partial_recipe_is_one_line(
    stage: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of task names ended in a traceback; stages of a stage were not run."""
    path = tmp_path / "x.toml"
    path.write_text(f'extends = "default"\n[[stages]]\n{stage}\n', encoding="utf-8")
    assert cli.run(recipes.main, ["show", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: {expected}\n"


def test_a_file_of_a_split_that_is_none_is_refused() -> None:
    """`data.files.sentiment.trian=FILE` was ignored."""
    with pytest.raises(
        ConfigError, match=r"files\.sentiment = .*trian.*: expected split = path, for the splits dev, train"
    ):
        Recipe.load("default").with_values({"data": {"files": {"sentiment": {"trian": "x.csv"}}}}, "--set")


def test_spaces_around_an_assignment_belong_to_neither_side() -> None:
    """A text kept the space before it: no such model."""
    assert parse_assignments(["model.name = some/model", "training.epochs = 2"]) == {
        "model": {"name": "some/model"},
        "training": {"epochs": 2},
    }


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("model.dropout=1.0", "expected 0 <= dropout < 1"),
        ("data.max_length=1", "expected 2 or more"),
        ("data.holdout=1.0", "expected a fraction below 1"),
        ("data.max_bad_rows=1.5", "expected a fraction from 0 to 1"),
        ("optimizer.lr=inf", "expected 0 or more"),
        *((f"optimizer.{key}=-0.5", "expected 0 or more") for key in ("head_lr", "weight_decay", "clip", "gamma")),
        ("optimizer.layer_decay=-0.5", "expected 0 or more"),
        ("optimizer.eps=0.0", "expected a number above 0"),
        ("optimizer.betas=[0.9, 1.0]", "expected 0 <= beta < 1"),
        ("optimizer.betas=[0.9]", "expected 2 values"),
        ("optimizer.decay_all=1", "expected true or false"),
        ("optimizer.warmup=1.5", "expected a share from 0 to 1"),
        *((f"weighting.{key}=-0.5", "expected 0 or more") for key in ("lr", "logit_lr", "logit_decay")),
        ("weighting.window=-1", "expected 0 or more"),
        ("weighting.temperature=0.0", "expected above 0"),
        *((f"regularisation.{key}=-0.5", "expected 0 or more") for key in ("r_drop", "smart", "noise", "proximal")),
        *((f"regularisation.{key}=-0.5", "expected 0 or more") for key in ("step", "radius")),
        ("regularisation.momentum=1.0", "expected 0 <= momentum < 1"),
        *((f"training.{key}=-1", "expected 0 or more") for key in ("max_steps", "evaluate_every", "evaluate_train")),
        ("training.patience=-1", "expected 0 or more"),
        ("training.max_skipped=0", "expected 1 or more"),
        ("training.batch_size=true", "expected a whole number"),
        ("training.seed=-1", "expected 0 or more, below 2**63"),
        ("training.ema=1.0", "expected 0 <= ema < 1"),
        ("training.start=1.5", "expected"),
        ("checkpoint.every=-1", "expected 0 or more"),
        ("checkpoint.keep=-1", "expected 0 or more"),
        ("logging.every=0", "expected 1 or more"),
        ("stages=[{ training = { start = 1 } }]", "number of an earlier stage"),
        ("stages=[{}, { training = { start = -1 } }]", "number of an earlier stage"),
    ],
)
def test_a_value_out_of_its_range_is_refused(assignment: str, expected: str) -> None:
    """By its key and in one line, before any data are read."""
    key = assignment.partition("=")[0].rpartition(".")[2] if "stages" not in assignment else "stages"
    with pytest.raises(ConfigError, match=re.escape(key) + ".*" + re.escape(expected)) as error:
        Recipe().with_values(parse_assignments([assignment]), "--set")
    assert "\n" not in str(error.value)


def test_values_at_the_ends_of_their_ranges_are_taken() -> None:
    texts = """data.max_length=2 data.holdout=0 data.max_bad_rows=1 optimizer.lr=0 optimizer.warmup=1 optimizer.clip=0
        optimizer.betas=[0,0] training.max_steps=0 training.ema=0 model.dropout=0 checkpoint.keep=0 logging.every=1"""
    values = parse_assignments([*texts.split(), "stages=[{ training = { start = 0 } }, { training = { start = 1 } }]"])
    recipe = Recipe().with_values(values, "--set")
    assert [stage.training.start for stage in recipe.resolved_stages()] == [0, 1]


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    for name, parent in (("one", "two"), ("two", "one")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{parent}.toml"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"one\.toml: extends itself through one\.toml -> two\.toml$"):
        Recipe.load(str(tmp_path / "one.toml"))


def test_a_recipe_that_extends_another_has_not_its_published_scores(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "finetune-cosine"\n', encoding="utf-8")
    mine, theirs = Recipe.load(str(tmp_path / "mine.toml")), Recipe.load("finetune-cosine")
    assert theirs.published
    assert not mine.published
    assert (mine.name, mine.description, mine.tasks) == ("default", "", theirs.tasks)
