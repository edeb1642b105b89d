# SPDX-License-Identifier: Apache-2.0
"""Graph capture and its conditions: padding does not change a step, and a step never waits for the device."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minbert_fast.common import side_stream
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.captured import GraphedStep, at_capacity
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.step.tape import Tape
from minbert_fast.surgery import Weights
from minbert_fast.tasks import MultitaskModel
from tests.step.test_step import make_batch, make_model, recipe

SIZES = {"sentiment": 3, "paraphrase": 4, "similarity": 2}


def batch_of(seed: int, sizes: Mapping[str, int] = SIZES, **capacities: int) -> MultitaskBatch:
    return make_batch(make_model(recipe()), sizes, seed, **capacities)


@pytest.mark.parametrize("surgery", ["none", "pcgrad"])
def test_a_batch_padded_to_its_bucket_trains_as_its_bare_self(surgery: str) -> None:
    chosen = recipe(surgery={"method": surgery})
    bare = OnePassStep(make_model(chosen), chosen, torch.float32)
    padded = OnePassStep(make_model(chosen), chosen, torch.float32)
    for seed, sizes in enumerate([SIZES, SIZES | {"paraphrase": 0}, SIZES]):
        one = bare(batch_of(seed, sizes), 1.0)
        roomy = batch_of(seed, sizes, token_capacity=320, sentence_capacity=20, max_seqlen=24)
        two = padded(at_capacity(roomy), 1.0)
        torch.testing.assert_close(two.losses, one.losses, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(two.grad_norm, one.grad_norm, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded.flat.data, bare.flat.data, atol=1e-6, rtol=1e-5)


class OnlyMeta(TorchDispatchMode):
    """Notes every operation that reads a value or touches a tensor of another device."""

    def __init__(self) -> None:
        super().__init__()
        self.strangers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.device.type != "meta" for leaf in tree_leaves((args, kwargs, out))):
            self.strangers.append(str(func))
        return out


def computed_on_meta(chosen: Any, sizes: Mapping[str, int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    model = make_model(chosen)
    return strangers(model, chosen, make_batch(model, sizes), monkeypatch)


def strangers(
    model: MultitaskModel, chosen: Recipe, batch: MultitaskBatch, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Names of the operations of a step on `batch` that read tensor values; tensors on the meta device have none."""
    # Autocast knows no meta device; these regions only turn it off.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    step, batch = OnePassStep(model.to("meta"), chosen, torch.bfloat16), batch.to("meta")
    step(batch, 1.0)  # as under capture: the first step of a bucket runs eagerly
    step.prepare(batch, 0.5)
    step.tables.set_aside(torch.device("meta"))
    with OnlyMeta() as watch:
        result = step.compute(batch)
    step.tables.write()
    assert result.losses.device.type == "meta"
    return watch.strangers


