# SPDX-License-Identifier: Apache-2.0
"""The packed batch: all sentences of all tasks, concatenated without padding.

Rows of one task are contiguous, so a task is a range of token rows and a range of sentences; attention takes
`cu_seqlens`. Everything is made on the CPU with NumPy by the collator, then copied to the device once; nothing here
asks the device a question.

    task 0                          task 1
    [s0 tokens][s1 tokens][s2 ...]  [s3 tokens][s4 ...]        [padding up to the capacity]
    ^cu_seqlens[0]  ^[1]            ^task_tokens[1]            ^task_tokens[T] = num_tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Sentences of T tasks laid end to end. N token rows (capacity), B sentences (capacity), all indices int32.

    Rows from `num_tokens` on are padding: they belong to no sentence and no task. Sentences from `num_sentences` on
    are empty (`cu_seqlens` repeats its last offset), so that shapes can be kept to a few sizes for graph replay.
    """

    tokens: Tensor  # [N] word ids
    positions: Tensor  # [N] position of the token in its sentence
    types: Tensor  # [N] token type (0 first segment, 1 second)
    cu_seqlens: Tensor  # [B + 1] first row of each sentence, then the end
    task_tokens: Tensor  # [T + 1] first token row of each task, then the end
    task_sentences: Tensor  # [T + 1] first sentence of each task, then the end
    word_ids: Tensor  # [U] distinct word ids, ascending (entries from num_words on are -1)
    word_order: Tensor  # [N] token rows sorted by (word id, row)
    word_offsets: Tensor  # [U + 1] where each distinct word's rows begin in word_order
    max_seqlen: int  # longest sentence, tokens (a bound, pinned under graph replay)
    num_tokens: int
    num_sentences: int
    num_words: int

    @property
    def num_tasks(self) -> int:
        return self.task_tokens.numel() - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {n: t.to(device, non_blocking=non_blocking) for n, t in self.tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked host memory, from which copies to a GPU run beside its work."""
        pinned: dict[str, Any] = {n: t.pin_memory() for n, t in self.tensors().items()}
        return replace(self, **pinned)

    def clone(self) -> PackedBatch:
        """A copy that shares no memory with this one."""
        copies: dict[str, Any] = {n: t.clone() for n, t in self.tensors().items()}
        return replace(self, **copies)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {n: v for n, v in vars(self).items() if isinstance(v, Tensor)}


def pack(
    sentences: Sequence[Sequence[Sequence[int] | np.ndarray]],
    types: Sequence[Sequence[Sequence[int] | np.ndarray]] | None = None,
    token_capacity: int | None = None,
    sentence_capacity: int | None = None,
    max_seqlen: int | None = None,
    words: np.ndarray | None = None,
) -> PackedBatch:
    """Packs `sentences[task][sentence]`, each a sequence of word ids, into one batch.

    `types` gives token types in the same nesting (0 throughout when absent). Capacities pad the token rows and the
    sentence count to fixed sizes; `max_seqlen` pins the bound on sentence length. `words` are the distinct word ids,
    ascending, of all processes that train together, where this batch is one process's share of a step: the rows of their
    word gradients then stand for the same words.

    Raises ValueError where the sentences exceed a capacity or the bound.
    """
    flat = [np.asarray(sentence, dtype=np.int32) for task in sentences for sentence in task]
    lengths = np.array([len(sentence) for sentence in flat], dtype=np.int64)
    num_tokens, num_sentences = int(lengths.sum()), len(flat)
    capacity = num_tokens if token_capacity is None else token_capacity
    rows = num_sentences if sentence_capacity is None else sentence_capacity
    longest = int(lengths.max(initial=0))
    bound = longest if max_seqlen is None else max_seqlen
    if num_tokens > capacity or num_sentences > rows or longest > bound:
        raise ValueError(
            f"{num_tokens} tokens in {num_sentences} sentences of up to {longest} tokens do not fit "
            f"capacities of {capacity} tokens, {rows} sentences, {bound} tokens a sentence"
        )

    tokens = np.zeros(capacity, dtype=np.int32)
    kinds = np.zeros(capacity, dtype=np.int32)
    positions = np.zeros(capacity, dtype=np.int32)
    cu_seqlens = np.full(rows + 1, num_tokens, dtype=np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : num_sentences + 1] = np.cumsum(lengths)
    if num_tokens:
        tokens[:num_tokens] = np.concatenate(flat)
        positions[:num_tokens] = np.arange(num_tokens) - np.repeat(cu_seqlens[:num_sentences], lengths)
        if types is not None:
            kinds[:num_tokens] = np.concatenate([np.asarray(k, dtype=np.int32) for task in types for k in task])

    task_sentences = np.concatenate([[0], np.cumsum([len(task) for task in sentences])]).astype(np.int32)
    order = np.zeros(capacity, dtype=np.int32)
    order[:num_tokens] = np.argsort(tokens[:num_tokens], kind="stable")
    if words is None:
        words = np.unique(tokens[:num_tokens])
    counts = np.bincount(np.searchsorted(words, tokens[:num_tokens]), minlength=len(words))
    room = max(capacity, len(words))
    word_ids = np.full(room, -1, dtype=np.int32)
    word_ids[: len(words)] = words
    word_offsets = np.full(room + 1, num_tokens, dtype=np.int32)
    word_offsets[0] = 0
    word_offsets[1 : len(words) + 1] = np.cumsum(counts)

    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        types=torch.from_numpy(kinds),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        task_tokens=torch.from_numpy(cu_seqlens[task_sentences].copy()),
        task_sentences=torch.from_numpy(task_sentences),
        word_ids=torch.from_numpy(word_ids),
        word_order=torch.from_numpy(order),
        word_offsets=torch.from_numpy(word_offsets),
        max_seqlen=bound,
        num_tokens=num_tokens,
        num_sentences=num_sentences,
        num_words=len(words),
    )
