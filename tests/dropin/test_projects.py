# SPDX-License-Identifier: Apache-2.0
"""Ways in which course projects use the model, in our own words: each runs, learns, and means what it says."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from minbert_fast import AdamW, BertLayer, BertModel
from tests.dropin.cases import WIDTH, close, course, course_layer, small


def examples(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Word ids, mask [n, 9] with padding, and labels [n] that the first word decides."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 97, (n, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    return ids * mask, mask, (ids[:, 0] > 48).long()


def quiet(**changes: Any) -> BertModel:
    return small(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.05, **changes)


def train(model: nn.Module, groups: Iterable[Any], steps: int = 25, lr: float = 2e-3) -> list[float]:
    """Losses of a classifier's training."""
    optimizer = AdamW(groups, lr=lr)
    ids, mask, labels = examples()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids, mask), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Classifier(nn.Module):
    """The course's classifier, with or without fine-tuning."""

    def __init__(self, bert: nn.Module, finetune: bool = True) -> None:
        super().__init__()
        self.bert = bert
        for p in self.bert.parameters():
            p.requires_grad = finetune
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.dropout(self.bert(input_ids, attention_mask)["pooler_output"]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("finetune", [False, True], ids=["last-linear-layer", "full-model"])
def test_a_classifier_with_a_frozen_or_a_trained_encoder(finetune: bool) -> None:
    model = Classifier(quiet(), finetune)
    before = copy.deepcopy(model.bert.state_dict())
    losses = train(model, model.parameters(), lr=2e-3 if finetune else 2e-2)
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, t in model.bert.state_dict().items() if not torch.equal(t, before[name])}
    assert bool(moved) == finetune
    assert all((p.grad is not None) == finetune for p in model.bert.bert_layers.parameters())


def test_similarity_of_masked_means() -> None:
    """Siamese sentence vectors: the mean of attended positions, compared by their cosine."""
    bert, (ids, mask, _) = quiet(), examples()

    def vectors(ids: Tensor, mask: Tensor) -> Tensor:
        hidden = bert(ids, mask)["last_hidden_state"]
        weights = mask.unsqueeze(-1).float()
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)

    expected = course(bert, ids, mask).sum(1) / mask.sum(1, keepdim=True)
    close(vectors(ids, mask), expected)
    loss = F.mse_loss(
        F.cosine_similarity(vectors(ids[:6], mask[:6]), vectors(ids[6:], mask[6:])), torch.linspace(0, 1, 6)
    )
    loss.backward()
    assert all(p.grad is not None for n, p in bert.named_parameters() if "pooler" not in n)


def test_adversarial_noise_on_the_embeddings() -> None:
    """SMART: noise between `embed` and `encode`, moved along its gradient, raises the divergence."""
    model, (ids, mask, _) = Classifier(quiet()).eval(), examples()

    def logits(embedded: Tensor) -> Tensor:
        hidden = model.bert.encode(embedded, mask)
        return model.head(model.bert.pooler_af(model.bert.pooler_dense(hidden[:, 0])))

    embedded = model.bert.embed(ids)
    clean = logits(embedded)
    close(clean, model(ids, mask))
    noise = (1e-3 * torch.randn_like(embedded)).requires_grad_()

    def apart(noise: Tensor) -> Tensor:
        return F.kl_div(logits(embedded + noise).log_softmax(-1), clean.softmax(-1).detach(), reduction="batchmean")

    (gradient,) = torch.autograd.grad(apart(noise), noise)
    assert (gradient[mask == 0] == 0).all()
    assert (gradient[mask == 1] != 0).any()
    assert apart(0.05 * gradient / gradient.norm()) > 0
    assert apart(gradient / gradient.norm()) > apart(0.1 * gradient / gradient.norm())


