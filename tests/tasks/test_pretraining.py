# SPDX-License-Identifier: Apache-2.0
"""Further pre-training: losses against transformers, the tied embedding's gradient against fp64, whole runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minbert_fast import BertConfig, BertModel, evaluate
from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError, build
from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.data.buckets import Buckets
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.collate import Collator
from minbert_fast.data.sentences import Text, Tokens
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model import weights
from minbert_fast.model.weight_files import WeightsError
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.backends import make_step
from minbert_fast.step.captured import GraphedStep, at_capacity
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel, build_task, build_tasks
from minbert_fast.tasks.inference.predictor import Predictor
from minbert_fast.trainer.job import Options, train
from tests.small import read_records, small_data
from tests.step.test_graph import strangers
from tests.step.test_step import check_j

CONFIG = BertConfig(
    vocab_size=456, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=2,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")
FILES = {"sentiment": "ids-sst-train.csv", "paraphrase": "quora-train.csv", "similarity": "sts-train.csv"}
TASKS: dict[str, Any] = {"sentiment": {"dropout": 0.0}, "mlm": {"text": ["sentiment", "similarity"]}, "nsp": {}}
SIZES = {"sentiment": 4, "mlm": 6, "nsp": 3}
BUCKETS = Buckets(tokens=(256, 512), sentences=(24,), seqlen=(32,))


def recipe(method: str = "pcgrad", tasks: dict[str, Any] = TASKS) -> Recipe:
    return build(Recipe, {"tasks": tasks, "optimizer": {"lr": 1e-3}, "surgery": {"method": method}}, "test")


def make_model(chosen: Recipe) -> MultitaskModel:
    torch.manual_seed(0)
    return MultitaskModel(BertModel(CONFIG), build_tasks(chosen), chosen.model.pooling)


@pytest.fixture(scope="module")
def collator() -> Collator:
    tokenizer = Tokenizer.from_pretrained(sample_directory().model)
    folder = sample_directory().data
    found = {task: tokenize_table(read_table(folder / name, task), tokenizer) for task, name in FILES.items()}
    tasks = build_tasks(recipe())
    tables = {name: task.table([found[source.layout] for source in task.sources]) for name, task in tasks.items()}
    made = {name: task.example_generator(tokenizer, 5) for name, task in tasks.items()}
    generators = {name: generator for name, generator in made.items() if generator is not None}
    return Collator(tables, 32, {"nsp": "cross"}, generators=generators)


def batch_of(collator: Collator, step: int = 0, **sizes: int) -> MultitaskBatch:
    rows = {task: np.arange(10 * step, 10 * step + n) for task, n in (SIZES | sizes).items()}
    return collator(rows, step)


# ---- Against transformers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with BERT's encoder and both pre-training heads, written by transformers."""
    from transformers import BertForPreTraining

    torch.manual_seed(1)
    stock = BertForPreTraining(stock_config())
    with torch.no_grad():
        for p in stock.cls.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("pretrained")
    stock.save_pretrained(folder)
    return folder


def stock_config() -> Any:
    from transformers import BertConfig as StockConfig

    known = {key: value for key, value in vars(CONFIG).items() if key != "pad_token_id"}
    return StockConfig(**known, pad_token_id=CONFIG.pad_token_id)


def padded(batch: MultitaskBatch, task: str) -> tuple[dict[str, Tensor], Tensor]:
    """A task's sequences in the form of transformers, and its labels: [B, S] words (-100: ignored), or [B]."""
    index = batch.tasks.index(task)
    first, last = batch.packed.task_sentences[index : index + 2].tolist()
    offsets = batch.packed.cu_seqlens[first : last + 1].tolist()
    shape = (last - first, max(np.diff(offsets)))
    arguments = {
        key: torch.zeros(shape, dtype=torch.int64) for key in ("input_ids", "token_type_ids", "attention_mask")
    }
    words = torch.full((offsets[-1] - offsets[0],), -100)
    labels = batch.labels[task]
    if labels.dim() == 2:
        words[labels[:, 0]] = labels[:, 1]
    wanted = torch.full(shape, -100)
    for row in range(shape[0]):
        here = slice(offsets[row], offsets[row + 1])
        length = offsets[row + 1] - offsets[row]
        arguments["input_ids"][row, :length] = batch.packed.tokens[here]
        arguments["token_type_ids"][row, :length] = batch.packed.types[here]
        arguments["attention_mask"][row, :length] = 1
        wanted[row, :length] = words[offsets[row] - offsets[0] :][:length]
    return arguments, wanted if labels.dim() == 2 else labels


