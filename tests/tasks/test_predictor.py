# SPDX-License-Identifier: Apache-2.0
"""`Predictor`: heads load with the model, pooling as the directory says, search, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minbert_fast import BertModel, Predictor
from minbert_fast.common.schema import ConfigError, build
from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.formats import find_tables
from minbert_fast.model.sentence_modules import SentenceModules, read, write
from minbert_fast.model.snapshot import Snapshot
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel, build_task, build_tasks
from minbert_fast.tasks.inference.evaluation import evaluate
from minbert_fast.tasks.inference.forms import frame_columns
from minbert_fast.tasks.inference.index import Index
from minbert_fast.tasks.inference.sentence_vectors import encode
from tests.tolerance import cosine_rows

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = build(
    Recipe,
    {
        "model": {"pooling": "cls"},
        "tasks": {
            "sentiment": {},
            "paraphrase": {"encoder": "cross"},
            "alike": {"kind": "similarity", "encoder": "both"},
        },
    },
    "test",
)
SENTENCES = ["a film", "the girl eats an apple in the park", "", "a very good film"]
PAIRS = list(zip(SENTENCES, SENTENCES[::-1], strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "best"
    model = MultitaskModel(BertModel.from_pretrained(sample_directory().model), build_tasks(RECIPE), "cls")
    model.save(folder, RECIPE.to_toml(), Tokenizer.from_pretrained(sample_directory().model))
    return folder


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor.from_pretrained(checkpoint, device="cpu", precision="fp32")


def test_heads_predict_as_the_evaluation_does(predictor: Predictor, checkpoint: Path):
    model = MultitaskModel.load(checkpoint)
    paths = find_tables(sample_directory().data, "dev").paths
    named = {"sentiment": "sentiment", "paraphrase": "paraphrase", "alike": "similarity"}
    for task, dataset in named.items():
        table = read_table(paths[dataset], dataset)
        expected = evaluate(model, {task: tokenize_table(table, predictor.tokenizer)}).tasks[task]
        got = predictor.predict(task, *table.sentences)
        np.testing.assert_array_equal(got.values, expected.predictions)
        if expected.probabilities is not None:
            np.testing.assert_array_equal(got.probabilities, expected.probabilities)


def test_the_three_tasks_by_name(predictor: Predictor):
    stars, same, alike = predictor.sentiment(SENTENCES), predictor.paraphrase(PAIRS), predictor.similarity(PAIRS)
    assert stars.shape == same.shape == alike.shape == (4,)
    assert set(stars.tolist()) <= set(range(5))
    assert set(same.tolist()) <= {0.0, 1.0}
    assert (alike >= 0).all()
    assert (alike <= 5).all()
    assert predictor.similarity([("a film", "a film")])[0] == pytest.approx(5.0, abs=1e-3)
    np.testing.assert_array_equal(predictor.similarity([list(pair) for pair in PAIRS]), alike)


def test_nothing_in_gives_nothing_out(predictor: Predictor):
    assert predictor.sentiment([]).shape == (0,)
    assert predictor.similarity([]).shape == (0,)
    assert predictor.encode([]).shape == (0, 64)
    assert predictor.search("a film", []) == []


def test_pooling_is_the_trained_models_own(predictor: Predictor):
    expected = encode(Snapshot(predictor.encoder, torch.float32), SENTENCES, predictor.tokenizer, pooling="cls")
    np.testing.assert_array_equal(predictor.encode(SENTENCES), expected)
    mean = encode(Snapshot(predictor.encoder, torch.float32), SENTENCES, predictor.tokenizer, pooling="mean")
    np.testing.assert_array_equal(predictor.encode(SENTENCES, pooling="mean"), mean)


def test_a_length_without_room_for_a_word_is_refused(predictor: Predictor):
    """0 meant the model's own length."""
    for length in (0, 1):
        with pytest.raises(ValueError, match=f"max_length is {length}, expected at least 2"):
            Predictor(predictor.encoder, predictor.tokenizer, max_length=length)