def test_learning_rates_by_layer() -> None:
    """Groups by name: deeper layers learn slower; a layer with rate 0 stays."""
    model = Classifier(quiet())

    def depth(name: str) -> int:
        found = re.search(r"bert_layers\.(\d+)\.", name)
        return int(found[1]) + 1 if found else (0 if "embed" in name else 4)

    groups = [
        {"params": [p], "lr": 0.0 if depth(n) <= 1 else 1e-3 * 0.8 ** (4 - depth(n))}
        for n, p in model.named_parameters()
    ]
    before = copy.deepcopy(model.state_dict())
    losses = train(model, groups)
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        if "position_ids" not in name and "tk_type" not in name:
            still = torch.equal(tensor, before[name])
            assert still or depth(name) > 1, name
    assert not torch.equal(model.bert.bert_layers[2].out_dense.weight, before["bert.bert_layers.2.out_dense.weight"])


def test_unfreezing_the_last_layers() -> None:
    model = Classifier(quiet(), finetune=False)
    for layer in model.bert.bert_layers[-2:]:
        for p in layer.parameters():
            p.requires_grad = True
    before = copy.deepcopy(model.bert.state_dict())
    losses = train(model, (p for p in model.parameters() if p.requires_grad))
    assert losses[-1] < losses[0]
    moved = {name.split(".")[1] for name, t in model.bert.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {"1", "2"}


def test_another_pooler() -> None:
    bert = quiet()
    bert.pooler_dense = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
    bert.pooler_af = nn.Identity()
    ids, mask, _ = examples()
    close(bert(ids, mask)["pooler_output"], bert.pooler_dense(course(bert, ids, mask)[:, 0]))
    losses = train(Classifier(bert), bert.pooler_dense.parameters())
    assert losses[-1] < losses[0]


def test_layers_of_ones_own_on_top() -> None:
    """A task's own BertLayer above the shared encoder, called with the extended mask."""

    class TaskLayer(nn.Module):
        def __init__(self, bert: BertModel) -> None:
            super().__init__()
            self.bert = bert
            self.extra = BertLayer(bert.config)
            self.head = nn.Linear(WIDTH, 2)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            hidden = self.bert(ids, mask)["last_hidden_state"]
            extended = self.bert.get_extended_attention_mask(mask, self.bert.dtype)
            return self.head(self.extra(hidden, extended)[:, 0])

    model, (ids, mask, _) = TaskLayer(quiet()), examples()
    extended = (1.0 - mask[:, None, None, :].float()) * -10000.0
    close(model(ids, mask), model.head(course_layer(model.extra, course(model.bert, ids, mask), extended)[:, 0]))
    losses = train(model, model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
def test_lora_by_replacing_modules_found_by_name() -> None:
    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
            super().__init__()
            self.base, self.scale = base, alpha / rank
            self.down, self.up = (
                nn.Linear(base.in_features, rank, bias=False),
                nn.Linear(rank, base.out_features, bias=False),
            )
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.scale * self.up(self.down(x))

    bert, (ids, mask, _) = quiet(), examples()
    before = bert(ids, mask)["last_hidden_state"]
    model = Classifier(bert, finetune=False)
    for name, module in list(bert.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(("query", "value")):
            parent, _, leaf = name.rpartition(".")
            setattr(bert.get_submodule(parent), leaf, LoRA(module, 4, 8.0))
    close(bert(ids, mask)["last_hidden_state"], before)  # B starts from zero
    losses = train(model, (p for p in model.parameters() if p.requires_grad), lr=1e-2)
    assert losses[-1] < losses[0]
    assert not torch.allclose(bert(ids, mask)["last_hidden_state"], before, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
def test_bottleneck_adapters_behind_the_dense_layers() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up(F.gelu(self.down(x)))

    bert, (ids, mask, _) = quiet(), examples()
    model = Classifier(bert, finetune=False)
    for layer in bert.bert_layers:
        layer.out_dense = nn.Sequential(layer.out_dense, Adapter())
    close(bert(ids, mask)["last_hidden_state"], course(bert, ids, mask))
    losses = train(model, (p for p in model.parameters() if p.requires_grad), lr=1e-2)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")
def test_layers_that_take_a_task() -> None:
    """Projected attention layers: a subclass of BertLayer, and a model whose encode and forward hand the task through."""

    class TaskBertLayer(BertLayer):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.by_task = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))

        def forward(self, hidden_states: Tensor, attention_mask: Tensor, task: int = 0) -> Tensor:
            return super().forward(hidden_states, attention_mask) + self.by_task[task](hidden_states)

    class TaskBert(BertModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert_layers = nn.ModuleList(TaskBertLayer(config) for _ in range(config.num_hidden_layers))
            self.init_weights()

        def encode(self, hidden_states: Tensor, attention_mask: Tensor, task: int = 0) -> Tensor:
            extended = self.get_extended_attention_mask(attention_mask, self.dtype)
            for layer in self.bert_layers:
                hidden_states = layer(hidden_states, extended, task)
            return hidden_states

        def forward(self, input_ids: Tensor, attention_mask: Tensor, task: int = 0) -> dict[str, Tensor]:  # type: ignore[override]
            hidden = self.encode(self.embed(input_ids=input_ids), attention_mask, task)
            return {"last_hidden_state": hidden, "pooler_output": self.pooler_af(self.pooler_dense(hidden[:, 0]))}

    model, (ids, mask, _) = TaskBert(quiet().config), examples()
    model.load_state_dict(quiet().state_dict(), strict=False)
    first, second = (model(ids, mask, task)["pooler_output"] for task in (0, 1))
    assert not torch.allclose(first, second)
    losses = train(Classifier(model), model.parameters())
    assert losses[-1] < losses[0]


def test_an_old_checkpoint_of_the_course(tmp_path: Path) -> None:
    """{"model": ...} of a classifier around the encoder, written before the buffer was in the state."""
    source = Classifier(quiet())
    optimizer = AdamW(source.parameters(), lr=1e-3)
    state = {name: t for name, t in source.state_dict().items() if "position_ids" not in name}
    torch.save({"model": state, "optim": optimizer.state_dict(), "args": {"lr": 1e-3}}, tmp_path / "old.pt")
    target = Classifier(BertModel(source.bert.config))
    target.load_state_dict(torch.load(tmp_path / "old.pt")["model"])
    ids, mask, _ = examples()
    assert torch.equal(target.eval()(ids, mask), source.eval()(ids, mask))


def test_averages_of_the_weights(fused_layers: list[Any]) -> None:
    """EMA by torch's AveragedModel, which copies the model deeply, and a copy by hand; both stay fused."""
    model, (ids, mask, _) = Classifier(quiet()), examples()
    model(ids, mask)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    best = copy.deepcopy(model)
    expected = best(ids, mask)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(ids, mask).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    del fused_layers[:]
    assert torch.equal(best(ids, mask), expected)
    assert not torch.allclose(average(ids, mask), model(ids, mask))
    assert len(fused_layers) == 9
    with torch.no_grad():
        close(average(ids, mask), average.module.head(average.module.bert(ids, mask)["pooler_output"]))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = Classifier(quiet()), Classifier(quiet())
    parts.load_state_dict(whole.state_dict())
    ids, mask, labels = examples()
    optimizers = [AdamW(m.parameters(), lr=1e-3, weight_decay=0.01) for m in (whole, parts)]
    for _ in range(3):
        F.cross_entropy(whole(ids, mask), labels).backward()
        for rows in torch.arange(12).split(4):
            (F.cross_entropy(parts(ids[rows], mask[rows]), labels[rows]) / 3).backward()
        for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_hidden_states_of_every_layer() -> None:
    """The layers walked by hand, their first tokens mixed with learned weights."""
    bert, (ids, mask, _) = quiet(), examples()
    extended = bert.get_extended_attention_mask(mask)
    hidden = bert.embed(ids)
    states = []
    for layer in bert.bert_layers:
        hidden = layer(hidden, extended)
        states.append(hidden)
    close(states[-1] * mask[:, :, None], bert(ids, mask)["last_hidden_state"])
    mix = nn.Parameter(torch.zeros(3))
    mixed = (torch.stack(states) * mix.softmax(0)[:, None, None, None]).sum(0)
    mixed.square().sum().backward()
    assert mix.grad is not None
    assert bert.bert_layers[0].self_attention.query.weight.grad is not None
