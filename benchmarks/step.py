# SPDX-License-Identifier: Apache-2.0
"""Times the whole training step with and without gradient surgery: the naive step, tuned baselines, and ours.

FLOPs per step: 3 (forward, gradients of inputs, gradients of weights) x 2 x tokens x weights of the encoder's linear
layers, plus 3 x 4 x hidden size x sum of squared sentence lengths per layer for attention. Padding does not count.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import baselines, batches, harness
from benchmarks.baselines import Step
from benchmarks.gradients import CONFIGS
from benchmarks.harness import Candidate, Ceilings, Row
from minbert_fast import BertConfig, BertModel
from minbert_fast.common.provenance import package_version
from minbert_fast.common.schema import build
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.captured import GraphedStep
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel, build_tasks

KINDS = ("sentiment", "paraphrase", "similarity")
TASKS = (1, 2, 4, 8, 16)  # numbers of tasks in the scaling cases, which share ALL_EXAMPLES
ALL_EXAMPLES = 96
EXAMPLES = (8, 16, 32, 64, 128)  # per task in the scaling cases
BATCHES = 4
COMPILED = "transformers, compiled"
#: Candidates that a CPU leaves out of models wider than WIDEST_ON_CPU, and why.
LEFT_OUT = {
    COMPILED: "left out on a CPU: it compiles for longer than the others run, and needs more than 24 GB beside them",
    "naive, bf16": "left out on a CPU: it needs more than 24 GB beside the others",
}
WIDEST_ON_CPU = 384
GRAIN = 64  # ours on CUDA: token capacities are multiples of 64

LR = 1e-5  # of the timed steps
CHECKED_STEPS = 3
CHECKED_OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.0), "eps": 0.1, "clip": 0.0}
APART = {torch.float32: 0.005, torch.bfloat16: 0.08}  # the most that a candidate's change may differ, as a share of it

Maker = Callable[[MultitaskModel, Recipe], Step]


@dataclass(frozen=True)
class Timing:
    """Rounds of one step per candidate, and the seconds after which a candidate is not called again."""

    repeats: int = 7
    seconds: float = 30.0


TIMING = Timing()


def run(device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """The cost of surgery, our scaling over tasks and tokens, then both shapes against all baselines."""
    low = lowest_precision(device, ceilings)
    for shape, config in CONFIGS.items():
        yield from cost_of_surgery(shape, config, low, device, ceilings)
    yield from scaling(CONFIGS["MiniLM-L6"], low, device, ceilings)
    for method in ("pcgrad", "none"):
        for shape, config in CONFIGS.items():
            name = f"{shape}, 3 x 32 examples, {method}"
            makers = candidate_makers(method, low, device)
            if device.type == "cuda":
                makers.pop(COMPILED, None)  # a suite of its own, benchmarks/compiled.py
            elif config.hidden_size > WIDEST_ON_CPU:
                for candidate in [key for key in LEFT_OUT if key in makers]:
                    del makers[candidate]
                    yield Row("step", name, candidate, note=LEFT_OUT[candidate])
            yield from run_case(name, makers, config, 3, 32, device, ceilings, method)


def cost_of_surgery(
    shape: str, config: BertConfig, low: torch.dtype, device: torch.device, ceilings: Ceilings
) -> Iterator[Row]:
    """Our step without and with PCGrad, timed in turns, so that noise of the machine affects both."""
    methods = {"ours, summed losses": "none", "ours, PCGrad": "pcgrad"}
    makers = {key: partial(Ours, dtype=low, device=device) for key in methods}
    rows = run_case(f"{shape}, cost of surgery", makers, config, 3, 32, device, ceilings, methods)
    yield from rows
    without, surgical = (row.median for row in rows)
    if without and surgical:
        yield Row("step", f"{shape}, cost of surgery", "share", note=f"{surgical / without - 1:.1%} over summed losses")


def scaling(config: BertConfig, low: torch.dtype, device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """Our step over 1 to 16 tasks and over tokens, and the plane fitted to the times."""
    sizes = [("more tasks", tasks, ALL_EXAMPLES // tasks) for tasks in TASKS]
    sizes += [("more examples", 3, examples) for examples in EXAMPLES]
    points = []
    for kind, tasks, examples in sizes:
        makers = {f"ours, {kind}": partial(Ours, dtype=low, device=device)}
        name = f"MiniLM-L6, {tasks} x {examples} examples, {kind}"
        for row in run_case(name, makers, config, tasks, examples, device, ceilings):
            yield row
            if row.median and row.tokens:
                points.append((row.tokens, tasks, row.median))
    if len(points) == len(sizes):
        yield Row("step", "MiniLM-L6, scaling", "ours", note=describe_fit(points))


def describe_fit(points: Sequence[tuple[int, int, float]]) -> str:
    """The plane through (tokens, tasks, milliseconds) with the least relative squared errors, in words."""
    tokens, tasks, times = np.array(points, dtype=float).T
    columns = np.stack([np.ones_like(tokens), tokens, tasks], 1)
    (base, each, task), *_ = np.linalg.lstsq(columns / times[:, None], np.ones_like(times))
    off = np.abs(columns @ (base, each, task) / times - 1)
    return (
        f"{base:.3g} ms + {1e3 * each:.3g} ms a thousand tokens + {task:.3g} ms a task: "
        f"off by {off.mean():.1%} on average, {off.max():.1%} at most"
    )


def lowest_precision(device: torch.device, ceilings: Ceilings) -> torch.dtype:
    """bf16 if its products are faster than those in fp32, else fp32."""
    return torch.bfloat16 if device.type == "cuda" or ceilings.bf16 > 1.2 * ceilings.fp32 else torch.float32


def candidate_makers(method: str, low: torch.dtype, device: torch.device) -> dict[str, Maker]:
    """Functions that build each candidate's step from a model and a recipe."""
    surgery = method != "none"
    makers: dict[str, Maker] = {"ours": partial(Ours, dtype=low, device=device)}
    if low != torch.float32:
        makers["ours, fp32"] = partial(Ours, dtype=torch.float32, device=device)
    makers["packed, torch's kernels"] = partial(baselines.PackedStep, dtype=low)
    if package_version("transformers") and (not surgery or package_version("torchjd")):
        makers["transformers"] = partial(baselines.PaddedStep, dtype=low)
        if low != torch.float32:
            makers["transformers, fp32"] = partial(baselines.PaddedStep, dtype=torch.float32)
        makers[COMPILED] = partial(baselines.PaddedStep, dtype=low, grain=baselines.GRAIN, compiled=True)
    makers["naive"] = naive
    if low != torch.float32:
        makers["naive, bf16"] = partial(baselines.NaiveStep, dtype=low)
    return makers


