# SPDX-License-Identifier: Apache-2.0
"""The multitask model: equal losses and gradients packed and padded; shared layers, stages, files."""

from __future__ import annotations

import copy
import runpy
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from minbert_fast import BertConfig, BertModel
from minbert_fast.common.schema import ConfigError, build, to_toml
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.packing import pack
from minbert_fast.ops.backend import force, triton_available
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.backends import make_step
from minbert_fast.step.captured import GraphedStep, at_capacity
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel, base, build_task, build_tasks
from minbert_fast.tasks.base import Results
from tests.step.test_graph import strangers
from tests.tolerance import poisoned_memory

CONFIG = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
TRIPLETS = {"kind": "nli-triplets"}
OPTIONS = {"sentiment": {"dropout": 0.0}, "paraphrase": {"dropout": 0.0}, "similarity": {}, "nli": TRIPLETS}
LABELS = {"sentiment": [0, 4, 2, 1, 3], "paraphrase": [1.0, 0, 1, 1, 0], "similarity": [5.0, 0, 2.4, 3, 1]}


def make_model(options: dict | None = None, pooling="mean") -> MultitaskModel:
    torch.manual_seed(0)
    tasks = {name: build_task(name, o) for name, o in (options or OPTIONS).items()}
    return MultitaskModel(BertModel(CONFIG), tasks, pooling)


def make_batch(
    model: MultitaskModel, sizes: dict[str, int], capacity: bool = True, known: dict[str, list] = LABELS
) -> MultitaskBatch:
    rng = np.random.default_rng(0)
    arity = {name: model.tasks[name].arity for name in sizes}
    sentences = [[rng.integers(1, 40, rng.integers(1, 9)) for _ in range(n * arity[name])] for name, n in sizes.items()]
    room = {"token_capacity": 200, "sentence_capacity": 30, "max_seqlen": 16} if capacity else {}
    labels = {name: torch.tensor(known[name][:n]) for name, n in sizes.items() if name in known}
    rows = {name: np.arange(n) for name, n in sizes.items()}
    return MultitaskBatch(pack(sentences, **room), tuple(sizes), arity, labels, rows)


def gradients(model: MultitaskModel, losses: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


# The course's three tasks by their presets, and with the options that lead through other kernels.
BY_KERNELS: dict[str, dict] = {
    "presets": {name: {} for name in LABELS},
    "others": {
        "sentiment": {"pooling": "cls", "label_smoothing": 0.1},
        "paraphrase": {"pooling": "max", "features": ["cosine", "u"], "loss": "cross_entropy"},
        "similarity": {"calibrated": True, "loss": "cosent", "weight": 2.0},
    },
}


@pytest.mark.skipif(not triton_available(), reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the GPU's code in the interpreter")
@pytest.mark.parametrize("sizes", [(4, 2, 3), (0, 1, 2)])
@pytest.mark.parametrize("options", BY_KERNELS.values(), ids=BY_KERNELS)
def test_losses_and_gradients_by_kernels_equal_those_without(options: dict, sizes: tuple[int, ...]) -> None:
    """Pooling, cosines and losses are Triton's on a GPU; dropout draws the same masks."""
    model = make_model(options)
    batch = make_batch(model, dict(zip(options, sizes, strict=True)))
    start = torch.randn(batch.packed.tokens.shape[0], CONFIG.hidden_size)

    def run(backend: str) -> tuple[dict[str, torch.Tensor], ...]:
        hidden = start.clone().requires_grad_()
        torch.manual_seed(1)
        with force(backend), poisoned_memory():  # type: ignore[arg-type]
            losses = model.losses(batch, hidden)
            found = gradients(model, losses)
        assert hidden.grad is not None
        assert not hidden.grad[batch.packed.num_tokens :].any()
        return losses, found | {"hidden": hidden.grad}

    for ours, theirs in zip(run("triton"), run("torch"), strict=True):
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "pooler"])
def test_packed_losses_and_gradients_equal_the_padded_ones(pooling):
    model = make_model(pooling=pooling)
    batch = make_batch(model, {"sentiment": 4, "paraphrase": 5, "similarity": 0, "nli": 2})
    packed = model.losses(batch, model.encoder(batch.packed)["last_hidden_state"])
    padded = model.losses_padded(batch)
    assert list(packed) == list(padded) == list(batch.tasks)
    for name in batch.tasks:
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-4, atol=1e-5)
    assert packed["similarity"].item() == 0.0
    expected = gradients(model, padded)
    for name, gradient in gradients(model, packed).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5, msg=name)


