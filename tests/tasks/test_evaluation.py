# SPDX-License-Identifier: Apache-2.0
"""Evaluation on the sample data: one prediction per row in order, for any batch size; the command and its errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minbert_fast import BertModel
from minbert_fast.common.cli import run
from minbert_fast.common.device import choose_device, choose_precision
from minbert_fast.common.schema import ConfigError, build
from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.formats import find_tables
from minbert_fast.data.sentences import Tokens
from minbert_fast.evaluate import main
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel, build_tasks
from minbert_fast.tasks.base import build_task
from minbert_fast.tasks.inference import evaluation
from minbert_fast.tasks.inference.details import MAX_ERRORS, TaskResult, task_details
from minbert_fast.tasks.inference.evaluation import Evaluation, evaluate
from tests.small import read_predictions

ROWS = 40
RECIPE = build(Recipe, {"tasks": {"sentiment": {}, "paraphrase": {"encoder": "cross"}, "similarity": {}}}, "test")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the first rows of each dev file of the sample."""
    folder = tmp_path_factory.mktemp("data")
    for path in find_tables(sample_directory().data, "dev").paths.values():
        head = path.read_text(encoding="utf-8").splitlines(keepends=True)[: ROWS + 1]
        (folder / path.name).write_text("".join(head), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model() -> MultitaskModel:
    torch.manual_seed(0)
    return MultitaskModel(BertModel.from_pretrained(sample_directory().model), build_tasks(RECIPE)).eval()


@pytest.fixture(scope="module")
def tables(files: Path) -> dict:
    tokenizer = Tokenizer.from_pretrained(sample_directory().model)
    return {n: tokenize_table(read_table(p, n), tokenizer) for n, p in find_tables(files, "dev").paths.items()}


@pytest.fixture(scope="module")
def checkpoint(model: MultitaskModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "best"
    model.save(folder, RECIPE.to_toml(), Tokenizer.from_pretrained(sample_directory().model))
    return folder


def test_predictions_do_not_depend_on_the_batch_size(model, tables, monkeypatch):
    counted = []
    whole = evaluate(model, tables, progress=counted.append)
    monkeypatch.setitem(evaluation.TOKEN_BUDGET, "cpu", 100)
    small = evaluate(model, tables)
    assert sum(counted) == sum(map(len, tables.values())) == 3 * ROWS
    for name, result in whole.tasks.items():
        alone = small.tasks[name]
        np.testing.assert_allclose(result.predictions, alone.predictions, rtol=1e-4, atol=1e-5)
        assert result.ids == alone.ids
        assert len(np.unique(result.probabilities if name != "similarity" else result.predictions)) > ROWS // 4
    assert whole.metrics == pytest.approx(small.metrics)
    parts = whole.metrics["sentiment_accuracy"], whole.metrics["paraphrase_accuracy"]
    assert whole.score == pytest.approx((sum(parts) + (whole.metrics["similarity_pearson"] + 1) / 2) / 3)


def test_predictions_equal_the_heads_on_single_sentences(model, tables):
    """Row by row through the course's path: input_ids and mask, mean over tokens, the head's weights."""
    result = evaluate(model, {"sentiment": tables["sentiment"]}).tasks["sentiment"]
    head = model.heads["sentiment"]
    for row in range(5):
        ids = torch.from_numpy(np.array(tables["sentiment"].columns[0][row], dtype=np.int64))[None]
        with torch.no_grad():
            hidden = model.encoder(ids, torch.ones_like(ids))["last_hidden_state"]
            shares = head.output(hidden.mean(1)).softmax(-1)[0].numpy()
        np.testing.assert_allclose(result.probabilities[row], shares, rtol=1e-4, atol=1e-5)
        assert result.predictions[row] == shares.argmax()


def test_long_rows_are_cut_to_max_length(model, tables):
    """The last token, [SEP], stays."""
    result = evaluate(model, {"sentiment": tables["sentiment"]}, max_length=8).tasks["sentiment"]
    rows = [np.array(tables["sentiment"].columns[0][row], dtype=np.int64) for row in range(ROWS)]
    assert sum(len(row) > 8 for row in rows) > ROWS // 2
    for row, tokens in enumerate(rows[:8]):
        ids = torch.from_numpy(np.append(tokens[:7], tokens[-1]) if len(tokens) > 8 else tokens)[None]
        with torch.no_grad():
            hidden = model.encoder(ids, torch.ones_like(ids))["last_hidden_state"]
            shares = model.heads["sentiment"].output(hidden.mean(1)).softmax(-1)[0].numpy()
        np.testing.assert_allclose(result.probabilities[row], shares, rtol=1e-4, atol=1e-5)


def test_rows_are_cut_to_the_models_positions(model, tables):
    """Whatever `max_length` is."""
    tokens, positions = tables["sentiment"].columns[0], model.encoder.config.max_position_embeddings
    long = Tokens.of([np.resize(tokens.flat, positions + 30), *(tokens[row] for row in range(1, ROWS))])
    table = replace(tables["sentiment"], columns=(long,))
    expected = evaluate(model, {"sentiment": table}, max_length=positions).tasks["sentiment"]
    result = evaluate(model, {"sentiment": table}, max_length=positions + 20).tasks["sentiment"]
    np.testing.assert_array_equal(result.probabilities, expected.probabilities)


def test_a_cross_encoded_pair_is_one_sequence_of_two_types(model, tables):
    result = evaluate(model, {"paraphrase": tables["paraphrase"]}).tasks["paraphrase"]
    for row in range(5):
        first, second = (np.array(column[row], dtype=np.int64) for column in tables["paraphrase"].columns)
        ids = torch.from_numpy(np.concatenate([first, second[1:]]))[None]
        types = (torch.arange(ids.shape[1]) >= len(first)).long()[None]
        with torch.no_grad():
            hidden = model.encoder(ids, torch.ones_like(ids), types)["last_hidden_state"]
            share = model.heads["paraphrase"].output(hidden.mean(1)).sigmoid().item()
        np.testing.assert_allclose(result.probabilities[row], [1 - share, share], rtol=1e-4, atol=1e-5)


def test_a_class_name_with_a_line_break_is_written_on_one_line(tmp_path):
    task = build_task("topic", {"kind": "classification", "classes": ["good", "bad\nvery"]})
    result = TaskResult(task, ["a", "b"], None, np.array([1, 0]), None, {})
    Evaluation({"topic": result}).write_predictions(tmp_path)
    assert (tmp_path / "topic-dev-output.csv").read_text() == "id \t Predicted_topic \na , bad very \nb , good \n"


def test_two_tasks_do_not_write_one_prediction_file():
    """Regression: a task called sst and the preset sentiment both wrote sst-dev-output.csv."""
    tasks = {name: build_task(name, {"kind": "sentiment"}) for name in ("sentiment", "sst")}
    with pytest.raises(ConfigError, match="its prediction files would replace those of"):
        evaluation.check_prediction_files(tasks)
    evaluation.check_prediction_files(tasks | {"sst": build_task("sst", {"kind": "sentiment", "stem": "own"})})


def test_evaluation_does_not_change_the_model(model, tables):
    before = {key: t.clone() for key, t in model.state_dict().items()}
    expected = evaluate(model, tables)
    model.train()
    try:
        found = evaluate(model, tables)  # without dropout, in the middle of training
        assert model.training
        for name, result in expected.tasks.items():
            assert np.array_equal(found.tasks[name].predictions, result.predictions)
        assert found.metrics == expected.metrics
    finally:
        model.eval()
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_bf16_is_close_but_not_equal_to_fp32(model, tables):
    exact = evaluate(model, tables).tasks["similarity"].predictions
    rough = evaluate(model, tables, precision="bf16").tasks["similarity"].predictions
    assert 0 < np.abs(exact - rough).max() < 0.1


def test_written_files_contain_predictions_and_the_worst_errors(model, tables, files, tmp_path):
    result = evaluate(model, tables)
    texts = {n: read_table(p, n).sentences for n, p in find_tables(files, "dev").paths.items()}
    result.write(tmp_path, texts, train_labels={"sentiment": np.array([4, 0, 0]), "similarity": None})
    ids, values = read_predictions(tmp_path / "sts-dev-output.csv")
    assert ids == result.tasks["similarity"].ids
    np.testing.assert_allclose(values, result.tasks["similarity"].predictions, rtol=1e-6)
    details = json.loads((tmp_path / "details.json").read_text())
    sentiment = details["tasks"]["sentiment"]
    assert (sentiment["primary"], sentiment["classes"]) == (
        "sentiment_accuracy",
        list(model.tasks["sentiment"].class_names),
    )
    assert np.sum(sentiment["confusion"]) == ROWS
    assert np.trace(np.array(sentiment["confusion"])) == pytest.approx(ROWS * result.metrics["sentiment_accuracy"])
    assert sum(n for *_, n in sentiment["calibration"]["bins"]) == ROWS
    distribution = sentiment["distribution"]
    assert distribution["labels"] == np.sum(sentiment["confusion"], axis=1).tolist()
    assert distribution["predictions"] == np.sum(sentiment["confusion"], axis=0).tolist()
    assert distribution["train"] == [2, 0, 0, 0, 1]
    bins = details["tasks"]["similarity"]["distribution"]
    assert (len(bins["edges"]), sum(bins["labels"]), sum(bins["predictions"])) == (11, ROWS, ROWS)
    assert bins["train"] is None
    errors = details["tasks"]["similarity"]["worst"]
    assert [e["error"] for e in errors] == sorted((e["error"] for e in errors), reverse=True)
    first = errors[0]
    row = result.tasks["similarity"].ids.index(first["id"])
    assert first["sentences"] == [column[row] for column in texts["similarity"]]
    assert first["error"] == pytest.approx(abs(first["label"] - first["prediction"]), abs=1e-5)
    assert all(e["label"] != e["prediction"] for e in sentiment["worst"])


@pytest.mark.parametrize("name", ["sentiment", "paraphrase"])
def test_mistakes_are_sorted_by_confidence(model, tables, files, tmp_path, name):
    """Regression: they were sorted by the label's low probability, so that a hesitant mistake came before a sure one."""
    result = evaluate(model, {name: tables[name]}).tasks[name]
    path = find_tables(files, "dev").paths[name]
    worst = task_details(result, read_table(path, name).sentences)["worst"]
    sure = [e["probability"] for e in worst]
    assert sure == sorted(sure, reverse=True)
    rows = [result.ids.index(e["id"]) for e in worst]
    assert sure == pytest.approx(result.probabilities[rows].max(axis=1), abs=1e-6)
    wrong = np.flatnonzero(result.predictions != result.labels)
    assert set(rows) == set(wrong) if len(wrong) <= MAX_ERRORS else len(rows) == MAX_ERRORS
    truth = result.probabilities[rows, result.labels[rows].astype(int)]
    assert [e["error"] for e in worst] == pytest.approx(1 - truth, abs=1e-6)


def test_the_held_out_loss_is_the_mean_of_the_heads_loss(model, tables, monkeypatch):
    """Whatever the batches, and times the task's weight, as in training."""
    result = evaluate(model, tables)
    sentiment = result.tasks["sentiment"]
    shares = sentiment.probabilities[np.arange(ROWS), sentiment.labels.astype(int)]
    assert result.metrics["sentiment_loss"] == pytest.approx(-np.log(shares).mean(), rel=1e-5)
    scaled = result.tasks["similarity"].predictions / 5, result.tasks["similarity"].labels / 5
    assert result.metrics["similarity_loss"] == pytest.approx(np.mean((scaled[0] - scaled[1]) ** 2), rel=0.01)
    monkeypatch.setitem(evaluation.TOKEN_BUDGET, "cpu", 100)
    small = evaluate(model, tables).metrics
    assert small == pytest.approx(result.metrics)
    heavy = build_task("sentiment", {"weight": 3.0})
    monkeypatch.setitem(model.tasks, "sentiment", heavy)
    weighted = evaluate(model, {"sentiment": tables["sentiment"]}).metrics["sentiment_loss"]
    assert weighted == pytest.approx(3 * result.metrics["sentiment_loss"], rel=1e-5)
    unlabelled = replace(tables["sentiment"], labels=None)
    assert evaluate(model, {"sentiment": unlabelled}).metrics == {}


def test_details_of_several_labels_an_example(model):
    """Matrices [n, C] instead of columns: counts and calibration by label, mistakes with the surest wrong label first."""
    labels = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]])
    probabilities = np.array([[0.9, 0.2, 0.7], [0.6, 0.1, 0.3], [0.8, 0.05, 0.9], [0.1, 0.2, 0.8]])
    predictions = (probabilities >= 0.5).astype(int)
    task = model.tasks["sentiment"]
    result = TaskResult(task, list("abcd"), labels, predictions, probabilities, {})
    details = json.loads(json.dumps(task_details(result, [["A", "B", "C", "D"]], labels[:2])))
    assert details["distribution"] == {
        "edges": None, "train": [1, 0, 1], "train_rows": 2, "labels": [2, 1, 2], "predictions": [3, 0, 3]
    }  # fmt: skip
    assert "confusion" not in details
    assert sum(n for *_, n in details["calibration"]["bins"]) == 12
    assert [(e["id"], e["probability"]) for e in details["worst"]] == [("c", 0.95), ("b", 0.6)]
    assert details["worst"][0]["label"] == [1, 1, 0]