def test_an_encoder_alone_encodes_by_the_mean_and_has_no_heads():
    alone = Predictor.from_pretrained(sample_directory().model, device="cpu", precision="fp32")
    expected = encode(Snapshot(alone.encoder, torch.float32), SENTENCES, alone.tokenizer)
    np.testing.assert_array_equal(alone.encode(SENTENCES), expected)
    with pytest.raises(ConfigError, match="no heads"):
        alone.sentiment(SENTENCES)


def test_what_is_no_string_is_named(predictor: Predictor):
    for ask in (predictor.encode, predictor.sentiment):
        with pytest.raises(ValueError, match="sentence 1 is None, expected a string"):
            ask(["a film", None])
        # JSON may hold half a character: the word-piece library raised "TextEncodeInput must be Union[...]".
        with pytest.raises(ValueError, match=r"sentence 1 has half a surrogate pair: 'a \\ud800'"):
            ask(["a film", "a \ud800"])
        for value in (None, 3, b"a film"):
            with pytest.raises(ValueError, match=r"takes (lists of )?sentences, not (None|3|b'a film')$"):
                ask(value)


def test_search_finds_the_sentence_itself_first(predictor: Predictor):
    corpus = read_table(sample_directory().data / "ids-sst-dev.csv", "sentiment").sentences[0]
    index = predictor.index(corpus)
    hits = predictor.search(corpus[17], index, top=5)
    assert hits[0].text == corpus[17]
    assert hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    scores = predictor.encode(corpus, normalize=True) @ predictor.encode([corpus[17]], normalize=True)[0]
    assert {hit.row for hit in hits[1:]} <= set(np.argsort(-scores)[:8].tolist())
    assert predictor.search(corpus[17], corpus[:3], top=9)[0].row in range(3)
    assert len(predictor.search("a", corpus[:3], top=9)) == 3
    for top in (-1, 2.0):
        with pytest.raises(ValueError, match=f"top is {top}, expected a whole number, 0 or more"):
            predictor.search("a", corpus[:3], top=top)


def test_search_prefers_the_earlier_of_equal_sentences():
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    vectors = np.tile(rows / np.linalg.norm(rows, axis=1, keepdims=True), (20, 1))
    index = Index([str(row) for row in range(1000)], vectors)
    found = index.nearest(vectors[:50], 3)
    assert [[hit.row for hit in hits] for hits in found] == [[row, row + 50, row + 100] for row in range(50)]
    assert index.nearest(vectors[:2], 0) == [[], []]


def test_a_corpus_is_a_list_of_sentences(predictor: Predictor):
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="not a string"):  # its items are letters
        predictor.search("a film", "a film and another")
    with pytest.raises(ValueError, match="not a DataFrame"):  # its items are names of columns
        predictor.index(pandas.DataFrame({"text": SENTENCES}))


# ---- Forms of input and output ---------------------------------------------------------------------------------------


def test_one_line_says_what_a_model_and_an_index_are(predictor: Predictor) -> None:
    assert repr(predictor) == (
        "Predictor(BERT of 2 layers, 64 wide, 456 words; tasks sentiment, paraphrase, alike; cls pooling; cpu, fp32)"
    )
    alone = Predictor(predictor.encoder, predictor.tokenizer, normalize=True)
    assert "; no heads; mean pooling, normalized; cpu" in repr(alone)
    assert repr(predictor.index(SENTENCES)) == "Index(4 sentences, vectors of 64)"


def test_one_sentence_gives_one_vector(predictor: Predictor) -> None:
    one = predictor.encode("a film", normalize=True)
    assert one.shape == (64,)
    np.testing.assert_array_equal(one, predictor.encode(["a film"], normalize=True)[0])
    np.testing.assert_array_equal(predictor.encode(iter(SENTENCES)), predictor.encode(SENTENCES))


def test_predict_takes_pairs_as_the_named_methods_do(predictor: Predictor) -> None:
    firsts, seconds = map(list, zip(*PAIRS, strict=True))
    apart = predictor.predict("alike", firsts, seconds)
    for pairs in (PAIRS, [list(pair) for pair in PAIRS]):
        np.testing.assert_array_equal(predictor.predict("alike", pairs).values, apart.values)
    np.testing.assert_array_equal(predictor.similarity(PAIRS), apart.values)
    assert predictor.predict("alike", []).values.shape == (0,)