class Ours:
    """Our step; on CUDA as graphs."""

    def __init__(self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self.dtype = dtype
        step = OnePassStep(model, recipe, dtype)
        self.taken = GraphedStep(step) if device.type == "cuda" else step

    def prepare(self, batch: MultitaskBatch) -> None:
        """Nothing: the batch is packed."""

    def __call__(self, batch: MultitaskBatch) -> Tensor:
        return self.taken(batch, 1.0).losses

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())


def with_surgery(recipe: Recipe, method: str) -> Recipe:
    return recipe.with_values({"surgery": {"method": method}}, "benchmark")


def naive(model: MultitaskModel, recipe: Recipe) -> Step:
    return baselines.NaiveStep(model, recipe, torch.float32)


def make_model(config: BertConfig, tasks: int, device: torch.device) -> tuple[MultitaskModel, Recipe]:
    """A model with random weights and `tasks` tasks of the three kinds in turn, and its recipe."""
    kinds = itertools.islice(itertools.cycle(KINDS), tasks)
    names = {f"{kind}{i}" if tasks > 3 else kind: {"kind": kind} for i, kind in enumerate(kinds)}
    recipe = build(Recipe, {"tasks": names, "optimizer": {"lr": LR, "clip": 0.0}}, "benchmark")
    torch.manual_seed(0)
    return MultitaskModel(BertModel(config), build_tasks(recipe), "mean").to(device), recipe