def test_every_task_of_ones_own_counts_in_the_score_whatever_its_name():
    """With a task called `sentiment`, its accuracy alone chose the best model, even if it had another `metric`."""

    def score(sentiment: dict, **others: float) -> float:
        tasks = {"sentiment": build_task("sentiment", sentiment)}
        tasks |= {
            n: build_task(n, {"kind": "classification", "classes": ["a", "b"], "data": f"{n}.csv"}) for n in others
        }
        found = {"sentiment": {"sentiment_accuracy": 0.9, "sentiment_macro_f1": 0.3}}
        found |= {name: {f"{name}_accuracy": value} for name, value in others.items()}
        return Evaluation(
            {n: TaskResult(task, [], None, np.empty(0), None, found[n]) for n, task in tasks.items()}
        ).score

    own = {"kind": "classification", "classes": ["a", "b"], "data": "mine.csv", "metric": "macro_f1"}
    assert score({}) == pytest.approx(0.9)  # the course's
    assert score(own) == pytest.approx(0.3)
    assert score(own, topic=0.5) == pytest.approx(0.4)
    assert score({}, topic=0.5) == pytest.approx(0.7)


def test_an_error_counts_with_a_minus_sign_in_the_score(model):
    """Regression: the epoch with the largest mean absolute error was the best one."""

    def of(mae: float) -> float:
        task = SimpleNamespace(preset="", sources=(), primary="price_mae")
        return Evaluation({"price": TaskResult(task, [], None, np.empty(0), None, {"price_mae": mae})}).score

    assert of(0.1) > of(0.5)
    assert of(0.5) == -0.5