# One task of each kind that learns from batches alone, and its labels; `masked-lm` and `next-sentence` draw their own.
KINDS = {
    "classification": {"classes": ["a", "b", "c"], "dropout": 0.0, "class_weights": [1.0, 2.0, 0.5]},
    "ordinal": {"kind": "classification", "classes": ["1", "2", "3"], "dropout": 0.0, "loss": "ordinal"},
    "multilabel": {"classes": ["a", "b"], "dropout": 0.0},
    "regression": {"found_range": [1, 5], "dropout": 0.0},
    "pair-classification": {"classes": ["a", "b", "c"], "dropout": 0.0, "label_smoothing": 0.1},
    "pair-regression": {"range": [0, 4], "dropout": 0.0, "labels": "raw"},
    "ranking": {"symmetric": True},
    "triplet": {"project": True},
    "contrastive": {"text": ["sentiment"]},
}
KIND_LABELS = {
    "classification": [0, 2, 1, 1, 0],
    "ordinal": [2, 0, 1, 2, 2],
    "multilabel": [[0.0, 1], [1, 1], [0, 0], [1, 0], [1, 1]],
    "regression": [1.0, 5, 2.5, 3, 4],
    "pair-classification": [2, 1, 0, 0, 1],
    "pair-regression": [4.0, 0, 1, 2.5, 3],
}


KIND_RECIPE = build(Recipe, {"tasks": KINDS, "optimizer": {"lr": 2e-3}, "surgery": {"method": "pcgrad"}}, "test")


def test_every_kind_trains_alike_in_the_one_pass_and_the_naive_step(tmp_path: Path):
    """Losses of four steps are equal and fall; the saved model predicts what the trained one does."""
    losses, model = [], make_model(KINDS)
    assert {task.kind for task in model.tasks.values()} | {"masked-lm", "next-sentence"} == set(base.KINDS)
    for backend in ("reference", "fast"):
        model = make_model(KINDS)
        batch = make_batch(model, dict.fromkeys(KINDS, 5), capacity=False, known=KIND_LABELS)
        step = make_step(backend, model, KIND_RECIPE, torch.float32)
        losses.append(torch.stack([step(batch, 1.0).losses for _ in range(4)]))
    torch.testing.assert_close(losses[0], losses[1], atol=2e-4, rtol=2e-4)
    falling = losses[1][-1] < losses[1][0]
    assert falling.all(), [name for name, good in zip(KINDS, falling, strict=True) if not good]

    model.eval().save(tmp_path, KIND_RECIPE.to_toml())
    saved = load_file(tmp_path / "heads.safetensors")
    assert not [key for key in saved if "class_weights" in key]  # the options hold them
    check_equal_results(model, MultitaskModel.load(tmp_path), batch)


@torch.no_grad()
def check_equal_results(model: MultitaskModel, loaded: MultitaskModel, batch: MultitaskBatch) -> None:
    """Both models have the same losses and predictions, of which every task has its metrics."""
    outputs = [each.outputs(batch, each.encoder(batch.packed)["last_hidden_state"]) for each in (model, loaded)]
    for name, task in model.tasks.items():
        (trained, first), (read, second) = (
            (m.head(name), o[name]) for m, o in zip((model, loaded), outputs, strict=True)
        )
        predictions, shares = trained.predict(first), trained.probabilities(first)
        assert torch.equal(predictions, read.predict(second))
        assert torch.equal(trained.loss(first, batch.labels.get(name)), read.loss(second, batch.labels.get(name)))
        assert (shares is None) == (task.class_names is None)
        if not task.predicts:
            continue
        labels = batch.labels[name].numpy() if task.labelled else None
        vectors = tuple(x.numpy() for x in first.vectors)
        probabilities = None if shares is None else shares.numpy()
        scores = task.evaluate(Results(predictions.numpy(), labels, probabilities, vectors))
        assert tuple(scores) == task.metric_names
        assert task.primary in scores
        assert all(np.isfinite(value) for value in scores.values())
        assert len(task.as_labels(predictions.numpy())) == 5


def test_no_kind_waits_for_the_device(monkeypatch: pytest.MonkeyPatch):
    model = make_model(KINDS)
    batch = make_batch(model, dict.fromkeys(KINDS, 4), capacity=False, known=KIND_LABELS)
    assert strangers(model, KIND_RECIPE, at_capacity(batch), monkeypatch) == []


