# SPDX-License-Identifier: Apache-2.0
"""`python -m minbert_fast.recipes` lists every recipe, and shows a recipe as TOML that loads again."""

from __future__ import annotations

import tomllib

import pytest

from minbert_fast.common import cli
from minbert_fast.common.schema import build
from minbert_fast.recipes import __main__ as recipes
from minbert_fast.recipes.recipe import Recipe, recipe_names


def test_the_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(recipes.main, ["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_shown_loads_again(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(recipes.main, ["show", name]) == 0
    assert build(Recipe, tomllib.loads(capsys.readouterr().out), name) == Recipe.load(name)


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
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