def test_losses_and_gradients_equal_transformers(pretrained: Path, collator: Collator) -> None:
    from transformers import BertForMaskedLM, BertForNextSentencePrediction

    batch = batch_of(collator, mlm=9, nsp=7)
    model = MultitaskModel(BertModel.from_pretrained(pretrained), build_tasks(recipe()), "mean")
    assert model.load_pretraining_heads(weights.pretraining_heads(pretrained), "here") == ["mlm", "nsp"]
    losses = model.losses(batch, model.encoder(batch.packed)["last_hidden_state"])
    for task, stock_class in (("mlm", BertForMaskedLM), ("nsp", BertForNextSentencePrediction)):
        stock = stock_class.from_pretrained(pretrained).eval()
        arguments, labels = padded(batch, task)
        expected = stock(**arguments, labels=labels).loss
        torch.testing.assert_close(losses[task], expected, atol=1e-5, rtol=1e-5)
        model.zero_grad()
        losses[task].backward(retain_graph=True)
        expected.backward()
        embeddings = stock.bert.embeddings.word_embeddings.weight.grad
        torch.testing.assert_close(model.encoder.word_embedding.weight.grad, embeddings, atol=1e-5, rtol=1e-4)
        for name, parameter in model.head(task).published_parameters().items():
            torch.testing.assert_close(parameter.grad, stock.get_parameter(name).grad, atol=1e-5, rtol=1e-4)