def run_case(
    name: str,
    makers: Mapping[str, Maker],
    config: BertConfig,
    tasks: int,
    examples: int,
    device: torch.device,
    ceilings: Ceilings,
    method: str | Mapping[str, str] = "pcgrad",
) -> list[Row]:
    """The rows of one case; `method` is the surgery of all candidates, or of each by name."""
    model, recipe = make_model(config, tasks, device)
    methods = {key: method if isinstance(method, str) else method[key] for key in makers}
    made = [batch.to(device) for batch in batches.make_batches(model, BATCHES, examples)]
    tokens = sum(batch.packed.num_tokens for batch in made) // BATCHES
    flops = sum(count_flops(config, batch) for batch in made) // BATCHES
    steps = {key: maker(copy.deepcopy(model), with_surgery(recipe, methods[key])) for key, maker in makers.items()}
    capacity = -(-max(batch.packed.num_tokens for batch in made) // GRAIN) * GRAIN
    padded = [batch.to(device) for batch in batches.make_batches(model, BATCHES, examples, capacity)]
    candidates = {}
    for key, step in steps.items():
        source = padded if key.startswith("ours") and device.type == "cuda" else made
        for batch in source:
            step.prepare(batch)
        run = partial(step_on_next, step, itertools.cycle(source))
        check = partial(warm_up_and_check, run, key, makers[key], config, methods[key], device)
        candidates[key] = Candidate(run, check, flops=flops)
    timer = partial(harness.measure, repeats=TIMING.repeats, seconds=TIMING.seconds)
    product = "bf16" if ceilings.bf16 > ceilings.fp32 else "fp32"
    others = [key for key in candidates if not key.startswith("ours")]
    rows = harness.case("step", name, candidates, device, ceilings, baselines=others, product=product, timer=timer)
    for row in rows:
        if row.median:
            row.tokens = tokens
            row.tokens_per_second = 1e3 * tokens / row.median
            row.working_megabytes = working_memory(candidates[row.name].run, device) / 1e6
        row.note = row.note or f"{tokens} tokens, {batches.sentence_pools()[0]}"
    del steps, candidates
    gc.collect()
    return rows


def step_on_next(step: Step, source: Iterator[MultitaskBatch]) -> Tensor:
    return step(next(source))


def warm_up_and_check(
    run: Callable[[], object], name: str, make: Maker, config: BertConfig, method: str, device: torch.device
) -> None:
    """Warms the candidate up for timing, and checks a small model with the same kind of step."""
    warm_up(run, device, name)
    steps_agree(make, config, method, device)


def warm_up(run: Callable[[], object], device: torch.device, name: str) -> None:
    """Runs steps until kernels are compiled, graphs captured (at a bucket's second batch) and allocators filled.

    On a CPU, a step without torch.compile is warm after one call.
    """
    rounds = 2 * BATCHES if device.type == "cuda" else BATCHES if "compiled" in name else 1
    for _ in range(rounds):
        run()
    harness.synchronize(device)


def count_flops(config: BertConfig, batch: MultitaskBatch) -> int:
    """FLOPs of one step, without padding."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = batch.packed.cu_seqlens.diff().double()
    linear = 2 * batch.packed.num_tokens * (4 * width * width + 2 * width * inner)
    attention = 4 * width * int(lengths.square().sum())
    return 3 * layers * (linear + attention)


def steps_agree(make: Maker, config: BertConfig, method: str, device: torch.device) -> None:
    """Compares the first losses, and parameters after three steps at a learning rate of 1e-2, with the reference's in fp32.

    Two layers without dropout. AssertionError if the change of any part of the model differs from the reference's by more
    than APART of it. With beta2 = 0 and a large epsilon the course's AdamW and torch's compute the same, a step depends on
    the gradient's size, m / (|g| + eps), and rounding does not grow: with a small epsilon two bf16 runs soon part.
    PCGrad of two tasks does not depend on their order. A step with graphs runs the first batch eagerly, captures a graph at
    the second, and replays it for the second and the third.
    """
    small = replace(config, num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, recipe = make_model(small, 3 if method == "none" else 2, device)
    no_dropout: dict[str, Any] = {name: {"dropout": 0.0} for name in recipe.tasks}
    values = {"tasks": no_dropout, "optimizer": CHECKED_OPTIMIZER}
    recipe = with_surgery(recipe.with_values(values, "benchmark"), method)
    model = MultitaskModel(model.encoder, build_tasks(recipe), "mean").to(device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected, found = naive(copy.deepcopy(model), recipe), make(copy.deepcopy(model), recipe)
    low = getattr(found, "dtype", torch.float32)
    tolerance = APART[low]
    for number, batch in enumerate(checked_batches(model)):
        batch = batch.to(device)
        for step in (expected, found):
            step.prepare(batch)
        losses, others = found(batch), expected(batch)
        if number == 0:  # later ones follow from the parameters
            torch.testing.assert_close(losses, others, rtol=tolerance, atol=tolerance)
    wanted, own = ({name: p.detach() for name, p in step.parameters().items()} for step in (expected, found))
    for part, names in parts_of(own).items():
        change = torch.cat([(wanted[name] - before[name]).flatten() for name in names])
        error = torch.cat([(own[name].to(device) - wanted[name]).flatten() for name in names])
        apart = float(error.norm() / change.norm())
        assert apart <= tolerance, f"{part} changed by {apart:.1%} otherwise than in the reference's three steps"


def checked_batches(model: MultitaskModel) -> list[MultitaskBatch]:
    """CHECKED_STEPS different batches of one bucket, so that a step with graphs captures one and replays it."""
    capacity = max(batch.packed.num_tokens for batch in batches.make_batches(model, CHECKED_STEPS, 4))
    made = batches.make_batches(model, CHECKED_STEPS, 4, capacity)
    longest = max(batch.packed.max_seqlen for batch in made)
    return [replace(batch, packed=replace(batch.packed, max_seqlen=longest)) for batch in made]


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The trained parameters by part of the model: embeddings, each encoder layer, each head."""
    parts: dict[str, list[str]] = {}
    for name in names:
        if "pooler" not in name:
            words = name.split(".")
            kind = "embeddings" if "embed" in words[1] else ".".join(words[1:3]) if words[0] == "encoder" else words[1]
            parts.setdefault(kind, []).append(name)
    return parts


def working_memory(step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that one step allocates beyond weights, moments and other memory that stays."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        return 0
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    peak.write_text("5")  # resets the peak
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))