@pytest.mark.gpu
def test_every_kind_trains_alike_as_a_cuda_graph():
    model = make_model(KINDS).cuda()
    batch = at_capacity(make_batch(model, dict.fromkeys(KINDS, 5), capacity=False, known=KIND_LABELS).to("cuda"))
    eager = OnePassStep(copy.deepcopy(model), KIND_RECIPE, torch.float32)
    graphed = GraphedStep(OnePassStep(model, KIND_RECIPE, torch.float32))
    for _ in range(4):
        assert torch.equal(eager(batch, 1.0).losses, graphed(batch, 1.0).losses)
    assert torch.equal(eager.flat.data, graphed.step.flat.data)


def test_the_worked_example_is_the_focal_loss():
    """docs/adding_a_task.md; for gamma = 0 the cross-entropy."""
    path = Path(__file__).parents[2] / "docs" / "examples" / "focal.py"
    try:
        runpy.run_path(str(path))
        options = tomllib.loads(path.with_suffix(".toml").read_text())["tasks"]["sentiment"] | {"dropout": 0.0}
        for gamma in (0.0, 2.0):
            chosen = {"sentiment": options | {"gamma": gamma}}
            recipe = build(Recipe, {"tasks": chosen}, "test")
            found = []
            for backend in ("reference", "fast"):
                model = make_model(chosen)
                batch = make_batch(model, {"sentiment": 5}, capacity=False)
                p = model.outputs(batch, model.encoder(batch.packed)["last_hidden_state"])["sentiment"].scores.softmax(
                    -1
                )
                p = p[torch.arange(5), batch.labels["sentiment"]]
                step = make_step(backend, model, recipe, torch.float32)
                found.append(torch.stack([step(batch, 1.0).losses for _ in range(2)]))
                torch.testing.assert_close(found[-1][0, 0], (-((1 - p) ** gamma) * p.log()).mean().detach())
            torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    finally:
        base.KINDS.pop("focal", None)


def test_a_stage_replaces_class_weights():
    model = make_model({"sentiment": {"dropout": 0.0, "class_weights": [1.0, 1, 1, 1, 9]}})
    batch = make_batch(model, {"sentiment": 5})
    hidden = model.encoder(batch.packed)["last_hidden_state"]
    for options in ({}, {"class_weights": [2.0, 2, 2, 2, 2]}):
        model.configure({"sentiment": build_task("sentiment", options | {"dropout": 0.0})})
        scores = model.outputs(batch, hidden)["sentiment"].scores
        expected = F.cross_entropy(scores, batch.labels["sentiment"]) * (2 if options else 1)
        torch.testing.assert_close(model.losses(batch, hidden)["sentiment"], expected)


def test_a_task_may_have_the_name_of_an_attribute_of_module_dict(tmp_path: Path):
    tasks = {name: {"kind": "sentiment", "dropout": 0.0} for name in ("type", "values", "train")}
    model = make_model(tasks)
    model.save(tmp_path, build(Recipe, {"tasks": tasks}, "test").to_toml())
    batch = make_batch(model, dict.fromkeys(tasks, 5), known=dict.fromkeys(tasks, LABELS["sentiment"]))
    check_equal_results(model.eval(), MultitaskModel.load(tmp_path), batch)


def test_a_stage_puts_class_weights_on_the_models_device():
    options = {"head": "cosine", "class_weights": [1.0, 2.0]}  # a head without parameters
    model = make_model({"paraphrase": options}).to("meta")
    model.configure({"paraphrase": build_task("paraphrase", options)})
    assert model.heads["paraphrase"].class_weights.device.type == "meta"


def test_options_set_a_tasks_pooling_and_weight():
    model = make_model({"sentiment": {"dropout": 0.0, "pooling": "cls", "weight": 3.0}, "similarity": {}})
    batch = make_batch(model, {"sentiment": 3, "similarity": 4})
    hidden = model.encoder(batch.packed)["last_hidden_state"]
    first = hidden[batch.packed.cu_seqlens[:3].long()]
    scores = model.heads["sentiment"].output(first)
    expected = 3.0 * F.cross_entropy(scores, torch.tensor(LABELS["sentiment"][:3]))
    losses = model.losses(batch, hidden)
    torch.testing.assert_close(losses["sentiment"], expected)
    inputs = model.inputs(batch, hidden)["similarity"]
    assert inputs.first == 3
    begin, end = batch.packed.cu_seqlens[3 + 4 : 3 + 4 + 2].tolist()  # the first example's second sentence
    torch.testing.assert_close(inputs.embeddings[1][0], hidden[begin:end].mean(0))


