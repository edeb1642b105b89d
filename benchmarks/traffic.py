# SPDX-License-Identifier: Apache-2.0
"""Counts the launches of one captured training step and the bytes that they move, without a GPU.

    python -m benchmarks.traffic [--json FILE]
    python -m benchmarks.traffic --compile      compiles every kernel of such steps for an H100 instead

The step runs on tensors without storage. PyTorch's ops are counted as they are dispatched, Triton's kernels by their own
launchers, which see an H100. A launch's bytes are those of the tensors that it takes and makes, each once, from their
shapes: what the cache saves and what padding leaves untouched is not modelled. The table says nothing about time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gradients import CONFIGS
from benchmarks.step import KINDS
from minbert_fast import BertConfig, BertModel
from minbert_fast.common.schema import build
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.kernels.ahead_of_time import CHIPS, HEADER, Report, report
from minbert_fast.kernels.launches import Take, intercepted
from minbert_fast.kernels.linear import SPILLED
from minbert_fast.model.packing import pack
from minbert_fast.ops.library import OPS
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.captured import at_capacity, cloned
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel, build_tasks

H100 = next(chip for chip in CHIPS if chip.name == "sm_90")
EXAMPLES = 32  # a task
TOKENS = 17  # a sentence, as on average in the course's data
CAPACITY, LONGEST = 2816, 64  # token rows of the bucket, and its bound on a sentence's length

#: Ops of ours without a Triton kernel; an extension built with CUDA has one kernel for each.
_NATIVE = ("minbert_fast::pcgrad_weights", "minbert_fast::clip_scale")
#: PyTorch's ops that launch nothing, beside those that return views.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "promote_types"}
#: PyTorch's ops that launch several kernels on a GPU, as the profile of a captured step shows.
_SEVERAL = {"mse_loss": 2}
#: PyTorch's ops that read only some rows of a table: no more bytes of an argument than they make.
_GATHERS = {"index", "index_select", "gather", "searchsorted"}
#: Our kernels that read rows of tables: the tables, and the argument that has as many rows as they read.
_TABLES = {
    "_embedding_forward": (("word_ptr", "position_ptr", "type_ptr"), "y_ptr"),
    "_embedding_backward": (("word_ptr", "position_ptr", "type_ptr"), "dz_ptr"),
}
#: Our kernels that both read and write arguments.
_UPDATED = {"_adamw": ("p_ptr", "m_ptr", "v_ptr")}


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel of ours or an op of PyTorch, and the bytes it moves (all those of an op at its first kernel)."""

    name: str
    bytes: int


class Watch(TorchDispatchMode):
    """Notes the launches of everything that runs inside on tensors of the meta device."""

    def __init__(self, also: Take = lambda *launch: None) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._also = also  # told of each launch of a Triton kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in OPS and name not in _NATIVE:
            # A kernel that finds its tensors in a table moves those of its op.
            whole = sum(map(_size, _on_device(tree_leaves((args, kwargs)))))

            def take(kernel: Any, grid: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._take(kernel, args, kwargs, whole)
                self._also(kernel, grid, args, kwargs)

            with self, intercepted(H100.target, take, H100.name):
                return OPS[name].run(*args, **kwargs)
        out = func(*args, **kwargs)
        made = _on_device(tree_leaves(out))
        short = name.partition("::")[2]
        views = [each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns]
        taken = list(map(_size, _on_device(tree_leaves((args, kwargs)))))
        # An op without a result (`_foreach_copy_`) writes to its arguments.
        if short not in _FREE and (made and not all(views) if views else taken):
            results = list(map(_size, made))
            if short in _GATHERS:
                taken = [min(size, max(results)) for size in taken]
            self.launches.append(Launch(short, sum(taken) + sum(results)))
            self.launches += [Launch(short, 0)] * (_SEVERAL.get(short, 1) - 1)
        return out

    def _take(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], whole: int) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        if "table_ptr" in named:
            self.launches.append(Launch(kernel.__name__, whole))
            return
        sizes = {key: _size(value) for key, value in named.items() if isinstance(value, Tensor)}
        tables, rows = _TABLES.get(kernel.__name__, ((), ""))
        for table in tables:
            sizes[table] = min(sizes[table], sizes[rows])
        again = [sizes[key] for key in _UPDATED.get(kernel.__name__, ())]
        self.launches.append(Launch(kernel.__name__, sum(sizes.values()) + sum(again)))


