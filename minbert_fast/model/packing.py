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

    Rows from `num_tokens` on are padding: no sentence or task has them. Sentences from `num_sentences` on
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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {n: t.to(device, non_blocking=non_blocking) for n, t in self.tensors().items()}
        return replace(self, **moved)

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

    `types` gives token types in the same nesting (None: all 0). Capacities pad the token rows and the sentence count to
    fixed sizes; `max_seqlen` pins the bound on sentence length. `words` [U] are the distinct word ids, ascending, of all
    processes that train together: the rows of their word gradients then stand for the same words. Raises ValueError if
    the sentences exceed a capacity or the bound, an id is no int32, or a sentence has another number of types than of ids.
    """
    flat = [np.asarray(sentence) for task in sentences for sentence in task]
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

    def padded(values: Any, size: int = capacity, fill: int = 0) -> np.ndarray:
        out = np.full(size, fill, dtype=np.int32)
        out[: len(values)] = values
        return out

    def offsets(sizes: Any, size: int) -> np.ndarray:
        """Where each of `sizes` rows begins, then the end: [size + 1], which repeats the end."""
        return padded(np.concatenate([[0], np.cumsum(sizes)]), size + 1, num_tokens)

    tokens = _joined("sentences", flat)
    kinds = [np.asarray(kind) for task in types or () for kind in task]
    if types is not None and [len(kind) for kind in kinds] != lengths.tolist():
        raise ValueError("types: expected one for each word id, in the same nesting")
    cu_seqlens = offsets(lengths, rows)
    task_sentences = np.concatenate([[0], np.cumsum([len(task) for task in sentences])]).astype(np.int32)
    words = np.unique(tokens) if words is None else words
    counts = np.bincount(np.searchsorted(words, tokens), minlength=len(words))
    room = max(capacity, len(words))
    arrays = {
        "tokens": padded(tokens),
        "positions": padded(np.arange(num_tokens) - np.repeat(cu_seqlens[:num_sentences], lengths)),
        "types": padded(_joined("types", kinds)),
        "cu_seqlens": cu_seqlens,
        "task_tokens": cu_seqlens[task_sentences],
        "task_sentences": task_sentences,
        "word_ids": padded(words, room, -1),
        "word_order": padded(np.argsort(tokens, kind="stable")),
        "word_offsets": offsets(counts, room),
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return PackedBatch(
        **tensors, max_seqlen=bound, num_tokens=num_tokens, num_sentences=num_sentences, num_words=len(words)
    )


def _joined(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """All elements [N] int32. Raises ValueError naming the first that int32 cannot hold."""
    joined = np.concatenate([np.zeros(0, np.int32), *parts])
    narrow = joined.astype(np.int32, copy=False)
    wrong = narrow != joined
    if wrong.any():
        raise ValueError(f"{name} hold {joined[wrong][0]}, expected whole numbers that int32 can hold")
    return narrow
