# SPDX-License-Identifier: Apache-2.0
"""Shows the recipes that ship with the package.

`python -m minbert_fast.recipes` lists names, sources and published scores; `... show NAME` prints all values of one
recipe as TOML, inherited values included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError
from minbert_fast.recipes.recipe import Recipe, recipe_names


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser("recipes", "Shows the recipes that ship with the package.")
    parser.add_argument("action", nargs="?", default="list", choices=("list", "show"), help="(default: list)")
    parser.add_argument("name", nargs="?", metavar="NAME", help="show: a recipe's name, or a .toml file")
    options = parser.parse_args(arguments)
    if (options.action == "show") != (options.name is not None):
        raise ConfigError("expected `list`, or `show NAME`")
    if options.name is not None:
        print(Recipe.load(options.name).to_toml(), end="")
    else:
        print(format_list([Recipe.load(name) for name in recipe_names()]))


def format_list(recipes: Sequence[Recipe]) -> str:
    rows = [("name", "published", "source", "description")]
    for recipe in recipes:
        published = ", ".join(f"{metric} {value:g}" for metric, value in recipe.published.items())
        rows.append((recipe.name, published or "-", recipe.source or "-", recipe.description))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)


if __name__ == "__main__":
    sys.exit(cli.run(main))