def test_losses_are_fp32_under_autocast():
    model = make_model()
    batch = make_batch(model, {"sentiment": 3, "paraphrase": 2, "similarity": 2, "nli": 2})
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.encoder(batch.packed)["last_hidden_state"].bfloat16()
        losses = model.losses(batch, hidden)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_shared_layers_are_the_same_parameters():
    stack = {"shared_layers": "pair", "dropout": 0.0}
    model = make_model({"paraphrase": dict(stack), "similarity": stack | {"dropout_at": ["embedding"]}})
    assert model.heads["paraphrase"].stack is model.heads["similarity"].stack
    shared = set(map(id, model.heads["paraphrase"].stack.parameters()))
    assert len(shared) == 4
    assert len(model.head_parameters()) == len(shared) + 2  # and the paraphrase output layer
    assert shared <= set(map(id, model.head_parameters(["similarity"])))
    with pytest.raises(ConfigError, match=r"2 layers with dropout 0.5 here, 2 layers with dropout 0.0 in another"):
        make_model({"paraphrase": stack, "similarity": stack | {"dropout": 0.5}})


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_extra_layers_run_on_token_rows_and_learn(pooling):
    model = make_model({"paraphrase": {"dropout": 0.0}, "sentiment": {"dropout": 0.0, "extra_layers": 2}}, pooling)
    batch = make_batch(model, {"paraphrase": 2, "sentiment": 3})
    hidden = model.encoder(batch.packed)["last_hidden_state"]
    losses = model.losses(batch, hidden)
    torch.testing.assert_close(losses["sentiment"], model.losses_padded(batch)["sentiment"], rtol=1e-4, atol=1e-5)
    losses["sentiment"].backward()
    assert all(
        p.grad is not None and p.grad.any()
        for n, p in model.heads["sentiment"].named_parameters()
        if "key.bias" not in n
    )
    with pytest.raises(ConfigError, match='pooling = "pooler", which belongs to the encoder'):
        make_model({"sentiment": {"extra_layers": 1}}, "pooler")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_extra_layers_pool_as_the_recipe_says_unless_the_task_says_otherwise(pooling):
    def scores(own: dict, recipes: str) -> torch.Tensor:
        model = make_model({"sentiment": {"extra_layers": 1} | own}, recipes).eval()
        batch = make_batch(model, {"sentiment": 3})
        return model.outputs(batch, model.encoder(batch.packed)["last_hidden_state"])["sentiment"].scores

    assert torch.equal(scores({}, pooling), scores({"pooling": pooling}, "cls"))
    assert not torch.equal(scores({}, pooling), scores({"pooling": "cls"}, "mean")) or pooling == "cls"


def test_a_stage_changes_losses_and_weights_but_not_parameters():
    model = make_model()
    before = torch.get_rng_state()
    model.configure({"similarity": build_task("similarity", {"loss": "l1", "weight": 2.0})})
    assert torch.equal(before, torch.get_rng_state())
    batch = make_batch(model, {"similarity": 4})
    hidden = model.encoder(batch.packed)["last_hidden_state"]
    output = model.heads["similarity"](model.inputs(batch, hidden)["similarity"])
    labels = torch.tensor(LABELS["similarity"][:4])
    torch.testing.assert_close(model.losses(batch, hidden)["similarity"], 2 * (output.scores - labels / 5).abs().mean())
    with pytest.raises(ConfigError, match="cannot change the parameters"):
        model.configure({"similarity": build_task("similarity", {"project": True})})
    with pytest.raises(ConfigError, match="no head of this name"):
        model.configure({"cfimdb": build_task("cfimdb", {"kind": "sentiment"})})


def test_a_stage_changes_the_dropout_of_shared_layers_and_the_votes():
    def built(tasks: list[str], **options: object) -> dict[str, base.Task]:
        return {name: build_task(name, options) for name in tasks}

    pair = ["sentiment", "paraphrase"]
    model = MultitaskModel(BertModel(CONFIG), built(pair, shared_layers="both", dropout=0.1))
    model.configure(built(pair, shared_layers="both", dropout=0.4))
    assert [model.head(name).stack.dropout for name in pair] == [0.4, 0.4]
    model = MultitaskModel(BertModel(CONFIG), built(["sentiment"], neighbours=4, nearest=3))
    model.configure(built(["sentiment"], neighbours=4, nearest=2, temperature=0.5))
    stored = model.head("sentiment").labelled_sentences()
    assert (stored.nearest, stored.temperature) == (2, 0.5)


def test_tasks_of_all_stages_have_heads():
    stages = [{"tasks": {"nli": {**TRIPLETS, "objectives": {"triplet": 1.0}}}}, {"tasks": {"sentiment": {}}}]
    recipe = build(Recipe, {"tasks": {"sentiment": {"dropout": 0.3}}, "stages": stages}, "test")
    assert list(build_tasks(recipe)) == ["sentiment", "nli"]
    first, second = recipe.resolved_stages()
    assert list(build_tasks(first)) == ["nli"]
    assert build_tasks(second)["sentiment"].options.dropout == 0.3


