# SPDX-License-Identifier: Apache-2.0
"""The drop-in model among other tools: torch.compile without graph breaks, autocast, gradient checkpointing, DDP,
Accelerate and Lightning."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from minbert_fast import AdamW, BertConfig, BertModel
from minbert_fast.model.packing import PackedBatch, pack

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config).eval()


def rectangle() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[1, :4] = 0
    return torch.randint(1, 97, (3, 11), generator=generator), mask


def packed() -> PackedBatch:
    ids, mask = rectangle()
    return pack([[row[attended.bool()].numpy() for row, attended in zip(ids, mask, strict=True)]])


def gradients(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """Of a random-looking functional of the output, by parameter."""
    model.zero_grad()
    cotangent = torch.sin(torch.arange(hidden.numel(), dtype=torch.float32)).view_as(hidden)
    (hidden.float() * cotangent).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert got.keys() == expected.keys()
    assert len(expected) > 30
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=tolerance * max(scale, 1.0), msg=name)


# ---- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiles_as_one_graph(model: BertModel, train: bool) -> None:
    """`fullgraph` raises at any graph break; forward and backward equal the eager ones, dropout's shapes included."""
    ids, mask = rectangle()
    if not train:
        expected = model(ids, mask)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = compiled(ids, mask)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
        learned = gradients(model, got["last_hidden_state"])
        assert not learned.pop("pooler_dense.weight").any()  # zeros: the pooler is in the graph, its output unused
        assert not learned.pop("pooler_dense.bias").any()
        assert_same(learned, gradients(model, expected["last_hidden_state"]))
        return
    del model.bert_layers[1:]
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(compiled(ids, mask)["last_hidden_state"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert all(g.isfinite().all() for g in gradients(model, draws[2]).values())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*another activation than gelu:UserWarning")
def test_a_compiled_model_follows_its_activation(model: BertModel) -> None:
    """The graph watched modules alone, and went on with the activation that it had been compiled for."""
    ids, mask = rectangle()
    del model.bert_layers[1:]
    compiled = torch.compile(model, backend="eager")
    before = compiled(ids, mask)["last_hidden_state"]
    model.bert_layers[0].interm_af = nn.functional.relu
    expected = model.stock(ids, mask)
    assert (before - expected).abs().max() > 0.01
    torch.testing.assert_close(compiled(ids, mask)["last_hidden_state"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_packed_batch_compiles_as_one_graph(model: BertModel) -> None:
    batch = packed()
    compiled = torch.compile(lambda b: model(b)["last_hidden_state"], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), model(batch)["last_hidden_state"], rtol=1e-4, atol=1e-5)
    assert_same(gradients(model, compiled(batch)), gradients(model, model(batch)["last_hidden_state"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler's own imports
@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor_computes_the_same(model: BertModel) -> None:
    """Compiled to machine code, backward too."""
    ids, mask = rectangle()
    expected = model(ids, mask)["last_hidden_state"]
    got = torch.compile(model, fullgraph=True)(ids, mask)["last_hidden_state"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    learned = gradients(model, got)
    assert not any(learned.pop(f"pooler_dense.{name}").any() for name in ("weight", "bias"))
    assert_same(learned, gradients(model, expected))


# ---- autocast -----------------------------------------------------------------------------------------------------------


def test_autocast_trains_close_to_fp32(model: BertModel) -> None:
    """Products in bf16, parameters and gradients in fp32, in the direction of the exact ones."""
    ids, mask = rectangle()
    exact = gradients(model, model(ids, mask)["last_hidden_state"])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(ids, mask)["last_hidden_state"]
    got = gradients(model, hidden)
    for name, gradient in exact.items():
        assert got[name].dtype == torch.float32
        if gradient.norm() > 1e-3:
            cosine = nn.functional.cosine_similarity(got[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.98, f"{name}: {cosine}"


def test_autocast_leaves_a_model_in_doubles_as_it_is(model: BertModel) -> None:
    """As in torch. The fused layers went on in bf16."""
    ids = torch.randint(1, 50, (2, 7))
    model.double().eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, torch.ones_like(ids))["pooler_output"]
    assert torch.equal(found, model(ids, torch.ones_like(ids))["pooler_output"])


def test_fp16_autocast_on_a_cpu(model: BertModel) -> None:
    """The extension has no fp16, and fp32 activations once chose it."""
    ids, mask = rectangle()
    exact = model(ids, mask)["last_hidden_state"]
    with torch.autocast("cpu", torch.float16):
        hidden = model(ids, mask)["last_hidden_state"]
    torch.testing.assert_close(hidden.float(), exact, atol=0.01, rtol=0.01)
    assert gradients(model, hidden)["word_embedding.weight"].dtype == torch.float32


def test_embeddings_of_several_dtypes(model: BertModel) -> None:
    ids, mask = rectangle()
    model.word_embedding.bfloat16()
    hidden = model(ids, mask)["last_hidden_state"]
    torch.testing.assert_close(hidden, model.stock(ids, mask), rtol=1e-4, atol=1e-5)
    assert gradients(model, hidden)["word_embedding.weight"].dtype == torch.bfloat16


# ---- torch.func, forward-mode differentiation, traces -------------------------------------------------------------------

# The kernels know no transform. A tangent of the input once gave a wrong tangent of the output, or none.
transformed = pytest.mark.filterwarnings(
    "ignore:.*inside torch.func.*:UserWarning",
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)


@transformed
@pytest.mark.parametrize("way", ["jvp", "dual numbers"])
def test_tangents_are_the_stock_models(model: BertModel, way: str) -> None:
    ids, mask = rectangle()
    hidden = model.embed(ids).detach()
    tangent = torch.sin(torch.arange(hidden.numel(), dtype=torch.float32)).view_as(hidden)
    with torch.no_grad():
        step = 1e-3 * tangent
        expected = (model.encode(hidden + step, mask) - model.encode(hidden - step, mask)) / 2e-3
        if way == "jvp":
            _, got = torch.func.jvp(lambda hidden: model.encode(hidden, mask), (hidden,), (tangent,))
        else:
            with forward_ad.dual_level():
                got = forward_ad.unpack_dual(model.encode(forward_ad.make_dual(hidden, tangent), mask)).tangent
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)


@transformed
@pytest.mark.parametrize("grad", [False, True])
def test_a_traced_model_takes_other_batches(model: BertModel, grad: bool) -> None:
    ids, mask = rectangle()
    expected = model(ids[:2], mask[:2])["last_hidden_state"]
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (ids, mask), strict=False, check_trace=False)
        torch.testing.assert_close(traced(ids[:2], mask[:2])["last_hidden_state"], expected, rtol=1e-4, atol=1e-5)


def test_an_exported_model_takes_other_batches(model: BertModel) -> None:
    ids, mask = rectangle()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(model, (ids, mask), dynamic_shapes=(batch, batch)).module()
    expected = model(ids[:2], mask[:2])["last_hidden_state"]
    torch.testing.assert_close(exported(ids[:2], mask[:2])["last_hidden_state"], expected, rtol=1e-4, atol=1e-5)


@transformed
def test_gradients_of_each_sentence_by_torch_func(model: BertModel) -> None:
    ids, mask = rectangle()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        out = torch.func.functional_call(model, parameters, (ids[None], mask[None]))
        return out["last_hidden_state"].sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, ids, mask)
    model(ids[1:2], mask[1:2])["last_hidden_state"].sin().sum().backward()
    weight = model.bert_layers[0].self_attention.value.weight
    torch.testing.assert_close(found["bert_layers.0.self_attention.value.weight"][1], weight.grad, rtol=1e-3, atol=1e-4)


# ---- Gradient checkpointing ---------------------------------------------------------------------------------------------


def test_checkpointing_keeps_less_and_changes_nothing(model: BertModel) -> None:
    """Every gradient to the bit, with dropout; fewer saved activations; nothing at all outside training."""
    ids, mask = rectangle()
    model.train()
    found, kept = [], []
    for again in (False, True):
        model.gradient_checkpointing = again
        torch.manual_seed(3)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            hidden = model(ids, mask)["last_hidden_state"]
        kept.append(sum(saved))
        found.append(gradients(model, hidden))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())
    assert kept[1] < kept[0] / 2


def test_checkpointing_the_whole_model_from_outside(model: BertModel) -> None:
    ids, mask = rectangle()
    model.train()
    torch.manual_seed(3)
    expected = gradients(model, model(ids, mask)["last_hidden_state"])
    torch.manual_seed(3)
    hidden = checkpoint(lambda: model(ids, mask)["last_hidden_state"], use_reentrant=False)
    assert_same(gradients(model, hidden), expected)


# ---- DistributedDataParallel --------------------------------------------------------------------------------------------


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = BertModel(BertConfig(97, 48, 2, 4, 96, 0.0, 0.0, 40, initializer_range=0.2))
    model.load_state_dict(torch.load(f"{folder}/model.pt"))
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    ids, mask = rectangle()
    out = parallel(ids[rank::2], mask[rank::2])
    (out["last_hidden_state"].square().sum() + out["pooler_output"].sum()).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ddp_of_one_process_changes_no_gradient(model: BertModel, tmp_path: Path) -> None:
    """Its hooks see every parameter's gradient once, and it finds none unused."""
    ids, mask = rectangle()

    def learn(run: nn.Module) -> None:
        out = run(ids, mask)
        (out["last_hidden_state"].square().sum() + out["pooler_output"].sum()).backward()

    learn(model)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        learn(DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    for gradient, p in zip(expected, model.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(gradient, p.grad)


@pytest.mark.slow
def test_ddp_averages_the_gradients_of_its_processes(model: BertModel, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    ids, mask = rectangle()
    for rank in range(2):
        out = model(ids[rank::2], mask[rank::2])
        ((out["last_hidden_state"].square().sum() + out["pooler_output"].sum()) / 2).backward()
    for rank in range(2):
        for got, (name, p) in zip(torch.load(tmp_path / f"{rank}.pt"), model.named_parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-4, msg=name)


# ---- Accelerate and Lightning -------------------------------------------------------------------------------------------


def squared_error(model: nn.Module) -> Tensor:
    ids, mask = rectangle()
    return (model(ids, mask)["pooler_output"].float() - 0.5).square().mean()


def trained_by_hand(model: BertModel, steps: int, lr: float) -> list[Tensor]:
    """Parameters after plain steps of our AdamW, gradients clipped to norm 1."""
    optimizer = AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        squared_error(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_what_it_prepares(model: BertModel, precision: str) -> None:
    """In fp32 to the bits of a plain loop; in mixed precision the loss falls."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    expected = trained_by_hand(copy.deepcopy(model), 3, 1e-3)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    prepared, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=1e-3))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = squared_error(prepared)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    accelerate.state.AcceleratorState._reset_state(True)
    assert losses[-1] < losses[0]
    got = list(accelerator.unwrap_model(prepared).parameters())
    if precision == "no":
        assert all(torch.equal(p, q) for p, q in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about loaders and hardware
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_it(model: BertModel, precision: str, tmp_path: Path) -> None:
    """In fp32 to the bits of a plain loop; in mixed precision the loss falls."""
    lightning = pytest.importorskip("pytorch_lightning")
    expected = trained_by_hand(copy.deepcopy(model), 3, 1e-3)
    losses: list[float] = []

    class Regression(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def training_step(self, _batch: object) -> Tensor:
            loss = squared_error(self.encoder)
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> AdamW:
            return AdamW(self.parameters(), lr=1e-3)

    trainer = lightning.Trainer(
        max_steps=3, precision=precision, gradient_clip_val=1.0, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Regression(), torch.utils.data.DataLoader([0, 1, 2]))
    assert losses[-1] < losses[0]
    if precision == "32-true":
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))
