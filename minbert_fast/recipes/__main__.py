# SPDX-License-Identifier: Apache-2.0
"""Shows the recipes that ship with the package, and what a recipe may say.

python -m minbert_fast.recipes                 every recipe with its published dev scores, by report
python -m minbert_fast.recipes show NAME       all values of a recipe as TOML, its tasks' defaults included
python -m minbert_fast.recipes keys [WORD]     every key with its type, default and meaning (WORD: those that hold it)
"""

from __future__ import annotations

import functools
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError, field_types, plain, to_toml
from minbert_fast.recipes.keys import Key, keys_of
from minbert_fast.recipes.recipe import Recipe, recipe_names
from minbert_fast.tasks.base import KINDS, TaskOptions, build_task
from minbert_fast.tasks.presets import PRESETS

OURS = "this package"


def main(arguments: Sequence[str]) -> None:
    """Prints what the command line asks for. Raises ConfigError."""
    parser = cli.Parser("recipes", __doc__ or "")
    parser.add_argument("action", nargs="?", default="list", choices=("list", "show", "keys"), help="(default: list)")
    parser.add_argument("name", nargs="?", metavar="NAME", help="show: a recipe's name, or a .toml file; keys: a word")
    options = parser.parse_args(arguments)
    if options.action == "keys":
        print(format_keys(options.name or ""))
    elif (options.action == "show") != (options.name is not None):
        raise ConfigError("expected `list`, `show NAME` or `keys [WORD]`")
    elif options.action == "show":
        print(format_recipe(Recipe.load(options.name)), end="")
    else:
        width = shutil.get_terminal_size((120, 24)).columns
        print(format_list([Recipe.load(name) for name in recipe_names()], width))


# ---- list ------------------------------------------------------------------------------------------------------------


def format_list(recipes: Sequence[Recipe], width: int) -> str:
    """Names, published dev scores and descriptions by report, in lines of at most `width` characters where words allow.

    The scores are those of `published.dev` in its order: sentiment, paraphrase, similarity for most.
    """
    names = max(len(recipe.name) for recipe in recipes)
    scores = {recipe.name: " ".join(f"{value:.3f}" for value in recipe.published.dev.values()) for recipe in recipes}
    published = max(len("published, dev"), *map(len, scores.values()))
    indent = 2 + names + 2 + published + 2
    beside = indent + 30 <= width  # else the description has lines of its own
    wrap = functools.partial(textwrap.wrap, width=width, break_on_hyphens=False)
    lines = [f"  {'name':{names}}  {'published, dev':{published}}" + ("  description" if beside else "")]
    for source in sorted({recipe.source for recipe in recipes}, key=lambda source: (source != "", source)):
        lines += ["", *wrap(source or OURS)]
        for recipe in recipes:
            if recipe.source == source:
                start = f"  {recipe.name:{names}}  {scores[recipe.name] or '-':{published}}  "
                if not beside:
                    lines.append(start.rstrip())
                    start = " " * 4
                blank = " " * (indent if beside else 4)
                lines += wrap(recipe.description, initial_indent=start, subsequent_indent=blank)
    return "\n".join(lines)


# ---- show ------------------------------------------------------------------------------------------------------------


def format_recipe(recipe: Recipe) -> str:
    """All values of a recipe as TOML that loads again: those of its tasks' kinds too; unset ones as comments."""
    whole = resolve_tasks(recipe)
    unset = [f"# {key}: {line}" for key, line in unset_keys(whole)]
    return to_toml(plain(whole)) + ("\n# Unset:\n" + "\n".join(unset) + "\n" if unset else "")


def resolve_tasks(recipe: Recipe) -> Recipe:
    """The recipe with every option of its tasks. A task that only a stage has gets them there."""
    tasks = {name: task_values(name, options) for name, options in recipe.tasks.items()}
    stages = []
    for stage in recipe.stages:
        own = {n: o if n in tasks else task_values(n, o) for n, o in stage.get("tasks", {}).items()}
        stages.append({**stage, "tasks": own} if own else stage)
    return recipe.with_values({"tasks": tasks, "stages": stages}, recipe.name)


def task_values(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a task that has a value; `kind` stays the preset that the task comes from."""
    task = build_task(name, options)
    values: dict[str, Any] = plain(task.options)
    return values | {"kind": task.preset or task.kind}


def unset_keys(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The keys without a value, and what that means."""
    sections = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    tasks = {f"tasks.{name}": build_task(name, values).options for name, values in recipe.tasks.items()}
    for prefix, options in (sections | tasks).items():
        if is_dataclass(options):
            for key in keys_of(type(options)):
                if getattr(options, key.name) is None:
                    yield f"{prefix}.{key.name}", key.line


# ---- keys ------------------------------------------------------------------------------------------------------------


def format_keys(word: str) -> str:
    """Every key with its type, default and one line, by section; with `word`, the keys whose text holds it."""
    lines: list[str] = []
    for title, prefix, keys in key_groups():
        found = [key for key in keys if word.lower() in f"{prefix}{key.name} {key.line}".lower()]
        if found:
            lines += ["", title]
        for key in found:
            lines.append(f"  {prefix}{key.name} = {key.default}   ({key.type})")
            if key.line:
                lines.append(f"      {key.line}")
    presets = [f"  {name}: {values['kind']}" for name, values in PRESETS.items() if word.lower() in name]
    if presets:
        lines += ["", "Presets, further values of `kind`, and the kinds that they set options of", *presets]
    if not lines:
        raise ConfigError(f"keys {word}: no key's name or meaning holds this")
    return "\n".join(lines[1:])


def key_groups() -> Iterator[tuple[str, str, list[Key]]]:
    """(title, prefix, keys) of every section, then of every kind of task without the keys that all kinds have."""
    hints = field_types(Recipe)
    yield "The recipe itself", "", keys_of(Recipe)
    for field in fields(Recipe):
        section = hints[field.name]
        if is_dataclass(section) and isinstance(section, type):
            yield f"[{field.name}]", f"{field.name}.", keys_of(section)
    common = {key.name for key in keys_of(TaskOptions)}
    yield "[tasks.NAME], every kind", "tasks.NAME.", keys_of(TaskOptions)
    for kind, task in KINDS.items():
        own = [key for key in keys_of(task.Options) if key.name not in common]
        yield f'[tasks.NAME], kind = "{kind}"', "tasks.NAME.", own


if __name__ == "__main__":
    sys.exit(cli.run(main))