# Options, and the names and shapes of their parameters in heads.safetensors (hidden size 16): the file's format.
STORED: dict[str, tuple[dict, dict[str, tuple[int, ...]]]] = {
    "sentiment": ({}, {"output.weight": (5, 16), "output.bias": (5,)}),
    "cfimdb": (
        {"kind": "polarity", "neighbours": 2, "nearest": 1},
        {
            "neighbours.vectors": (4, 16),
            "neighbours.labels": (4,),
            "output.weight": (2, 18),
            "output.bias": (2,),
        },
    ),
    "paraphrase": ({"features": ["cosine"], "loss": "cross_entropy"}, {"output.weight": (2, 1), "output.bias": (2,)}),
    "similarity": (
        {"calibrated": True, "encoder": "both", "project": 3},
        {
            "projection.weight": (3, 16),
            "projection.bias": (3,),
            "factor": (),
            "offset": (),
            "together.weight": (1, 3),
            "together.bias": (1,),
        },
    ),
    "graded": (
        {"kind": "similarity", "head": "linear", "loss": "cross_entropy"},
        {"output.weight": (6, 32), "output.bias": (6,)},
    ),
    "nli": (
        {**TRIPLETS, "objectives": {"triplet": 1.0}, "project": True},
        {"projection.weight": (16, 16), "projection.bias": (16,)},
    ),
    "nsp": ({"text": ["similarity"]}, {"output.weight": (2, 16), "output.bias": (2,)}),
}


def test_saved_heads_load_by_name_and_shape(tmp_path: Path):
    tasks = {name: options for name, (options, _) in STORED.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{key}": torch.randn(shape, generator=generator)
        for name, (_, shapes) in STORED.items()
        for key, shape in shapes.items()
    }
    BertModel(CONFIG).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "heads.safetensors")
    (tmp_path / "recipe.toml").write_text(to_toml({"tasks": tasks}))
    loaded = MultitaskModel.load(tmp_path)
    found = loaded.heads.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    files = {name: task.prediction_file("dev") for name, task in loaded.tasks.items() if task.predicts}
    assert files["sentiment"] == "sst-dev-output.csv"
    assert files["cfimdb"] == "cfimdb-dev-output.csv"
    assert loaded.tasks["nli"].header == "Follows_Closer_Than_Contradicts"


def test_heads_draw_their_first_weights_in_a_fixed_order():
    options = {"project": 3, "features": ["u", "product"], "shared_layers": "pair", "shared_depth": 1}
    torch.manual_seed(5)
    head = build_task("paraphrase", options).build_head(CONFIG, {})
    torch.manual_seed(5)
    expected = [torch.nn.Linear(16, 16), torch.nn.Linear(16, 3), torch.nn.Linear(6, 1)]
    for layer, own in zip(expected, (head.stack.layers[0], head.projection, head.output), strict=True):
        assert torch.equal(layer.weight, own.weight)
        assert torch.equal(layer.bias, own.bias)


def test_save_and_load_keep_every_bit(tmp_path: Path):
    stack = {"shared_layers": "pair"}
    options = {"sentiment": {}, "paraphrase": stack, "similarity": stack | {"calibrated": True}}
    recipe = build(Recipe, {"tasks": options, "model": {"pooling": "max"}}, "test")
    torch.manual_seed(3)
    model = MultitaskModel(BertModel(CONFIG), build_tasks(recipe), recipe.model.pooling)
    model.save(tmp_path / "best", recipe.to_toml())
    loaded = MultitaskModel.load(tmp_path / "best")
    assert loaded.pooling == "max"
    assert loaded.heads["paraphrase"].stack is loaded.heads["similarity"].stack
    expected = model.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(expected[key], tensor) for key, tensor in loaded.state_dict().items())
    assert not loaded.training


def test_loading_a_directory_without_a_trained_model_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no recipe.toml"):
        MultitaskModel.load(tmp_path)
    recipe = build(Recipe, {"tasks": {"sentiment": {}}}, "test")
    model = MultitaskModel(BertModel(CONFIG), build_tasks(recipe))
    model.save(tmp_path, recipe.to_toml())
    (tmp_path / "recipe.toml").write_text(recipe.with_values({"tasks": {"paraphrase": {}}}, "test").to_toml())
    with pytest.raises(ConfigError, match=r"heads.safetensors: missing paraphrase.output"):
        MultitaskModel.load(tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    (tmp_path / "heads.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"heads\.safetensors: not a readable"):
        MultitaskModel.load(tmp_path)
