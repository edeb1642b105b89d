# SPDX-License-Identifier: Apache-2.0
"""Exported models give equal outputs in other libraries and in Predictor; model cards; the `env` command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

from minbert_fast import BertModel, Predictor, env, export
from minbert_fast.common import cli
from minbert_fast.common.schema import build
from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel, build_tasks

pytestmark = pytest.mark.usefixtures("one_thread")
SENTENCES = ["a film", "the girl eats an apple in the park", "a very good film, " * 60]
SUMMARY = {
    "dev": {"sentiment_accuracy": 0.4321, "score": None},
    "untrained": {"sentiment_accuracy": 0.2},
    "steps": 1234,
    "tokens": 56789,
    "versions": {"torch": "2.99"},
}


def checkpoint(folder: Path, pooling: str = "mean", **summary: Any) -> Path:
    torch.manual_seed(0)
    values = {
        "model": {"pooling": pooling, "name": "/somewhere/weights"},
        "data": {"max_length": 40, "directory": "/somewhere/data", "files": {"sts": {"dev": "/somewhere/sts.csv"}}},
        "surgery": {"method": "pcgrad"},
    }
    recipe = build(Recipe, values, "test")
    model = MultitaskModel(
        BertModel.from_pretrained(sample_directory().model), build_tasks(recipe), recipe.model.pooling
    )
    model.save(folder / "best", recipe.to_toml(), Tokenizer.from_pretrained(sample_directory().model))
    (folder / "summary.json").write_text(json.dumps(SUMMARY | summary))
    return folder / "best"


def run_export(source: Path, form: str, output: Path, *more: str) -> int:
    flags = ["--checkpoint", str(source), "--format", form, "--output", str(output)]
    return cli.run(export.main, [*flags, *more])


def test_transformers_load_the_export_with_equal_outputs(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    assert run_export(source, "huggingface", tmp_path / "new" / "model") == 0
    stock = transformers.AutoModel.from_pretrained(tmp_path / "new" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "model")
    batch = tokenizer(SENTENCES[:2], padding=True, return_tensors="pt")
    ours = BertModel.from_pretrained(source, local_files_only=True)
    with torch.no_grad():
        theirs, mine = stock(**batch), ours(batch["input_ids"], batch["attention_mask"])
    attended = batch["attention_mask"].bool()
    torch.testing.assert_close(
        mine["last_hidden_state"][attended], theirs.last_hidden_state[attended], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(mine["pooler_output"], theirs.pooler_output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", export.FORMATS)
def test_an_export_loads_with_its_heads(tmp_path: Path, form: str) -> None:
    source = checkpoint(tmp_path, "cls")
    assert run_export(source, form, tmp_path / "out") == 0
    before, after = (Predictor.from_pretrained(f, device="cpu", precision="fp32") for f in (source, tmp_path / "out"))
    np.testing.assert_array_equal(before.encode(SENTENCES), after.encode(SENTENCES))
    shares = [model.predict("sentiment", SENTENCES).probabilities for model in (before, after)]
    np.testing.assert_array_equal(*shares)
    assert (after.pooling, after.max_length) == ("cls", 40)


@pytest.mark.parametrize(("pooling", "flag"), [("mean", "--normalize"), ("max", None), ("pooler", None), ("cls", None)])
def test_sentence_transformers_load_the_export_with_equal_embeddings(
    tmp_path: Path, pooling: str, flag: str | None
) -> None:
    library = pytest.importorskip("sentence_transformers")
    source = checkpoint(tmp_path, pooling)
    assert run_export(source, "sentence-transformers", tmp_path / "out", *([flag] if flag else [])) == 0
    theirs = library.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(SENTENCES)
    ours = Predictor.from_pretrained(tmp_path / "out", device="cpu", precision="fp32").encode(SENTENCES)
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-5)
    if flag:
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    else:
        direct = Predictor.from_pretrained(source, device="cpu", precision="fp32").encode(SENTENCES)
        np.testing.assert_allclose(ours, direct, rtol=1e-5, atol=1e-6)


def test_exports_use_the_names_of_the_oldest_supported_version(tmp_path: Path) -> None:
    """sentence-transformers 3.4 imports these module names and accepts only these keys."""
    assert run_export(checkpoint(tmp_path), "sentence-transformers", tmp_path / "out") == 0
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == ["Transformer", "Pooling"]
    assert {m["type"].rpartition(".")[0] for m in modules} == {"sentence_transformers.models"}
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling == {
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "word_embedding_dimension": 64,
    }
    assert json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())["max_seq_length"] == 40


def test_the_card_has_data_scores_recipe_and_versions(tmp_path: Path) -> None:
    assert run_export(checkpoint(tmp_path), "huggingface", tmp_path / "my-model") == 0
    card = (tmp_path / "my-model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for text in (
        "# my-model",
        "| sentiment accuracy | 0.2000 | 0.4321 |",
        "| score | - | - |",
        "1,234 steps",
        "gradient surgery (pcgrad)",
        "torch 2.99",
        'method = "pcgrad"',
        "| paraphrase | paraphrase | quora files |",
        "model.similarity(",
    ):
        assert text in card, text
    assert "`weights`" in card
    for name in ("README.md", "recipe.toml"):  # --push publishes these files
        assert "/somewhere" not in (tmp_path / "my-model" / name).read_text()
    recipe = Recipe.load(str(tmp_path / "my-model" / "recipe.toml"))
    assert (recipe.model.name, recipe.data.directory, recipe.data.max_length) == ("weights", "data", 40)
    assert recipe.data.files == {"sts": {"dev": "sts.csv"}}
    metadata = card.split("---")[1]
    assert "tags:\n- bert" in metadata


def test_an_encoder_without_heads_can_be_exported(tmp_path: Path) -> None:
    source = sample_directory().model
    assert run_export(source, "sentence-transformers", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "heads.safetensors").exists()
    assert Predictor.from_pretrained(tmp_path / "out").pooling == "mean"
    assert "Scores" not in (tmp_path / "out" / "README.md").read_text()


def test_export_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").touch()
    cases: list[tuple[Path, Path, tuple[str, ...], str]] = [
        (source, full, (), "not empty"),
        (source, source, ("--overwrite",), "is the checkpoint itself"),
        (tmp_path / "nowhere", tmp_path / "out", (), "no such file or directory"),
        (source, tmp_path / "out", ("--normalize",), "--normalize"),
        (source, tmp_path / "out", ("--private",), "--private needs --push"),
    ]
    for where, output, more, problem in cases:
        assert run_export(where, "huggingface", output, *more) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert error.count("\n") == 1
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]
    assert run_export(source, "huggingface", full, "--overwrite") == 0
    assert not (full / "thesis.txt").exists()


def test_push_uploads_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> Any:
            calls.append((name, options))
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path: Path, **options: Any) -> None:
            calls.append((str(options["repo_id"]), sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert run_export(checkpoint(tmp_path), "huggingface", tmp_path / "out", "--push", "me/it", "--private") == 0
    assert calls[0] == ("me/it", {"private": True, "exist_ok": True})
    assert {"README.md", "model.safetensors", "tokenizer.json", "heads.safetensors"} <= set(calls[1][1])

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Unauthorized\nmore of it")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    capsys.readouterr()
    assert run_export(tmp_path / "best", "huggingface", tmp_path / "again", "--push", "me/it") == 1
    error = capsys.readouterr().err
    assert "me/it: not uploaded (401 Unauthorized)" in error
    assert error.count("\n") == 1


def test_env_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(env.main, []) == 0
    text = capsys.readouterr().out
    assert cli.run(env.main, ["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    for name in ("minbert_fast", "python", "platform", "processor", "instruction set", "extension", "precision (auto)"):
        assert str(facts[name]) in text
