# SPDX-License-Identifier: Apache-2.0
"""Exported models give equal outputs in transformers, sentence-transformers, onnxruntime and Predictor; cards; `env`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

from minbert_fast import BertModel, Predictor, encode, env, export
from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError, build
from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel, build_tasks
from minbert_fast.tasks.exporting.onnx_model import OnnxModel
from tests.small import error_line
from tests.tolerance import cosine_rows

pytestmark = pytest.mark.usefixtures("one_thread")
SENTENCES = ["a film", "the girl eats an apple in the park", "a very good film, " * 60]
SUMMARY = {
    "dev": {"sentiment_accuracy": 0.4321, "score": None},
    "untrained": {"sentiment_accuracy": 0.2},
    "steps": 1234,
    "tokens": 56789,
    "versions": {"torch": "2.99"},
}


def checkpoint(folder: Path, pooling: str = "mean", tasks: Mapping[str, Any] | None = None, layers: int = 2) -> Path:
    """A model with the heads of `tasks` (None: those of the course), with weights that give decided predictions."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        **({} if tasks is None else {"tasks": tasks}),
        "model": {"pooling": pooling, "name": "/somewhere/weights"},
        "data": {"max_length": 40, "directory": "/somewhere/data", "files": {"sts": {"dev": "/somewhere/sts.csv"}}},
        "surgery": {"method": "pcgrad"},
    }
    recipe = build(Recipe, values, "test")
    encoder = BertModel.from_pretrained(sample_directory().model)
    encoder.bert_layers = encoder.bert_layers[:layers]
    model = MultitaskModel(encoder, build_tasks(recipe), recipe.model.pooling)
    for parameter in model.head_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name in model.tasks:
        stored = model.head(name).labelled_sentences()
        if stored is not None:
            stored.store(torch.randn_like(stored.vectors), torch.arange(len(stored.labels)) % stored.classes)
    model.save(folder / "best", recipe.to_toml(), Tokenizer.from_pretrained(sample_directory().model))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
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


@pytest.mark.parametrize("form", ["huggingface", "sentence-transformers"])
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
        "| paraphrase | paraphrase | quora |",
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


# ---- Heads as classifiers of transformers --------------------------------------------------------------------------------

PAIRS = list(zip(SENTENCES, SENTENCES[::-1], strict=True))
CLASSIFIERS: Mapping[str, Any] = {
    "sentiment": {},
    "paraphrase": {"encoder": "cross"},
    "tags": {"kind": "multilabel", "data": "tags.csv", "classes": ["sad", "long", "new"]},
    "stars": {"kind": "regression", "data": "stars.csv", "found_range": [1, 5]},
    "firm": {"kind": "paraphrase", "encoder": "cross", "threshold": 0.9},
    "bounded": {"kind": "regression", "data": "stars.csv", "range": [1, 5]},
    "stack": {"kind": "sentiment", "shared_layers": "both"},
    "deep": {"kind": "sentiment", "extra_layers": 1, "pooling": "cls"},
    "ordered": {"kind": "sentiment", "loss": "ordinal"},
}


def blocks(folder: Path) -> list[str]:
    """The code in an exported card."""
    return re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.S | re.M)


@pytest.mark.parametrize("pooling", ["cls", "pooler"])
def test_transformers_classify_with_the_heads_names_and_probabilities(
    tmp_path: Path, pooling: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path, pooling, CLASSIFIERS)
    ours = Predictor.from_pretrained(source, device="cpu", precision="fp32")
    monkeypatch.chdir(tmp_path)
    for task in ("sentiment", "paraphrase", "tags", "stars"):
        found = ours.predict(task, PAIRS if task == "paraphrase" else SENTENCES)
        expected = found.values[:, None] if task == "stars" else found.probabilities
        assert expected is not None
        assert run_export(source, "huggingface", tmp_path / task, "--task", task) == 0
        stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / task).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / task)
        assert type(stock).__name__.startswith("DebertaV2" if pooling == "cls" else "Bert")
        columns = ([a for a, _ in PAIRS], [b for _, b in PAIRS]) if task == "paraphrase" else (SENTENCES,)
        batch = tokenizer(*columns, padding=True, truncation=True, return_tensors="pt")
        assert batch["input_ids"].shape[1] == 40  # the recipe's max_length
        with torch.no_grad():
            scores = stock(**batch).logits
        got = scores.softmax(-1) if len(scores[0]) in (2, 5) else scores.sigmoid() if task == "tags" else scores
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-6, rtol=1e-5)

        pipe = transformers.pipeline("text-classification", model=str(tmp_path / task), device="cpu")
        inputs = [{"text": a, "text_pair": b} for a, b in PAIRS] if task == "paraphrase" else SENTENCES
        names = ours.tasks[task].class_names or (task,)
        for results, shares in zip(pipe(inputs, top_k=None, truncation=True, batch_size=2), expected, strict=True):
            assert {each["label"] for each in results} == set(names)
            for each in results:
                assert each["score"] == pytest.approx(shares[names.index(each["label"])], abs=2e-6, rel=1e-5)
        exec(blocks(tmp_path / task)[0], {})
        assert "Debert" in (tmp_path / task / "README.md").read_text() or pooling == "pooler"
    capsys.readouterr()
    assert run_export(source, "huggingface", tmp_path / "firm", "--task", "firm") == 0
    assert "decides at a threshold of its own" in capsys.readouterr().out
    for task in ("bounded", "stack", "ordered", *(["deep"] if pooling == "cls" else [])):  # transformers has no class
        assert run_export(source, "huggingface", tmp_path / "refused", "--task", task) == 2
        error = capsys.readouterr().err
        reason = (
            "neither the softmax nor the sigmoid of its scores"
            if task == "ordered"
            else "not linear in the pooled vector"
        )
        assert f"{reason}; use --format onnx" in error
        assert error.count("\n") == 1
        assert not (tmp_path / "refused").exists()