def test_probabilities_alone(predictor: Predictor) -> None:
    for task, examples in (("sentiment", SENTENCES), ("paraphrase", PAIRS)):
        shares = predictor.predict(task, examples, probabilities=True)
        np.testing.assert_array_equal(shares, predictor.predict(task, examples).probabilities)
        assert shares.shape == (4, len(predictor.tasks[task].class_names or ()))
        np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
        assert predictor.predict(task, [], probabilities=True).shape == (0, shares.shape[1])


def test_a_data_frame_in_and_a_data_frame_out(predictor: Predictor) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"review": SENTENCES, "other": SENTENCES[::-1], "id": range(4)}, index=[7, 3, 9, 1])
    found = predictor.predict("sentiment", frame, text="review")
    expected = predictor.predict("sentiment", SENTENCES)
    names = predictor.tasks["sentiment"].class_names
    assert names is not None
    assert list(found.columns) == ["prediction", *(f"probability_{name}" for name in names)]
    assert list(found.index) == [7, 3, 9, 1]
    assert found["prediction"].tolist() == predictor.tasks["sentiment"].as_labels(expected.values)
    np.testing.assert_array_equal(found.iloc[:, 1:].to_numpy(), expected.probabilities)
    assert list(frame.join(found)["review"]) == SENTENCES

    pairs = predictor.predict("alike", frame, text=("review", "other"))
    np.testing.assert_array_equal(pairs["prediction"], predictor.predict("alike", PAIRS).values)
    usual = frame.rename(columns={"review": "sentence1", "other": "sentence2"})
    pandas.testing.assert_frame_equal(predictor.predict("alike", usual), pairs)
    usual = frame.rename(columns={"review": "question1", "other": "question2"})  # as in a file; these were not found
    pandas.testing.assert_frame_equal(predictor.predict("alike", usual), pairs)
    both = frame.rename(columns={"review": "text", "other": "sentence"})  # a file's text goes before its sentence
    pandas.testing.assert_frame_equal(predictor.predict("sentiment", both), found)
    alone = predictor.predict("paraphrase", usual, probabilities=True)
    assert list(alone.columns) == ["probability_different", "probability_paraphrase"]
    np.testing.assert_array_equal(predictor.encode(frame["review"]), predictor.encode(SENTENCES))
    assert predictor.search("a film", predictor.index(frame["review"]), top=1)[0].text == "a film"
    assert predictor.predict("sentiment", frame[:0], text="review").shape == (0, 6)

    for call, problem in (
        (lambda: predictor.predict("sentiment", frame), r"name them as text=... \(there are review, other, id\)"),
        (lambda: predictor.predict("alike", frame, text="review"), "takes 2 columns, text names 1"),
        (lambda: predictor.predict("sentiment", frame, text="body"), "no column 'body'"),
        (lambda: predictor.predict("sentiment", frame, text="id"), "sentence 0 is 0, expected a string"),
        (lambda: predictor.sentiment(frame), r"call predict\('sentiment', frame, text=...\)"),
        (lambda: predictor.encode(frame), "pass one of its columns"),
    ):
        with pytest.raises(ValueError, match=problem):
            call()


def test_a_data_frame_has_the_columns_of_the_training_file() -> None:
    """Before the usual names."""
    pandas = pytest.importorskip("pandas")
    data = {"train": "topics.csv", "text": "body"}
    task = build_task("topic", {"kind": "classification", "classes": ["a", "b"], "data": data})
    frame = pandas.DataFrame({"text": ["wrong"], "body": ["right"]})
    assert frame_columns(task, frame, None) == (["right"],)


