# SPDX-License-Identifier: Apache-2.0
"""A course project's loop with the course's modules and with ours swapped in, eagerly: no graphs, no packing.

Each call is one step on three tasks: forward of a rectangle [sentences, positions] with padding, three losses, the classic
PCGrad (one backward a task), AdamW. "stock modules" calls every module of the same encoder on its own, as the course's
`bert.py` does, with torch's AdamW and a classic PCGrad loop; "swapped imports" calls the drop-in model, AdamW and PCGrad of
this package. A model whose time is the host's runs forward and backward alone, beside transformers too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import baselines, harness
from benchmarks.gradients import CONFIGS
from benchmarks.harness import Candidate, Ceilings, Row
from minbert_fast import AdamW, BertConfig, BertModel, PCGrad
from minbert_fast.step import naive

SENTENCES = (8, 32, 64)
POSITIONS, TASKS = 32, 3
#: The host's time is the model's: 12 layers on 2 sentences of up to 4 tokens.
SMALLEST = BertConfig(
    vocab_size=1000, hidden_size=64, num_hidden_layers=12, num_attention_heads=2, intermediate_size=256
)


def run(device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """The host's time, then both shapes at each batch size."""
    yield from host(device, ceilings)
    for shape, config in CONFIGS.items():
        torch.manual_seed(0)
        model = BertModel(config).to(device).train()
        for sentences in SENTENCES:
            ids, mask = rectangle(sentences, config.vocab_size, device)
            makers: dict[str, Callable[[BertModel], Callable[[], Tensor]]] = {
                "swapped imports": partial(swapped, ids=ids, mask=mask),
                "stock modules": partial(stock, ids=ids, mask=mask),
            }
            candidates = {name: Candidate(make(copy.deepcopy(model))) for name, make in makers.items()}
            name = f"{shape}, {sentences} sentences of up to {POSITIONS} tokens, {TASKS} tasks"
            yield from harness.case("dropin", name, candidates, device, ceilings, baselines=["stock modules"])


def host(device: torch.device, ceilings: Ceilings) -> list[Row]:
    """Forward and backward of SMALLEST, in training mode."""
    torch.manual_seed(0)
    model = BertModel(SMALLEST).to(device)
    other = baselines.as_transformers(model)
    model.train()
    ids, mask = rectangle(2, SMALLEST.vocab_size, device, positions=4)

    def step(module: torch.nn.Module, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            module.zero_grad()
            loss = forward().square().mean()
            loss.backward()
            return loss.detach()

        return run

    steps = {
        "swapped imports": step(model, lambda: model(ids, mask)["last_hidden_state"]),
        "stock modules": step(model, lambda: model.stock(ids, mask)),
        "transformers": step(other, lambda: other(ids, mask).last_hidden_state),
    }
    case = "forward and backward, 12 layers of width 64, 2 sentences of up to 4 tokens"
    candidates = {name: Candidate(run) for name, run in steps.items()}
    return harness.case("dropin", case, candidates, device, ceilings, baselines=["stock modules", "transformers"])


def rectangle(sentences: int, words: int, device: torch.device, positions: int = POSITIONS) -> tuple[Tensor, Tensor]:
    """Word ids and mask [sentences, positions]; lengths from a quarter of the positions to all."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, words, (sentences, positions), generator=generator)
    lengths = torch.randint(positions // 4, positions + 1, (sentences, 1), generator=generator)
    mask = (torch.arange(positions) < lengths).long()
    return (ids * mask).to(device), mask.to(device)


def losses(pooled: Tensor) -> list[Tensor]:
    """A scalar for each task from its share of the sentences' vectors [sentences, H]."""
    return [part.square().mean() - part.mean() for part in pooled.chunk(TASKS)]


def swapped(model: BertModel, ids: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    """One step by this package's drop-in parts."""
    optimizer = PCGrad(AdamW(model.parameters(), lr=1e-5))

    def step() -> Tensor:
        optimizer.zero_grad()
        found = losses(model(ids, mask)["pooler_output"])
        optimizer.pc_backward(found)
        optimizer.step()
        return torch.stack(found).detach()

    return step


def stock(model: BertModel, ids: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    """One step by plain modules, the classic PCGrad loop and torch's AdamW."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, eps=1e-6, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)

    def step() -> Tensor:
        found = losses(model.pool(model.stock(ids, mask)[:, 0]))
        gradients = naive.task_gradients(found, parameters)
        orders = [torch.randperm(TASKS, generator=generator).tolist() for _ in found]
        naive.write_gradient(parameters, naive.pcgrad(gradients, orders, "mean"))
        optimizer.step()
        return torch.stack(found).detach()

    return step