# ---- ONNX ------------------------------------------------------------------------------------------------------------

HEADS: Mapping[str, Any] = {
    "all": {"kind": "paraphrase", "features": ["u", "v", "abs_diff", "product", "cosine"], "loss": "cross_entropy"},
    "paraphrase": {"encoder": "cross"},
    "similarity": {"encoder": "both"},
    "cosine": {"kind": "similarity", "project": 24, "loss": "cosent", "calibrated": True},
    "sentiment": {"shared_layers": "both", "pooling": "pooler"},
    "deep": {"kind": "sentiment", "extra_layers": 1, "pooling": "max"},
    "near": {"kind": "sentiment", "neighbours": 3, "nearest": 2},
    "tags": {"kind": "multilabel", "data": "tags.csv", "classes": ["sad", "long", "new"]},
    "stars": {"kind": "regression", "data": "stars.csv", "range": [1, 5], "loss": "ordinal"},
    "nli": {},
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: torch takes seconds to trace each."""
    return checkpoint(tmp_path_factory.mktemp("heads"), "mean", HEADS, layers=1)


@pytest.mark.ci
@pytest.mark.parametrize(  # each export takes seconds: the heads that differ most, then the others
    "task",
    [pytest.param(n, marks=() if n in ("all", "similarity", "near", "tags") else pytest.mark.slow) for n in HEADS],
)
def test_onnxruntime_predicts_as_every_kind_of_head_does(
    heads: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    assert run_export(heads, "onnx", tmp_path / "out", "--task", task) == 0
    ours = Predictor.from_pretrained(heads, device="cpu", precision="fp32")
    texts = [*SENTENCES, "", "is it", "no, it is not", "yes " * 90]
    columns = [texts[shift:] + texts[:shift] for shift in range(ours.tasks[task].num_texts)]
    expected = ours.predict(task, *columns)
    graph = OnnxModel.from_pretrained(tmp_path / "out", device="cpu")
    values, shares = graph.predict(*columns)
    np.testing.assert_allclose(values, expected.values, rtol=1e-4, atol=1e-5)
    if expected.probabilities is None:
        assert shares is None
    else:
        assert shares is not None
        np.testing.assert_allclose(shares, expected.probabilities, atol=1e-5)
    for none in (graph.predict(*([] for _ in columns)), ours.predict(task, *([] for _ in columns))):
        for empty, full in zip(none, expected, strict=True):  # a server's batch without texts keeps its columns
            assert (empty is None) == (full is None)
            assert full is None or (empty.shape == (0, *full.shape[1:]) and empty.dtype == full.dtype)
    with pytest.raises(ValueError, match="lists of sentences"):
        graph.predict(*("a film" for _ in columns))

    monkeypatch.chdir(tmp_path)  # the card's own code, with onnxruntime and tokenizers alone
    plain: dict[str, Any] = {}
    for block in blocks(tmp_path / "out"):
        exec(block, plain)
    names = {1: ("sentences",), 2: ("firsts", "seconds"), 3: ("firsts", "seconds", "thirds")}[len(columns)]
    expected = ours.predict(task, *(plain[name] for name in names))
    np.testing.assert_allclose(plain["prediction"], expected.values, rtol=1e-4, atol=1e-5)
    if expected.probabilities is not None:
        np.testing.assert_allclose(plain["probabilities"], expected.probabilities, atol=1e-5)


def test_an_onnx_encoder_gives_the_same_vectors_here_and_in_the_encode_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    source = checkpoint(tmp_path, "mean", layers=1)
    out = tmp_path / "graph"
    assert run_export(source, "onnx", out, "--normalize") == 0
    assert "On 6 sentences its vectors are at most" in capsys.readouterr().out
    texts = [" ".join(sentence.split()) for sentence in (*SENTENCES, "is it", "no, it is not")]
    expected = Predictor.from_pretrained(source, device="cpu", precision="fp32").encode(texts, normalize=True)
    graph = OnnxModel.from_pretrained(out)
    np.testing.assert_allclose(graph.encode(texts), expected, atol=2e-6)
    assert graph.encode([]).shape == (0, 64)
    np.testing.assert_array_equal(graph.encode(texts[1]), graph.encode(texts[1:2])[0])
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.npy")]
    assert cli.run(encode.main, ["--onnx", str(out), *files]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), graph.encode(texts))

    monkeypatch.chdir(tmp_path)
    plain: dict[str, Any] = {}
    exec(blocks(out)[0], plain)
    np.testing.assert_allclose(plain["embeddings"], graph.encode(plain["sentences"]), atol=2e-6)
    shapes = {each.name: each.shape for each in (*plain["session"].get_inputs(), *plain["session"].get_outputs())}
    assert shapes["input_ids"] == ["n", "length"]
    assert shapes["last_hidden_state"] == ["n", "length", 64]
    hidden, vectors = plain["session"].run(["last_hidden_state", "sentence_embedding"], plain["feed"])
    mask = plain["feed"]["attention_mask"][:, :, None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(vectors, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=2e-6)

    capsys.readouterr()
    for more, problem in (
        (["--onnx", str(out), "--pooling", "cls"], "the graph pools with mean"),
        (["--onnx", str(out), "--no-normalize"], "export it with --no-normalize"),
        (["--onnx", str(out), "--precision", "bf16"], "an ONNX graph has its own"),
        (["--onnx", str(source)], "no such file; export --format onnx writes it"),
        (["--onnx", str(out), "--model", str(source)], "not allowed with argument"),
        (["--onnx", str(out), "--device", "tpu"], "expected auto, cpu or cuda"),
    ):
        assert cli.run(encode.main, [*more, *files]) == 2
        assert problem in error_line(capsys)
    with pytest.raises(ConfigError, match="export the model with --task NAME"):
        graph.predict(texts)


@pytest.mark.slow
def test_int8_is_a_quarter_of_the_size_and_says_how_far_it_is(tmp_path: Path, minilm: Path) -> None:
    """On real weights: those of random layers say nothing about the loss."""
    pytest.importorskip("onnxscript")
    assert run_export(minilm, "onnx", tmp_path / "fp32") == 0
    assert run_export(minilm, "onnx", tmp_path / "int8", "--int8") == 0
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("fp32", "int8")]
    assert sizes[1] < 0.3 * sizes[0]
    expected = Predictor.from_pretrained(minilm, device="cpu", precision="fp32").encode(SENTENCES)
    graph = OnnxModel.from_pretrained(tmp_path / "int8")
    assert graph.contents.int8
    assert cosine_rows(graph.encode(SENTENCES), expected).min() > 0.97
    np.testing.assert_allclose(OnnxModel.from_pretrained(tmp_path / "fp32").encode(SENTENCES), expected, atol=1e-5)
    assert "its vectors with 8-bit weights are at most" in (tmp_path / "int8" / "README.md").read_text()


def test_without_the_libraries_of_onnx_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run_export(sample_directory().model, "onnx", tmp_path / "out") == 2
    assert "ONNX needs onnxruntime: pip install 'minbert-fast[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
        (source, source.parent, ("--overwrite",), "holds the checkpoint"),
        (tmp_path / "nowhere", tmp_path / "out", (), "no such file or directory"),
        (source, tmp_path / "out", ("--normalize",), "--normalize"),
        (source, tmp_path / "out", ("--private",), "--private needs --push"),
        (source, tmp_path / "out", ("--int8",), "--int8 needs --format onnx"),
        (
            source,
            tmp_path / "out",
            ("--task", "polarity"),
            "no polarity head (it has sentiment, paraphrase, similarity)",
        ),
        (
            source,
            tmp_path / "out",
            ("--task", "sentiment"),
            'the first token alone (pooling "cls" or "pooler"), not "mean"',
        ),
        (source, tmp_path / "out", ("--task", "similarity"), "reads 2 sequences, a classifier of transformers one"),
        (sample_directory().model, tmp_path / "out", ("--task", "sentiment"), "this model has no heads"),
    ]
    for where, output, more, problem in cases:
        assert run_export(where, "huggingface", output, *more) == 2
        assert problem in error_line(capsys)
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]
    assert run_export(source, "sentence-transformers", tmp_path / "out", "--task", "sentiment") == 2
    assert "a SentenceTransformer has no heads" in capsys.readouterr().err
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
    assert "me/it: not uploaded (401 Unauthorized)" in error_line(capsys)


def test_env_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(env.main, []) == 0
    text = capsys.readouterr().out
    assert cli.run(env.main, ["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    for name in ("minbert_fast", "python", "platform", "processor", "instruction set", "extension", "precision (auto)"):
        assert str(facts[name]) in text