def _on_device(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_meta]


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; a dimension of stride 0 counts as one element."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0]
    return math.prod(sizes) * tensor.element_size()


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, heads on the meta device dispatch the ops that they dispatch on a GPU.

    Autocast, which heads switch off, knows no meta device, and PyTorch has its fused dropout for CUDA tensors alone.
    """

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p else x

    def nothing(*arguments: object, **keywords: object) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    with mock.patch.object(torch, "autocast", nothing), mock.patch.object(torch.nn.functional, "dropout", dropout):
        yield


def make_step(config: BertConfig, method: str, longest: int) -> tuple[OnePassStep, MultitaskBatch]:
    """The step in bf16 on a model without storage, and its batch: three tasks, 32 examples each.

    `longest` is the bucket's bound on a sentence's length.
    """
    values = {"tasks": {kind: {"kind": kind} for kind in KINDS}, "surgery": {"method": method}}
    recipe = build(Recipe, values, "benchmarks.traffic")
    with torch.device("meta"):
        model = MultitaskModel(BertModel(config), build_tasks(recipe), recipe.model.pooling).to("meta")
    arity = {name: task.arity for name, task in model.tasks.items()}
    words = np.arange(1000, 1000 + TOKENS, dtype=np.int32)
    sentences = [[words] * (EXAMPLES * count) for count in arity.values()]
    dtypes = {"sentiment": torch.int64}
    labels = {name: torch.zeros(EXAMPLES, dtype=dtypes.get(name, torch.float32)) for name in arity}
    packed = pack(sentences, token_capacity=CAPACITY, max_seqlen=longest)
    rows = {name: np.arange(EXAMPLES) for name in arity}
    return OnePassStep(model, recipe, torch.bfloat16), MultitaskBatch(packed, tuple(arity), arity, labels, rows)


def launches(
    config: BertConfig, method: str = "pcgrad", longest: int = LONGEST, also: Take = lambda *launch: None
) -> list[Launch]:
    """The launches of one call of the captured step, in order, with the copies of its batch and of its result.

    `also` is told of each launch of a Triton kernel.
    """
    with as_on_cuda():
        step, batch = make_step(config, method, longest)
        own = batch.to("meta")
        assert own.buffer is not None
        with intercepted(H100.target, lambda *launch: None, H100.name):
            step(at_capacity(own), 1.0)  # the first step of a bucket runs eagerly
        watch, source = Watch(also), batch.staged()
        step.tables.set_aside(own.buffer.device)
        with watch:
            step.prepare(batch, 0.5)
            own.buffer.copy_(source)
            cloned(step.compute(at_capacity(own)))
        step.tables.write()
    return watch.launches


def compiled(config: BertConfig, method: str, longest: int) -> Iterator[Report]:
    """Compiles each Triton kernel of the step for an H100, once, and reports its resources.

    A kernel that only a step's own types and sizes would break fails here.
    """
    found: dict[str, Report] = {}

    def take(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        binary = kernel.warmup(*args, grid=grid, **kwargs)
        if binary.hash not in found:
            spilled = SPILLED if kernel.__name__ == "_weight_gradients" else 0
            found[binary.hash] = report(f"{method}, {longest} tokens", kernel.__name__, binary, H100, spilled)

    launches(config, method, longest, take)
    yield from found.values()


def compile_steps() -> bool:
    """Compiles the steps of both models, one with and one without surgery, and prints the reports: whether all is well."""
    print(HEADER)
    well = True
    for config, method in zip(CONFIGS.values(), ("none", "pcgrad"), strict=True):
        config = replace(config, num_hidden_layers=2)  # more layers launch the same kernels again
        for each in compiled(config, method, 2 * LONGEST):  # the kernels for short sentences and for long ones
            print(each, flush=True)
            well &= not each.failure
    return well


def summary(found: Sequence[Launch]) -> dict[str, Any]:
    """Launches and megabytes in all, and by kernel in the order of bytes."""
    count, moved = Counter(launch.name for launch in found), Counter[str]()
    for launch in found:
        moved[launch.name] += launch.bytes
    kernels = [
        {"kernel": name, "launches": count[name], "megabytes": round(moved[name] / 1e6, 2)}
        for name in sorted(count, key=lambda name: (-moved[name], -count[name], name))
    ]
    return {"launches": len(found), "megabytes": round(sum(moved.values()) / 1e6, 1), "kernels": kernels}


def table(name: str, found: Mapping[str, Any]) -> str:
    """The summary of one model as text."""
    lines = [f"{name}: {found['launches']} launches, {found['megabytes']:,.0f} MB", ""]
    lines += [f"{'kernel':36} launches       MB"]
    lines += [f"{row['kernel']:36} {row['launches']:8} {row['megabytes']:8,.1f}" for row in found["kernels"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    parser.add_argument("--compile", action="store_true", help="compile the kernels for an H100 instead")
    options = parser.parse_args(arguments)
    if options.compile:
        return int(not compile_steps())
    tables = {}
    for name, config in CONFIGS.items():
        tables[name] = summary(launches(config))
        print(table(name, tables[name]), end="\n\n")
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n")
    print(json.dumps({name: {key: found[key] for key in ("launches", "megabytes")} for name, found in tables.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
