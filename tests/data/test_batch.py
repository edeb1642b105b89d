# SPDX-License-Identifier: Apache-2.0
"""A batch moves as one buffer: every tensor is a view of it, with the values of the batch that was packed."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minbert_fast.data.batch import MultitaskBatch, StepTotals
from minbert_fast.model.packing import pack

EMPTY = torch.zeros(0)
#: Labels of each kind that a batch may have, by task; a task without labels has no entry.
LABELS: dict[str, dict[str, Tensor]] = {
    "dtypes": {"a": torch.tensor([3, 1, 2]), "b": torch.tensor([0.5, 0.25]), "c": torch.tensor([True])},
    "an empty task": {"a": torch.tensor([3, 1, 2]), "b": EMPTY, "c": torch.tensor([7.0])},
    "columns": {"a": torch.arange(6).view(3, 2), "b": torch.arange(4.0).view(2, 2).T, "c": EMPTY.view(0, 2)},
    "none": {},
}


def batch_of(labels: dict[str, Tensor], empty: str = "") -> MultitaskBatch:
    sizes = {name: 0 if name == empty else n for name, n in {"a": 3, "b": 2, "c": 1}.items()}
    rng = np.random.default_rng(0)
    sentences = [[rng.integers(1, 50, 1 + i) for i in range(n)] for n in sizes.values()]
    packed = pack(sentences, token_capacity=13, sentence_capacity=9)
    return MultitaskBatch(
        packed, tuple(sizes), dict.fromkeys(sizes, 1), labels, {n: np.arange(k) for n, k in sizes.items()}
    )


def same(found: MultitaskBatch, expected: MultitaskBatch) -> None:
    assert found.labels.keys() == expected.labels.keys()
    assert [t.dtype for t in found.tensors()] == [t.dtype for t in expected.tensors()]
    assert all(map(torch.equal, found.tensors(), expected.tensors()))  # and the shapes
    for name, value in vars(expected.packed).items():
        assert isinstance(value, Tensor) or getattr(found.packed, name) == value
    assert (found.tasks, found.arity) == (expected.tasks, expected.arity)
    assert {n: r.tolist() for n, r in found.rows.items()} == {n: r.tolist() for n, r in expected.rows.items()}


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("wrong", [2**32 + 5, -(2**32) + 5, 2.7])
def test_ids_that_are_no_int32_are_refused(wrong: float) -> None:
    """2 ** 32 + 5 of an int64 array was word 5, and 2.7 word 2."""
    with pytest.raises(ValueError, match=f"^sentences hold {wrong}, expected whole numbers"):
        pack([[np.array([1, wrong, 3])]])
    with pytest.raises(ValueError, match=f"^types hold {wrong}, expected whole numbers"):
        pack([[[1, 2, 3]]], [[[0, wrong, 0]]])


@pytest.mark.parametrize("types", [[[[0, 1, 1]]], [[[0, 1], [0, 1, 1]]]])
def test_every_id_needs_a_type(types: list[list[list[int]]]) -> None:
    """Missing ones were 0, and those of a longer sentence went to the next one."""
    with pytest.raises(ValueError, match=r"^types: expected one for each word id, in the same nesting$"):
        pack([[[5, 6, 7], [8, 9]]], types)


@pytest.mark.parametrize("kind", LABELS)
def test_all_tensors_are_views_of_one_buffer(kind: str) -> None:
    batch = batch_of(LABELS[kind], empty="b" if kind == "an empty task" else "")
    moved = batch.clone()
    same(moved, batch)
    assert moved.buffer is not None
    assert {storage(t) for t in moved.tensors()} == {storage(moved.buffer)}
    ends = [0]
    for tensor in moved.tensors():
        begin = tensor.storage_offset() * tensor.element_size()
        assert begin % 16 == 0
        assert begin >= ends[-1], "overlapping tensors"
        ends.append(begin + tensor.numel() * tensor.element_size())
    assert ends[-1] <= moved.buffer.numel()
    moved.buffer.zero_()
    assert not any(t.any() for t in moved.tensors())
    same(batch, batch_of(LABELS[kind], empty="b" if kind == "an empty task" else ""))


@pytest.mark.parametrize("kind", LABELS)
def test_a_copy_of_the_bytes_is_a_copy_of_the_batch(kind: str) -> None:
    """As a graph takes a batch of its bucket: from a batch in one buffer, and from one whose tensors are apart."""
    batch = batch_of(LABELS[kind])
    own = batch.clone()
    assert own.buffer is not None
    for source in (batch, batch.clone()):
        own.buffer.fill_(255)
        own.buffer.copy_(source.staged())
        same(own, batch)


def test_copies_share_no_memory() -> None:
    batch = batch_of(LABELS["dtypes"])
    for source in (batch, batch.clone()):
        for made in (source.clone(), pickle.loads(pickle.dumps(source)), copy.deepcopy(source)):
            same(made, batch)
            assert not {storage(t) for t in made.tensors()} & {storage(t) for t in source.tensors()}
            same(made.clone(), batch)


def test_a_share_knows_the_tasks_and_tokens_of_the_whole_step() -> None:
    """A process without examples of a task must take the step of its head all the same."""
    share = batch_of({}, empty="b")
    assert share.active_tasks() == ["a", "c"]
    share = replace(share, totals=StepTotals({"a": 12, "b": 4, "c": 1}, tokens=999))
    assert share.active_tasks() == ["a", "b", "c"]
    assert [share.loss_fraction(task) for task in "abc"] == [0.25, 0.0, 1.0]
    assert share.step_tokens == 999


def test_a_batch_that_is_there_stays_as_it_is() -> None:
    batch = batch_of(LABELS["dtypes"])
    assert batch.to("cpu") is batch
    assert batch.staged().device.type == "cpu"
    assert batch.buffer is None
    meta = batch.to("meta")
    assert meta.buffer is not None
    assert [(t.shape, t.dtype) for t in meta.tensors()] == [(t.shape, t.dtype) for t in batch.tensors()]


def test_a_changed_batch_has_another_buffer() -> None:
    """`replace` must not carry the bytes of the labels that it replaces."""
    batch = batch_of(LABELS["dtypes"]).clone()
    changed = replace(batch, labels={**batch.labels, "a": torch.tensor([9, 9, 9])})
    assert changed.buffer is None
    assert changed.clone().labels["a"].tolist() == [9, 9, 9]


@pytest.mark.gpu
def test_a_pinned_batch_reaches_the_device_by_one_copy() -> None:
    batch = batch_of(LABELS["columns"])
    pinned = batch.pin_memory()
    assert all(t.is_pinned() for t in pinned.tensors() if t.numel())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        moved = pinned.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "HtoD" in event.key) == 1
    same(moved.to("cpu"), batch)