def test_details_of_a_diverged_model_are_valid_json(model, tables):
    result = evaluate(model, {n: tables[n] for n in ("sentiment", "similarity")})
    nan = np.full_like(result.tasks["similarity"].predictions, np.nan)
    similarity = replace(result.tasks["similarity"], predictions=nan)
    sentiment = result.tasks["sentiment"]
    sentiment = replace(sentiment, probabilities=np.full_like(sentiment.probabilities, np.nan))
    for each in (similarity, sentiment):
        details = json.loads(json.dumps(task_details(each, None), allow_nan=False))
        assert "calibration" not in details
        assert sum(details["distribution"]["predictions"]) in (0, ROWS)


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_command_on_a_directory(checkpoint, files, tmp_path, capsys):
    arguments = ["--checkpoint", checkpoint, "--data", files, "--json", tmp_path / "s.json", "--output", tmp_path / "p"]
    assert run(main, [*map(str, arguments), "--precision", "fp32"]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    printed = capsys.readouterr().out
    assert f"{scores['score']:.4f}" in printed.splitlines()[-1]
    assert set(scores) >= {"sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson", "score"}
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        "sst-dev-output.csv", "para-dev-output.csv", "sts-dev-output.csv", "details.json",
    }  # fmt: skip


def test_a_directory_without_training_files_is_evaluated(checkpoint, files, tmp_path, capsys):
    """Regression: the command asked for training files; a missing dev file is named."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sts-dev.csv").write_bytes((files / "sts-dev.csv").read_bytes())
    assert run(main, ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "data")]) == 0
    captured = capsys.readouterr()
    assert "similarity_pearson" in captured.out
    assert captured.err.splitlines()[0] == "no dev rows for sentiment, paraphrase: left out"


def test_command_on_single_files_gives_the_same_scores(checkpoint, files, tmp_path, capsys):
    both = tmp_path / "both.json", tmp_path / "one.json"
    common = ["--checkpoint", str(checkpoint), "--precision", "fp32"]
    assert run(main, [*common, "--data", str(files), "--json", str(both[0])]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "score"
    assert run(main, [*common, "--similarity", str(files / "sts-dev.csv"), "--json", str(both[1])]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("of similarity only")  # not to be read as the course's
    whole, one = (json.loads(path.read_text()) for path in both)
    assert set(one) == {"similarity_pearson", "similarity_spearman", "similarity_loss", "score"}
    assert one["similarity_pearson"] == pytest.approx(whole["similarity_pearson"])


def test_errors_are_one_line_without_a_traceback(checkpoint, files, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("id\tsentence\n1\tgood\n")
    again = ["--task", "sentiment", "--input", files / "b.csv"]
    wrong = [
        ([], "--checkpoint"),
        (["--checkpoint", checkpoint, "--task", "sentiment"], "belong together"),
        (["--checkpoint", checkpoint, "--data", files, "--similarity", files / "sts-dev.csv"], "expected either"),
        (["--checkpoint", checkpoint, "--sentiment", files / "a.csv", *again], "--task sentiment has two files"),
        (["--checkpoint", tmp_path / "empty", "--data", files], "holds no recipe.toml"),
        (["--checkpoint", checkpoint.parent, "--data", files], f"its model is {checkpoint}"),
        (["--checkpoint", tmp_path / "nowhere", "--data", files], "nowhere"),
        (["--checkpoint", checkpoint, "--data", tmp_path / "empty"], "no dev rows for any of sentiment, paraphrase"),
        (["--checkpoint", checkpoint, "--data", tmp_path / "nowhere"], f"--data {tmp_path / 'nowhere'}: no such dir"),
        (["--checkpoint", checkpoint, "--sentiment", tmp_path / "bad.csv"], "bad.csv"),
        (["--checkpoint", checkpoint, "--sentiment", tmp_path / "none.csv"], "none.csv"),
        (["--checkpoint", checkpoint, "--data", files, "--device", "tpu"], "device 'tpu'"),
        (["--checkpoint", checkpoint, "--data", files, "--frob"], "--frob"),
    ]
    for arguments, message in wrong:
        assert run(main, list(map(str, arguments))) != 0
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.splitlines()) == 1
        assert "Traceback" not in captured.err


def test_scores_are_printed_even_if_their_file_cannot_be_written(checkpoint, files, tmp_path, capsys):
    """An evaluation of minutes ended with "Is a directory" and no scores."""
    assert run(main, ["--checkpoint", str(checkpoint), "--data", str(files), "--json", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "sentiment_accuracy" in captured.out
    assert captured.err.endswith(f"error: {tmp_path}: Is a directory\n")


def test_a_task_without_a_head_is_named(files, tmp_path, capsys):
    recipe = build(Recipe, {"tasks": {"similarity": {}}}, "test")
    small = MultitaskModel(BertModel.from_pretrained(sample_directory().model), build_tasks(recipe))
    small.save(tmp_path / "m", recipe.to_toml(), Tokenizer.from_pretrained(sample_directory().model))
    assert run(main, ["--checkpoint", str(tmp_path / "m"), "--sentiment", str(files / "ids-sst-dev.csv")]) == 2
    assert "this model has no sentiment head (it has similarity)" in capsys.readouterr().err


def test_devices_and_precisions():
    assert choose_device("cpu").type == "cpu"
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"
    assert choose_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
    for name in ("tpu", "meta", "cuda:999"):
        with pytest.raises(ConfigError, match="device"):
            choose_device(name)


@pytest.mark.parametrize(
    ("capability", "device", "precision"), [((6, 0), "cpu", None), ((7, 5), "cuda", "fp32"), ((9, 0), "cuda", "bf16")]
)
def test_old_gpus(
    capability: tuple[int, int], device: str, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4 trains in fp32. An older GPU is refused by name, and `auto` chooses the CPU instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_device("auto").type == device
    if precision is None:
        with pytest.raises(ConfigError, match=r"device 'cuda': compute capability 6\.0, expected 7\.5"):
            choose_device("cuda")
        return
    assert choose_precision("auto", choose_device("cuda")) == precision
    if precision == "fp32":
        with pytest.raises(ConfigError, match=r"precision 'bf16': expected fp32 or auto, compute capability 7\.5"):
            choose_precision("bf16", torch.device("cuda"))


@pytest.mark.slow
def test_real_weights_on_real_similarity_equal_transformers(minilm: Path, shared_data: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    recipe = build(Recipe, {"tasks": {"similarity": {}}}, "test")
    model = MultitaskModel(BertModel.from_pretrained(minilm), build_tasks(recipe))
    lines = (shared_data / "sts-dev.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "sts-dev.csv").write_text("".join(lines[:151]), encoding="utf-8")
    source = read_table(tmp_path / "sts-dev.csv", "similarity")
    table = tokenize_table(source, Tokenizer.from_pretrained(minilm))
    result = evaluate(model, {"similarity": table}).tasks["similarity"]

    stock = transformers.AutoModel.from_pretrained(minilm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    for row in range(0, len(source), 10):
        encoded = tokenizer([column[row] for column in source.sentences], padding=True, return_tensors="pt")
        mask = encoded["attention_mask"][:, :, None]
        with torch.no_grad():
            u, v = (stock(**encoded).last_hidden_state * mask).sum(1) / mask.sum(1)
        expected = 5 * torch.cosine_similarity(u, v, dim=0).clamp(min=0).item()
        assert result.predictions[row] == pytest.approx(expected, abs=1e-4)
    assert result.metrics["similarity_pearson"] > 0.7  # without training