@pytest.mark.ci
def test_slow_libraries_are_imported_by_nobody_but_the_user() -> None:
    """Models of shapes alone were made by torch.compile's code and sympy, whose imports took 1.6 s in each command."""
    code = "import sys, minbert_fast; minbert_fast.BertModel.from_pretrained(sys.argv[1])\n"
    code += "print(*sys.modules.keys() & {'pandas', 'sympy', 'torch._dynamo', 'transformers'}, end='')"
    command = [sys.executable, "-c", code, str(sample_directory().model)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_a_progress_bar_counts_to_the_end(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []

    class Bar:
        def __init__(self, total: int, unit: str) -> None:
            self.total, self.unit, self.count = total, unit, 0
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: int) -> None:
            self.count += count

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    predictor.encode(SENTENCES, progress=True)
    predictor.index(SENTENCES, progress=True)
    predictor.predict("alike", PAIRS, progress=True)
    assert [(bar.count, bar.total, bar.unit) for bar in bars] == [
        (4, 4, " sentences"),
        (4, 4, " sentences"),
        (4, 4, " examples"),
    ]
    predictor.encode(SENTENCES, progress=False)
    assert len(bars) == 3


# ---- Directories in sentence-transformers' form -----------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "pooler"])
@pytest.mark.parametrize("normalize", [False, True])
def test_modules_survive_the_round_trip(tmp_path: Path, pooling, normalize):
    pooler = {"weight": torch.randn(8, 8), "bias": torch.randn(8)} if pooling == "pooler" else None
    before = SentenceModules(tmp_path, pooling, normalize, 77, "query: ", pooler)
    write(tmp_path, before, 8)
    after = read(tmp_path)
    assert after is not None
    assert (after.pooling, after.normalize, after.max_length, after.prompt) == (pooling, normalize, 77, "query: ")
    if pooler is not None:
        assert after.pooler is not None
        assert all(torch.equal(after.pooler[name], tensor) for name, tensor in pooler.items())


def test_a_pooling_that_says_nothing_is_the_mean(tmp_path: Path):
    """As in sentence-transformers."""
    write(tmp_path, SentenceModules(tmp_path, "cls"), 8)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    found = read(tmp_path)
    assert found is not None
    assert found.pooling == "mean"


@pytest.mark.ci
def test_real_sentence_transformers_give_the_same_vectors(minilm: Path, tmp_path: Path):
    """The published directory, and one that the installed version saved."""
    library = pytest.importorskip("sentence_transformers")
    published = library.SentenceTransformer(str(minilm), device="cpu")
    sentences = ["A man is playing a guitar.", "Where is the nearest station?", "word " * 400]
    expected = published.encode(sentences)
    published.save(str(tmp_path / "saved"), create_model_card=False)
    for folder in (minilm, tmp_path / "saved"):
        for precision, least in (("fp32", 0.99999), ("bf16", 0.999)):
            ours = Predictor.from_pretrained(folder, device="cpu", precision=precision)
            assert cosine_rows(ours.encode(sentences), expected).min() > least
            assert np.linalg.norm(ours.encode(sentences), axis=1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("modules.json", "{", "not JSON"),
        ("modules.json", "{}", "expected a JSON list"),
        ("modules.json", '[{"type": "x.Transformer"}]', "expected a list of modules"),
        ("modules.json", '[{"type": "x.Transformer", "path": ""}, {"type": "x.LSTM", "path": "1"}]', "LSTM"),
        ("1_Pooling/config.json", '{"pooling_mode": "lasttoken"}', "pooling 'lasttoken'"),
        ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}', "pooling "),
        ("1_Pooling/config.json", '{"pooling_mode": "mean", "include_prompt": false}', "include_prompt = false"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}', "max_seq_length = 'long'"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "q", "prompts": {}}', "no prompt 'q'"),
    ],
)
def test_foreign_modules_are_refused_in_one_line(tmp_path: Path, file, content, problem):
    write(tmp_path, SentenceModules(tmp_path, "mean"), 8)
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as caught:
        read(tmp_path)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dense_layer_that_is_no_pooler_is_refused(tmp_path: Path):
    pooler = {"weight": torch.zeros(8, 8), "bias": torch.zeros(8)}
    write(tmp_path, SentenceModules(tmp_path, "pooler", pooler=pooler), 8)
    config = json.loads((tmp_path / "2_Dense" / "config.json").read_text())
    for other in ({"activation_function": "torch.nn.ReLU"}, {"use_residual": True}):
        (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(config | other))
        with pytest.raises(ConfigError, match="2_Dense"):
            read(tmp_path)


