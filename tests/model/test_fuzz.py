# SPDX-License-Identifier: Apache-2.0
"""Mutated model directories, course files and recipes: they load, or one line says what is wrong, and where."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minbert_fast import BertModel
from minbert_fast.common.schema import ConfigError
from minbert_fast.data import sample_directory
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel, build_tasks
from tests.data.test_fuzz import drop_span, flip_byte, insert, mutate_json, repeat_span, truncate

pytestmark = pytest.mark.ci

Mutation = Callable[[bytes, random.Random], bytes]
BINARY: tuple[Mutation, ...] = (
    truncate, drop_span, flip_byte, repeat_span, insert(b"\0" * 8), insert(b"\xff" * 8), insert(b"{"),
)  # fmt: skip
TEXT: tuple[Mutation, ...] = (
    *BINARY, insert(b"\n"), insert(b'"'), insert(b"9" * 30), insert(b"-1"), insert(b"nan"), insert(b"[[stages]]\n"),
    insert(b"[tasks.x]\n"), insert(b"\xed\xa0\x80"), insert(b"[" * 3000),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model's directory, whole."""
    folder = tmp_path_factory.mktemp("model") / "whole"
    recipe = Recipe.load("default")
    torch.manual_seed(0)
    encoder = BertModel.from_pretrained(sample_directory().model)
    MultitaskModel(encoder, build_tasks(recipe), "mean").save(folder, recipe.to_toml())
    torch.save({"model": encoder.state_dict(), "path": Path("x"), "best": np.float64(0.5)}, folder / "course.pt")
    encoder.save_pretrained(folder / "shards")
    (folder / "shards" / "model.safetensors").rename(folder / "shards" / "one.safetensors")
    places = dict.fromkeys(load_file(folder / "shards" / "one.safetensors"), "one.safetensors")
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def mutated_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose JSON header says something else."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(mutate_json(json.loads(data[8 : 8 + size]), chance)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def attempts(whole: Path, folder: Path, name: str, count: int, seed: int) -> Iterator[tuple[Path, bytes]]:
    """The directory again and again, each time with `name` mutated in another way."""
    chance = random.Random(seed)
    shutil.copytree(whole, folder)
    original = (folder / name).read_bytes()
    for _ in range(count):
        data = original
        for _ in range(chance.randrange(1, 3)):
            if name.endswith(".json"):
                structured: Mutation = lambda d, c: json.dumps(mutate_json(json.loads(d), c)).encode()  # noqa: E731
            else:
                structured = mutated_header if name.endswith(".safetensors") else flip_byte
            mutation = structured if chance.random() < 0.5 else chance.choice(TEXT if name.endswith("l") else BINARY)
            try:
                data = mutation(data, chance)
            except ValueError:  # no longer JSON: mutated enough
                break
        (folder / name).write_bytes(data)
        yield folder, data


LOADERS: dict[str, Callable[[Path], Any]] = {
    "config.json": BertModel.from_pretrained,
    "model.safetensors": BertModel.from_pretrained,
    "course.pt": lambda folder: BertModel.from_pretrained(folder / "course.pt", num_attention_heads=2),
    "shards/model.safetensors.index.json": lambda folder: BertModel.from_pretrained(folder, subfolder="shards"),
    "heads.safetensors": MultitaskModel.load,
    "recipe.toml": MultitaskModel.load,
}


def line_from(load: Callable[[Path], Any], folder: Path, mutation: str) -> str:
    """The line that a user would see; nothing where the files load."""
    try:
        load(folder)
    except ConfigError as error:
        return str(error)
    except BaseException as error:
        raise AssertionError(mutation) from error
    return ""


def fuzz(whole: Path, folder: Path, name: str, count: int, seed: int) -> None:
    loaded = 0
    for number, (mutated, data) in enumerate(attempts(whole, folder, name, count, seed)):
        message = line_from(LOADERS[name], mutated, f"mutation {number} of seed {seed}: {data[:200]!r}")
        loaded += not message
        assert "\n" not in message
        assert not message or message.startswith(str(folder)), f"mutation {number} does not say where: {message}"
    assert loaded < count, "the mutations are too gentle to show anything"


@pytest.mark.filterwarnings("ignore")  # an absent pooler is announced
@pytest.mark.parametrize("name", LOADERS)
def test_mutated_model_files(name: str, whole: Path, tmp_path: Path) -> None:
    fuzz(whole, tmp_path / "model", name, 60, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADERS)
def test_mutated_model_files_by_the_thousand(name: str, whole: Path, tmp_path: Path) -> None:
    fuzz(whole, tmp_path / "model", name, 10_000, seed=2)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "max_position_embeddings", "num_hidden_layers"])
def test_declared_sizes_are_checked_before_memory_is_taken(key: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {key: values[key] * 2**20}))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError):
            BertModel.from_pretrained(tmp_path / "model")
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