def test_an_incomplete_head_or_one_of_another_shape_is_refused(pretrained: Path) -> None:
    found = weights.pretraining_heads(pretrained)
    model = make_model(recipe())
    del found["cls.predictions.transform.dense.bias"]
    with pytest.raises(WeightsError, match=r"model: missing cls.predictions.transform.dense.bias"):
        model.load_pretraining_heads(found, "model")
    found = {key: tensor[:1] for key, tensor in weights.pretraining_heads(pretrained).items()}
    with pytest.raises(WeightsError, match="has shape"):
        model.load_pretraining_heads(found, "model")
    before = copy.deepcopy(model.state_dict())
    assert model.load_pretraining_heads({}, "model") == []
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_without_masked_words_the_loss_is_zero(collator: Collator) -> None:
    """Sentences without words: the loss is 0, not 0 / 0."""
    model = make_model(recipe())
    batch = batch_of(collator)
    batch.labels["mlm"][:, 1] = -100
    losses = model.losses(batch, model.encoder(batch.packed)["last_hidden_state"])
    assert losses["mlm"].item() == 0.0
    losses["mlm"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# ---- The tied embedding in the one-pass step --------------------------------------------------------------------------


def test_j_with_a_head_tied_to_the_word_embedding(collator: Collator) -> None:
    chosen = recipe()
    model = make_model(chosen)
    step = check_j(model, chosen, batch_of(collator))
    word = model.encoder.word_embedding.weight
    assert step.flat.words is None
    assert step.gradients.owns(word)
    assert model.heads["mlm"].words.weight is word
    assert step.gradients.view(word)[1].any(1).all()  # the softmax has a gradient for every word
    check_j(make_model(chosen), chosen, batch_of(collator, mlm=0))


def test_without_surgery_one_row_of_j_is_the_sum(collator: Collator) -> None:
    apart, together = recipe(), recipe("none")
    batch, rows = batch_of(collator), []
    for chosen in (apart, together):
        step = OnePassStep(make_model(chosen), chosen, torch.float32)
        step(batch, 0.0)
        rows.append(step.gradients.J.sum(0))
    torch.testing.assert_close(rows[1], rows[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["none", "pcgrad"])
def test_ten_steps_equal_the_naive_steps(method: str, collator: Collator) -> None:
    chosen = recipe(method)
    losses = []
    for backend in ("fast", "reference"):
        step = make_step(backend, make_model(chosen), chosen, torch.float32)  # type: ignore[arg-type]
        losses.append(torch.stack([step(batch_of(collator, index), 1.0).losses for index in range(10)]))
    torch.testing.assert_close(losses[0], losses[1], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("method", ["none", "pcgrad"])
def test_a_padded_batch_trains_like_the_exact_one(method: str, collator: Collator) -> None:
    chosen = recipe(method)
    room = Collator(collator.tables, 32, collator.encoders, BUCKETS, generators=collator.generators)
    bare, padded = (OnePassStep(make_model(chosen), chosen, torch.float32) for _ in range(2))
    for index in range(3):
        one = bare(batch_of(collator, index), 1.0)
        two = padded(at_capacity(batch_of(room, index)), 1.0)
        torch.testing.assert_close(two.losses, one.losses, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded.flat.data, bare.flat.data, atol=1e-6, rtol=1e-5)


def test_the_step_does_not_synchronise(collator: Collator, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("none", "pcgrad"):
        chosen = recipe(method)
        room = Collator(collator.tables, 32, collator.encoders, BUCKETS, generators=collator.generators)
        assert strangers(make_model(chosen), chosen, at_capacity(batch_of(room)), monkeypatch) == []


@pytest.mark.gpu
def test_graphs_train_like_the_eager_step(collator: Collator) -> None:
    chosen = recipe()
    room = Collator(collator.tables, 32, collator.encoders, BUCKETS, generators=collator.generators)
    model = make_model(chosen).cuda()
    eager = OnePassStep(copy.deepcopy(model), chosen, torch.float32)
    graphed = GraphedStep(OnePassStep(model, chosen, torch.float32))
    for index in range(6):
        batch = batch_of(room, index).to("cuda")
        assert torch.equal(eager(at_capacity(batch), 1.0).losses, graphed(batch, 1.0).losses)
    assert torch.equal(eager.flat.data, graphed.step.flat.data)


def test_the_encoder_is_saved_once(tmp_path: Path, collator: Collator) -> None:
    from safetensors.torch import load_file

    chosen = recipe()
    model = make_model(chosen)
    make_step("fast", model, chosen, torch.float32)(batch_of(collator), 1.0)
    model.save(tmp_path, chosen.to_toml())
    saved = load_file(tmp_path / "heads.safetensors")
    assert {key for key in saved if key.startswith("mlm.")} == {
        "mlm.bias", "mlm.dense.weight", "mlm.dense.bias", "mlm.norm.weight", "mlm.norm.bias"
    }  # fmt: skip
    loaded = MultitaskModel.load(tmp_path)
    assert loaded.heads["mlm"].words.weight is loaded.encoder.word_embedding.weight
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in loaded.state_dict().items())
    loaded.configure({"mlm": build_task("mlm", {"rate": 0.3})})
    assert loaded.head("mlm").options.rate == 0.3


def test_consecutive_lines_are_pairs_and_blank_lines_divide_documents() -> None:
    texts = Tokens.of([[1, 2], [3], [4, 5], [6]])
    lines = np.array([1, 2, 4, 5])  # line 3 is blank
    plain = TokenTable("text", Path("a.txt"), (texts,), None, Text.of([""] * 4), lines, (), "x")
    pairs = TokenTable("pairs", Path("b.tsv"), (texts, texts), None, Text.of([""] * 4), lines, (), "y")
    task = build_task("order", {"kind": "next-sentence", "data": ["a.txt", "b.tsv"]})
    assert [source.train for source in task.sources] == ["a.txt", "b.tsv"]
    table = task.table([plain, pairs])
    rows = [[sentence.tolist() for sentence in column] for column in table.columns]
    every = [[1, 2], [3], [4, 5], [6]]
    assert rows == [[[1, 2], [4, 5], *every], [[3], [6], *every]]
    assert [table.locate(row) for row in (0, 1, 2)] == ["a.txt:1", "a.txt:4", "b.tsv:1"]


# ---- Options and whole runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("mlm", {"text": ["nothing"]}, "'nothing': expected some of sentiment"),
        ("mlm", {"text": []}, "expected at least one data set"),
        ("mlm", {"rate": 0.0}, "rate = 0.0"),
        ("mlm", {"balanced": True}, "no classes"),
        ("mlm", {"pooling": "max"}, "predicted from token rows, without pooling"),
        ("nsp", {"text": ["sentiment"]}, "'sentiment' has no pairs"),
    ],
)
def test_errors_name_the_option(kind: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_task(kind, options)


def small_recipe(data: Path, **training: Any) -> Recipe:
    values = {
        "data": {"directory": str(data), "cache": str(data / "cache")},
        "training": {"batch_size": 8, "precision": "fp32", "epochs": 1, **training},
        "logging": {"every": 1},
        "optimizer": {"lr": 1e-3},
    }
    return Recipe.load("enhancing-mlm-nsp").with_values(values, "test")


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Interrupted in the pre-training stage, and again in the next one."""
    data = small_data(tmp_path / "data", train_rows=16)
    whole = train(small_recipe(data), Options(tmp_path / "whole", device="cpu"))
    for steps in (3, 11, None):  # of 10 steps in the first stage, and 2 in each of the others
        how = Options(tmp_path / "cut", device="cpu", resume=True, stop_after=steps)
        cut = train(small_recipe(data), how)
    for name in ("model.safetensors", "heads.safetensors"):
        assert (cut / "last" / name).read_bytes() == (whole / "last" / name).read_bytes(), name
    lines = read_records(whole)
    stages = {frozenset(key for key in line if key.startswith("loss/")) for line in lines if line["step"]}
    assert stages == {
        frozenset({"loss/mlm", "loss/nsp"}),
        frozenset({"loss/mlm"}),  # there are fewer pairs than sentences
        frozenset({"loss/sentiment"}),
        frozenset({"loss/paraphrase"}),
        frozenset({"loss/similarity"}),
    }
    # A pre-training task has no scores, and no command predicts with it.
    assert not [key for line in lines for key in line if key.startswith(("dev/mlm", "dev/nsp"))]
    assert set(Predictor.from_pretrained(cut / "last", device="cpu").tasks) == {"sentiment", "paraphrase", "similarity"}
    scores = tmp_path / "scores.json"
    arguments = ["--checkpoint", cut / "last", "--data", data, "--json", scores, "--device", "cpu"]
    assert cli.run(evaluate.main, [str(a) for a in arguments]) == 0
    assert "sentiment_accuracy" in json.loads(scores.read_text())


def test_early_stopping_applies_only_to_stages_with_dev_scores(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data", train_rows=32)
    chosen = small_recipe(data, patience=1, evaluate_every=1)
    output = train(chosen, Options(tmp_path / "run", device="cpu"))
    lines = read_records(output)
    taken = [sum(1 for line in lines if line["step"] and line["stage"] == stage) for stage in range(2)]
    assert taken[0] == 20  # 160 sentences in batches of 8
    assert taken[1] < 4


def test_pretraining_starts_from_published_heads_and_learns(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path / "data")
    model = tmp_path / "model"
    model.mkdir()
    for source in (pretrained, sample_directory().model):
        for path in source.iterdir():
            if source is pretrained or "token" in path.name or path.name == "vocab.txt":
                (model / path.name).write_bytes(path.read_bytes())
    # No other task trains, so there are no dev scores.
    base = small_recipe(data, epochs=5).with_values({"model": {"name": str(model)}}, "test")
    alone = {"tasks": {"mlm": {"rate": 0.3}}, "stages": ()}
    chosen = build(Recipe, {**vars(base), **alone}, "test")
    output = train(chosen, Options(tmp_path / "run", device="cpu"))
    assert "tasks.mlm starts from the model's own pre-training head" in capsys.readouterr().out
    lines = read_records(output)
    losses = [line["loss/mlm"] for line in lines if "loss/mlm" in line]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:5])
    assert (output / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize("asked", [{"r_drop": 1.0}, {"smart": 1.0, "proximal": 1.0}])
def test_regularisation_applies_only_to_labelled_tasks(asked: dict[str, float], tmp_path: Path) -> None:
    data = small_data(tmp_path / "data", train_rows=16)
    values = {"regularisation": asked, "data": {"scheme": "each-once"}}
    chosen = small_recipe(data).with_values(values, "test")
    together = {"sentiment": {}, "similarity": {}, "mlm": {}, "nsp": {}}
    chosen = build(Recipe, {**vars(chosen), "tasks": together, "stages": ()}, "test")
    output = train(chosen, Options(tmp_path / "run", device="cpu"))
    lines = read_records(output)
    losses = [{key for key in line if key.startswith("loss/")} for line in lines if line["step"]]
    assert losses[0] == {f"loss/{name}" for name in together}
    assert losses[-1] == {"loss/mlm"}  # the last steps have no duplicated examples
    assert json.loads((output / "summary.json").read_text())["skipped_steps"] == 0
