# SPDX-License-Identifier: Apache-2.0
"""What users run on a GPU: the trainer, the commands, course code. CI runs these tests on a pretended one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from minbert_fast import AdamW, BertModel, PCGrad, Predictor, compare, encode, evaluate, export, patch, predict, train
from minbert_fast.common import cli
from minbert_fast.data import sample_directory
from minbert_fast.surgery import METHODS
from tests.dropin.cases import batch, small
from tests.small import read_predictions, small_data, small_run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]
MODEL = sample_directory().model


def run(main: Any, *arguments: object) -> None:
    assert cli.run(main, [str(a) for a in arguments]) == 0


def on_gpu(data: Path, output: Path, *more: object) -> list[str]:
    """Flags of a run of ten steps with PCGrad on the GPU."""
    return [*small_run(data, output, "--surgery", "pcgrad", *map(str, more)), "--device", "cuda"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the GPU."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(train.main, *on_gpu(data, output))
    return output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors") | load_file(run / "last" / "heads.safetensors")


def test_a_run_replays_graphs(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["device"] == torch.cuda.get_device_name()
    assert summary["graphs"]["captured"] > 0
    assert summary["skipped_steps"] == 0


def test_a_run_that_was_stopped_ends_as_the_whole_one(whole: Path, data: Path, tmp_path: Path) -> None:
    run(train.main, *on_gpu(data, tmp_path, "--stop-after", 7))
    run(train.main, "--resume", "--output", tmp_path)
    torch.testing.assert_close(weights(tmp_path), weights(whole), atol=0, rtol=0)


def test_a_run_under_another_default_device_ends_alike(whole: Path, data: Path, tmp_path: Path) -> None:
    """`torch.set_default_device("cuda")` in a notebook made `fit` fail: numbers of the host lay on the device."""
    with torch.device("cuda"):
        run(train.main, *on_gpu(data, tmp_path))
    torch.testing.assert_close(weights(tmp_path), weights(whole), atol=0, rtol=0)


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_a_run_without_graphs_ends_alike(whole: Path, data: Path, tmp_path: Path, backend: str) -> None:
    more = ["--set", "model.dropout=0", "--max-steps", "4", "--backend", backend, "--set", "training.graphs=false"]
    run(train.main, *on_gpu(data, tmp_path / "gpu", *more))
    run(train.main, *on_gpu(data, tmp_path / "cpu", *more), "--device", "cpu")
    torch.testing.assert_close(weights(tmp_path / "gpu"), weights(tmp_path / "cpu"), atol=2e-5, rtol=1e-3)


def test_every_method_of_surgery_and_every_dynamic_weight(data: Path, tmp_path: Path) -> None:
    methods = ",".join([*METHODS, "uncertainty", "dwa", "famo", "random"])
    settings = ["--set", "training.batch_size=4", "--set", f"data.cache={data / 'cache'}"]
    flags = ["--methods", methods, "--seeds", 2, "--max-steps", 2, *settings]
    run(compare.main, "--data", data, "--output", tmp_path, "--device", "cuda", *flags)


@pytest.mark.parametrize(
    "values",
    [
        ["regularisation.r_drop=1", "training.ema=0.9"],
        ["regularisation.smart=1", "regularisation.proximal=1"],
        ["model.freeze=true"],
        ["model.pooling='pooler'", "optimizer.layer_decay=0.9"],
        ["tasks.paraphrase.encoder='both'", "tasks.similarity.loss='cosent'"],
    ],
    ids=lambda values: values[0],
)
def test_other_recipes_train(data: Path, tmp_path: Path, values: list[str]) -> None:
    settings = [flag for value in values for flag in ("--set", value)]
    run(train.main, *on_gpu(data, tmp_path, *settings, "--precision", "bf16"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["graphs"]["captured"] > 0
    assert summary["skipped_steps"] == 0


def test_evaluate_finds_the_scores_of_the_run(whole: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--data", data, "--device", "cuda", "--precision", "fp32", "--json", tmp_path / "scores.json"]
    run(evaluate.main, "--checkpoint", whole / "last", *flags)
    found = json.loads((tmp_path / "scores.json").read_text())
    last = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines() if "dev/score" in line][-1]
    assert found["score"] == pytest.approx(last["dev/score"], abs=1e-6)


def test_predict_and_encode_answer_as_on_a_cpu(whole: Path, data: Path, tmp_path: Path) -> None:
    pairs = data / "quora-dev.csv"
    for device in ("cuda", "cpu"):
        flags = ["--device", device, "--precision", "fp32", "--output"]
        run(
            predict.main,
            "--checkpoint",
            whole / "best",
            "--task",
            "paraphrase",
            "--input",
            pairs,
            *flags,
            tmp_path / device,
        )
        run(encode.main, "--model", whole / "best", "--input", MODEL / "vocab.txt", *flags, tmp_path / f"{device}.npy")
    ids, values = read_predictions(tmp_path / "cuda")
    expected = read_predictions(tmp_path / "cpu")
    assert ids == expected[0]
    np.testing.assert_array_equal(values, expected[1])
    np.testing.assert_allclose(np.load(tmp_path / "cuda.npy"), np.load(tmp_path / "cpu.npy"), atol=1e-5)


def test_a_run_is_exported_and_searched(whole: Path, tmp_path: Path) -> None:
    run(export.main, "--checkpoint", whole / "best", "--format", "sentence-transformers", "--output", tmp_path / "out")
    predictor = Predictor.from_pretrained(tmp_path / "out", device="cuda")
    sentences = ["a film", "the girl eats an apple in the park", "a very good film"]
    assert predictor.search("a film", sentences)[0].row == 0


# ---- Course code and models of transformers ------------------------------------------------------------------------------


def test_a_course_loop_trains_as_on_a_cpu() -> None:
    """Its three imports: the model with padding anywhere, AdamW, PCGrad."""
    ends = []
    for device in ("cpu", "cuda"):
        model, (ids, mask) = (
            small(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(device).train(),
            batch(),
        )
        torch.manual_seed(1)
        head = torch.nn.Linear(model.config.hidden_size, 3).to(device)
        optimizer = PCGrad(AdamW([*model.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.1))
        labels = torch.tensor([0, 1, 2, 0, 1], device=device)
        for _ in range(3):
            optimizer.zero_grad()
            pooled = model(ids.to(device), mask.to(device))["pooler_output"]
            optimizer.pc_backward([F.cross_entropy(head(pooled), labels), -pooled.square().mean(), pooled.mean()])
            optimizer.step()
        assert optimizer.gram is not None
        assert optimizer.gram.device.type == device
        ends.append({name: p.detach().cpu() for name, p in model.named_parameters()})
    torch.testing.assert_close(ends[1], ends[0], atol=1e-4, rtol=1e-3)


def test_a_model_and_its_optimizer_are_saved_and_restored(tmp_path: Path) -> None:
    model, (ids, mask) = small().cuda().train(), [t.cuda() for t in batch()]
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        model(ids, mask)["pooler_output"].float().square().mean().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    restored = BertModel.from_pretrained(tmp_path).cuda().eval()
    torch.testing.assert_close(restored(ids, mask), model.eval()(ids, mask))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True))
    optimizer.step()
    assert {t.device.type for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)} == {
        "cuda"
    }


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification", "BertForMaskedLM"])
def test_a_patched_model_of_transformers_answers_and_learns_as_before(name: str) -> None:
    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 80,
    }
    torch.manual_seed(0)
    stock = getattr(transformers, name)(transformers.BertConfig(**shape)).eval()
    patched = patch(copy.deepcopy(stock).cuda())
    ids, mask = batch()
    ids, mask = (t[[0, 2, 3]] for t in (ids, mask))  # where a first token is masked, transformers pools its padding
    found = patched(ids.cuda(), attention_mask=mask.cuda())[0]
    expected = stock(ids, attention_mask=mask)[0]
    rows = mask.bool() if expected.dim() == 3 else slice(None)
    torch.testing.assert_close(found.cpu()[rows], expected[rows], atol=1e-4, rtol=1e-3)
    found.square().mean().backward()
    assert all(p.grad.is_cuda for p in patched.parameters() if p.grad is not None)
