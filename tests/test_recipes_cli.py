# SPDX-License-Identifier: Apache-2.0
"""`python -m minbert_fast.recipes`: every recipe is listed, and shown so that it loads again."""

from __future__ import annotations

import tomllib

import pytest

from minbert_fast import cli, recipes
from minbert_fast.config import Recipe, recipe_names
from minbert_fast.schema import build


def test_the_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(recipes.main, ["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_shown_loads_again(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(recipes.main, ["show", name]) == 0
    assert build(Recipe, tomllib.loads(capsys.readouterr().out), name) == Recipe.load(name)


def test_an_unknown_recipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(recipes.main, ["show", "nothing"]) == 2
    error = capsys.readouterr().err
    assert "no such recipe" in error
    assert error.count("\n") == 1