def test_a_directorys_settings_are_those_of_its_vectors(checkpoint: Path, tmp_path: Path):
    """Its prompt, its length, and the pooler in its dense layer, whatever the encoder's own is."""
    encoder, tokenizer = BertModel.from_pretrained(checkpoint), Tokenizer.from_pretrained(checkpoint)
    width = encoder.config.hidden_size
    pooler = {"weight": torch.randn(width, width), "bias": torch.randn(width)}
    encoder.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    write(tmp_path, SentenceModules(tmp_path, "pooler", False, 9, "the girl ", pooler), width)
    found = Predictor.from_pretrained(tmp_path, device="cpu", precision="fp32").encode([*SENTENCES, "a film " * 30])
    encoder.pooler_dense.load_state_dict(pooler)
    texts = ["the girl " + text for text in [*SENTENCES, "a film " * 30]]
    snapshot = Snapshot(encoder, torch.float32)
    expected = encode(snapshot, texts, tokenizer, pooling="pooler", normalize=False, max_length=9)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_no_length_exceeds_the_recipes_and_the_positions(checkpoint: Path, predictor: Predictor, tmp_path: Path):
    positions = predictor.encoder.config.max_position_embeddings
    assert Predictor(predictor.encoder, predictor.tokenizer, max_length=positions + 1).max_length == positions
    shutil.copytree(checkpoint, tmp_path / "short")
    (tmp_path / "short" / "recipe.toml").write_text(RECIPE.with_values({"data": {"max_length": 7}}, "test").to_toml())
    assert Predictor.from_pretrained(tmp_path / "short", device="cpu").max_length == 7


# ---- Mistakes -----------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(predictor: Predictor, checkpoint: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no polarity head \\(it has sentiment, paraphrase, alike\\)"):
        predictor.predict("polarity", SENTENCES)
    with pytest.raises(ValueError, match="pair 1 is"):
        predictor.similarity([("a", "b"), ("a", "b", "c")])
    with pytest.raises(ValueError, match="pair 0 is 'ab'"):
        predictor.similarity(["ab"])
    with pytest.raises(ValueError, match="not a string"):
        predictor.sentiment("a film")
    with pytest.raises(ValueError, match="2 lists of sentences, equally long, or a list of tuples"):
        predictor.predict("alike", SENTENCES, SENTENCES[:2])
    with pytest.raises(ValueError, match="pair 0 is 'a film', expected two sentences"):
        predictor.predict("alike", SENTENCES)
    with pytest.raises(ValueError, match="sentiment takes one list of sentences"):
        predictor.predict("sentiment", SENTENCES, SENTENCES)
    with pytest.raises(ValueError, match="alike predicts no classes, so it has no probabilities"):
        predictor.predict("alike", PAIRS, probabilities=True)
    with pytest.raises(ValueError, match="text names columns of a DataFrame"):
        predictor.predict("sentiment", SENTENCES, text="review")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Predictor.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the directory of a training run; its model is"):
        Predictor.from_pretrained(checkpoint.parent)
    with pytest.raises(ConfigError, match="no such file"):
        Predictor.from_pretrained(tmp_path / "nothing")


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path):
    BertModel.from_pretrained(checkpoint, local_files_only=True).save_pretrained(tmp_path)
    words = [*(checkpoint / "vocab.txt").read_text(encoding="utf-8").splitlines(), "onemore"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="457 words for an encoder of 456"):
        Predictor.from_pretrained(tmp_path)


def test_an_unknown_precision_is_a_value_error(checkpoint: Path) -> None:
    """`precision="fp16"` was taken without a word."""
    with pytest.raises(ValueError, match=r"precision 'fp16': expected auto, fp32 or bf16"):
        Predictor.from_pretrained(checkpoint, precision="fp16")  # type: ignore[arg-type]