@pytest.mark.parametrize("surgery", ["none", "pcgrad"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "pooler"])
def test_the_step_asks_the_device_nothing(surgery: str, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graph capture forbids reading a tensor's value; on the meta device such a read fails."""
    chosen = recipe(surgery={"method": surgery}, model={"pooling": pooling})
    assert computed_on_meta(chosen, SIZES, monkeypatch) == []


def test_a_question_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe()
    original = Tape.gram

    def curious(self: Tape, words: Tensor | None) -> Tensor:
        gram = original(self, words)
        assert float(gram.sum()) > 0
        return gram

    monkeypatch.setattr(Tape, "gram", curious)
    with pytest.raises(RuntimeError, match="meta"):
        computed_on_meta(chosen, SIZES, monkeypatch)


EXTRAS: dict[str, dict[str, Any]] = {
    "none": {},
    "clipping": {"optimizer": {"lr": 1e-3, "clip": 0.1}},
    "heads' dropout": {"tasks": {"sentiment": {"dropout": 0.3}, "paraphrase": {}, "similarity": {}}},
    "frozen": {"model": {"freeze": True}},
    "averaging": {"training": {"ema": 0.9}},
    "teacher": {"regularisation": {"proximal": 1.0}},
    "uncertainty": {"weighting": {"method": "uncertainty"}},
    "dwa": {"weighting": {"method": "dwa", "window": 3}},
    "famo": {"weighting": {"method": "famo"}, "model": {"dropout": 0.0}},
    "random": {"weighting": {"method": "random"}},
}


@pytest.mark.usefixtures("graphs_on_cpu")
@pytest.mark.parametrize(("surgery", "extra"), [("none", "none"), *(("pcgrad", extra) for extra in EXTRAS)])
def test_a_graph_sees_the_batch_the_seed_the_rate_and_the_orders_of_each_step(surgery: str, extra: str) -> None:
    chosen = recipe(**({"surgery": {"method": surgery}, "model": {"dropout": 0.1}} | EXTRAS[extra]))
    eager = OnePassStep(make_model(chosen), chosen, torch.float32)
    graphed = GraphedStep(OnePassStep(make_model(chosen), chosen, torch.float32))
    sizes = [(256, 24), (320, 24), (320, 32)]  # attention is launched for sentences of up to `max_seqlen` tokens
    capacities = [{"token_capacity": n, "sentence_capacity": 20, "max_seqlen": longest} for n, longest in sizes]
    expected, found = [], []
    for step in range(9):
        batch = batch_of(step, **capacities[step % 3])
        expected.append(eager(at_capacity(batch), 1.0 - step / 20))
        found.append(graphed(batch.clone() if step % 4 else batch, 1.0 - step / 20))
    for one, two in zip(expected, found, strict=True):  # none of them is overwritten by a later step
        for name in ("losses", "grad_norm", "gram", "nonfinite", "task_weights"):
            torch.testing.assert_close(getattr(two, name), getattr(one, name), atol=0, rtol=0)
    assert torch.equal(eager.flat.data, graphed.step.flat.data)
    assert eager.state_dict()["scalars"] == graphed.state_dict()["scalars"]
    torch.testing.assert_close(graphed.state_dict()["tensors"], eager.state_dict()["tensors"], atol=0, rtol=0)
    assert len(graphed) == graphed.captures.captured == 3
    words = graphed.step.gradients.words(1, 1).data_ptr()  # replays write there, whatever the step uses by then
    if extra != "frozen":
        assert all(words in [t.data_ptr() for t in each.held[:2]] for each in graphed._captured.values())


class Changing(Weights):
    """Weights that Python chooses anew in each step, which no graph can follow."""

    def __init__(self, step: OnePassStep) -> None:
        super().__init__()
        self.step = step

    def __call__(self, gram: Tensor, orders: Tensor | None = None) -> Tensor:
        return torch.full((len(gram),), 1.0 / self.step.steps)


@pytest.mark.usefixtures("graphs_on_cpu")
def test_a_number_that_python_chooses_in_each_step_would_be_noticed() -> None:
    chosen = recipe(surgery={"method": "pcgrad"})
    norms = []
    for graphed in (False, True):
        step = OnePassStep(make_model(chosen), chosen, torch.float32)
        step.weights = Changing(step)
        call = GraphedStep(step) if graphed else step
        norms.append([float(call(batch_of(0, token_capacity=320), 0.0).grad_norm) for _ in range(4)])
    assert norms[0][:2] == norms[1][:2]
    assert norms[0][2:] != norms[1][2:] == norms[1][1:3]


@pytest.mark.gpu
@pytest.mark.parametrize("surgery", ["none", "pcgrad"])
def test_graphs_train_as_the_eager_step_does(surgery: str) -> None:
    chosen = recipe(surgery={"method": surgery})
    model = make_model(chosen).cuda()
    eager = OnePassStep(copy.deepcopy(model), chosen, torch.float32)
    graphed = GraphedStep(OnePassStep(model, chosen, torch.float32))
    capacities = [{"token_capacity": n, "sentence_capacity": 20, "max_seqlen": 24} for n in (256, 320)]
    for step in range(12):
        pinned = batch_of(step, **capacities[step % 2]).pin_memory()
        batch = pinned.to("cuda")
        one, two = eager(at_capacity(batch), 1.0 - step / 20), graphed(pinned if step % 3 else batch, 1.0 - step / 20)
        assert torch.equal(one.losses, two.losses)
    assert torch.equal(eager.flat.data, graphed.step.flat.data)
    assert len(graphed) == 2
    assert graphed.captures.capture_seconds > 0


@pytest.mark.gpu
def test_a_resumed_graph_goes_on_bit_for_bit() -> None:
    chosen = recipe(surgery={"method": "pcgrad"}, model={"dropout": 0.1})
    capacities = {"token_capacity": 256, "sentence_capacity": 20, "max_seqlen": 24}
    whole = GraphedStep(OnePassStep(make_model(chosen).cuda(), chosen, torch.bfloat16))
    for step in range(8):
        if step == 4:
            state = copy.deepcopy(whole.state_dict())
            weights = whole.step.flat.data.clone()
        whole(batch_of(step, **capacities).to("cuda"), 1.0)
    resumed = GraphedStep(OnePassStep(make_model(chosen).cuda(), chosen, torch.bfloat16))
    resumed.step.flat.data.copy_(weights)
    resumed.load_state_dict(state)
    for step in range(4, 8):
        resumed(batch_of(step, **capacities).to("cuda"), 1.0)
    assert torch.equal(whole.step.flat.data, resumed.step.flat.data)


@pytest.mark.gpu
def test_graphs_bear_with_a_thread_that_pins_memory_and_with_workspaces_cleared() -> None:
    """The thread is the one that makes batches; torch.compile's CUDA graphs clear what products work in."""
    chosen = recipe()
    model = make_model(chosen).cuda()
    eager = OnePassStep(copy.deepcopy(model), chosen, torch.float32)
    graphed = GraphedStep(OnePassStep(model, chosen, torch.float32))
    stop, pinned = threading.Event(), []

    def pin() -> None:
        while not stop.is_set():
            pinned.append(torch.zeros(1 << (12 + len(pinned) % 10)).pin_memory().numel())

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for step in range(6):
            capacities = {"token_capacity": (256, 320)[step % 2], "sentence_capacity": 20, "max_seqlen": 24}
            batch = batch_of(step, **capacities).to("cuda")
            assert torch.equal(eager(at_capacity(batch), 1.0).losses, graphed(batch, 1.0).losses)
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            assert thread.is_alive(), "pinning failed"
    finally:
        stop.set()
        thread.join()
    assert len(graphed) == 2
    assert torch.equal(eager.flat.data, graphed.step.flat.data)


def test_what_is_forked_under_capture_begins_after_what_was_before_and_ends_before_what_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.device_index = name, 0

        def wait_stream(self, other: Stream) -> None:
            order.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        order.append(f"in {stream.name}")
        yield

    monkeypatch.setattr(side_stream, "_stream", lambda index: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for device, expected in (("cpu", []), ("cuda", ["side waits for main", "in side", "main waits for side"])):
        with side_stream.forked(torch.device(device)) as beside, beside:
            pass
        assert order == expected
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with side_stream.forked(torch.device("cuda")) as beside, beside:
        pass
    assert len(order) == 3
