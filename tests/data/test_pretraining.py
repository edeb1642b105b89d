# SPDX-License-Identifier: Apache-2.0
"""Examples generated from text: which words are masked and how, which sentences are paired, reproducibility."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.data.buckets import choose_buckets
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.collate import Collator
from minbert_fast.data.pretraining import (
    IGNORED,
    SentencePairing,
    WordMasking,
    collect_pairs,
    collect_sentences,
)
from minbert_fast.data.sampling import Sampler
from minbert_fast.data.sentences import Tokens
from minbert_fast.data.tokens import TokenTable
from minbert_fast.data.vocabulary import Vocabulary

FILES = {"sentiment": "ids-sst-train.csv", "paraphrase": "quora-train.csv", "similarity": "sts-train.csv"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(sample_directory().model)


@pytest.fixture(scope="module")
def tables(tokenizer: Tokenizer) -> dict[str, TokenTable]:
    folder = sample_directory().data
    return {task: tokenize_table(read_table(folder / name, task), tokenizer) for task, name in FILES.items()}


@pytest.fixture(scope="module")
def corpus(tables: dict[str, TokenTable]) -> TokenTable:
    return collect_sentences("mlm", list(tables.values()))


@pytest.fixture(scope="module")
def pairs(tables: dict[str, TokenTable]) -> TokenTable:
    return collect_pairs("nsp", [tables["paraphrase"], tables["similarity"]])


def special_ids(tokenizer: Tokenizer) -> list[int]:
    assert tokenizer.mask_id is not None
    return [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id]


# ---- Corpora ---------------------------------------------------------------------------------------------------------


def test_a_corpus_has_every_sentence_once_and_locates_it(corpus: TokenTable, tables: dict[str, TokenTable]) -> None:
    first, second = tables["paraphrase"].columns
    begin, n = len(tables["sentiment"]), len(tables["paraphrase"])
    assert len(corpus) == begin + 2 * n + 2 * len(tables["similarity"])
    (column,) = corpus.columns
    for row in (0, 3, n - 1):
        np.testing.assert_array_equal(column[begin + row], first[row])
        np.testing.assert_array_equal(column[begin + n + row], second[row])
        assert corpus.locate(begin + n + row) == tables["paraphrase"].locate(row)
    assert column.lengths.sum() == sum(c.lengths.sum() for table in tables.values() for c in table.columns)
    assert corpus.locate(2) == tables["sentiment"].locate(2)
    assert corpus.labels is None
    with pytest.raises(IndexError):
        corpus.locate(len(corpus))


def test_pairs_are_the_first_two_sentences(pairs: TokenTable, tables: dict[str, TokenTable]) -> None:
    n = len(tables["paraphrase"])
    assert (len(pairs), pairs.arity) == (n + len(tables["similarity"]), 2)
    for column in (0, 1):
        np.testing.assert_array_equal(pairs.columns[column][n + 5], tables["similarity"].columns[column][5])
    assert pairs.source_hash != collect_pairs("nsp", [tables["paraphrase"]]).source_hash


# ---- Masked words -----------------------------------------------------------------------------------------------------


def test_masks_are_15_percent_of_the_words_80_10_10(corpus: TokenTable, tokenizer: Tokenizer) -> None:
    """Counts over many sentences; each is within five standard deviations of its expected value."""
    rate, special = 0.15, special_ids(tokenizer)
    rows = np.arange(0, len(corpus), 6)
    made = WordMasking(tokenizer, rate, 7, "mlm")(corpus, rows, 3, 128)
    assert made.positions is not None
    words = chosen = masked = same = other = 0
    for row, (sequence, _), positions, targets in zip(rows, made.sequences, made.positions, made.targets, strict=True):
        whole = corpus.columns[0][row]
        ordinary = ~np.isin(whole, special)
        words += ordinary.sum()
        chosen += len(positions)
        assert ordinary[positions].all()
        assert (np.diff(positions) > 0).all()
        np.testing.assert_array_equal(targets, whole[positions])
        assert abs(len(positions) - rate * ordinary.sum()) < 1
        untouched = np.ones(len(whole), bool)
        untouched[positions] = False
        np.testing.assert_array_equal(sequence[untouched], whole[untouched])
        masked += (sequence[positions] == tokenizer.mask_id).sum()
        same += (sequence[positions] == targets).sum()
        replaced = sequence[positions][(sequence[positions] != tokenizer.mask_id) & (sequence[positions] != targets)]
        assert not np.isin(replaced, special).any()
        other += len(replaced)
    assert abs(chosen - rate * words) < 5 * np.sqrt(len(rows) / 4)  # only the rounding is random
    for count, share in ((masked, 0.8), (same, 0.1), (other, 0.1)):  # a random word is rarely the original one
        assert abs(count - share * chosen) < 5 * np.sqrt(share * (1 - share) * chosen)


def test_every_word_of_a_sentence_is_equally_likely_to_be_masked(tokenizer: Tokenizer) -> None:
    sentence = np.array([tokenizer.cls_id, 20, tokenizer.unk_id, 30, 40, 50, tokenizer.mask_id, 60, tokenizer.sep_id])
    table = one_column([sentence] * 4000)
    made = WordMasking(tokenizer, 0.3, 1, "mlm")(table, np.arange(4000), 0, 128)
    assert made.positions is not None
    counts = np.bincount(np.concatenate(made.positions), minlength=len(sentence))
    ordinary = np.array([1, 3, 4, 5, 7])
    assert counts.sum() == counts[ordinary].sum()
    assert np.abs(counts[ordinary] - 1200).max() < 5 * np.sqrt(4000 * 0.3 * 0.7)


@pytest.mark.parametrize("words", [0, 1, 2])
def test_the_shortest_sentences(words: int, tokenizer: Tokenizer) -> None:
    sentence = np.array([tokenizer.cls_id, *range(20, 20 + words), tokenizer.sep_id])
    made = WordMasking(tokenizer, 1.0, 0, "mlm")(one_column([sentence]), np.array([0]), 0, 128)
    assert made.num_targets == words
    assert made.labels().shape == (words, 2)


def test_a_vocabulary_without_a_mask_is_refused() -> None:
    bare = Tokenizer(Vocabulary({"[UNK]": 0, "[SEP]": 1, "[PAD]": 2, "[CLS]": 3, "word": 4}))
    with pytest.raises(ValueError, match=r"task mlm needs a \[MASK\]"):
        WordMasking(bare, 0.15, 0, "mlm")


def test_masks_depend_only_on_seed_task_step_and_row(corpus: TokenTable, tokenizer: Tokenizer) -> None:
    rows = np.array([5, 900, 17, 2000])

    def made(rows: np.ndarray, seed: int = 1, task: str = "mlm", step: int = 4) -> list[bytes]:
        return [ids.tobytes() for ids, _ in WordMasking(tokenizer, 0.5, seed, task)(corpus, rows, step, 128).sequences]

    assert made(rows) == made(rows)
    assert made(rows)[::-1] == made(rows[::-1])
    assert made(rows)[1:2] == made(rows[1:2])
    for changed in ({"seed": 2}, {"task": "other"}, {"step": 5}):
        assert not set(made(rows, **changed)) & set(made(rows))  # type: ignore[arg-type]


def test_masks_equal_pinned_values(tokenizer: Tokenizer) -> None:
    """Pinned values: a change of NumPy or of the order of random draws would change a resumed run."""
    sentence = np.array([tokenizer.cls_id, *range(100, 120), tokenizer.sep_id])
    made = WordMasking(tokenizer, 0.5, 11, "mlm")(one_column([sentence]), np.array([0]), 9, 128)
    assert made.positions is not None
    assert made.positions[0].tolist() == PINNED_POSITIONS
    assert made.sequences[0][0][made.positions[0]].tolist() == PINNED_WORDS


# ---- Pairs ------------------------------------------------------------------------------------------------------------


def test_half_of_the_pairs_have_another_rows_second_sentence(pairs: TokenTable) -> None:
    rows = np.arange(len(pairs))
    made = SentencePairing(3, "nsp")(pairs, rows, 0, 128)
    targets = made.labels()
    assert targets.shape == (len(pairs),)
    assert abs(targets.sum() - len(pairs) / 2) < 5 * np.sqrt(len(pairs) / 4)
    first, second = pairs.columns
    seconds = {tokens[1:].tobytes() for tokens in second}
    for row, (sequence, types), answer in zip(rows[:200], made.sequences, targets, strict=False):
        length = len(first[row])
        np.testing.assert_array_equal(sequence[:length], first[row])
        np.testing.assert_array_equal(types, np.arange(len(sequence)) >= length)
        ending = sequence[length:].astype(second[0].dtype)
        assert ending.tobytes() in seconds
        if not answer:
            np.testing.assert_array_equal(ending, second[row][1:])


def test_a_replaced_sentence_comes_from_any_other_row_equally_often() -> None:
    """With four rows, each of the other three is drawn about equally often."""
    table = two_columns([[1, 10 + i, 2] for i in range(4)], [[1, 20 + i, 2] for i in range(4)])
    met = np.zeros((4, 4), int)
    for step in range(1500):
        made = SentencePairing(0, "nsp")(table, np.arange(4), step, 16)
        for row, ((sequence, _), answer) in enumerate(zip(made.sequences, made.labels(), strict=True)):
            other = int(sequence[3]) - 20
            assert (other != row) == answer
            met[row, other] += 1
    expected = np.where(np.eye(4) > 0, 750, 250)
    assert (np.abs(met - expected) < 5 * np.sqrt(expected)).all()


def test_a_single_pair_is_never_replaced() -> None:
    table = two_columns([[1, 10, 2]], [[1, 20, 2]])
    assert all(SentencePairing(0, "nsp")(table, np.array([0]), step, 16).labels() == [0] for step in range(8))


# ---- Batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collator(corpus: TokenTable, pairs: TokenTable, tables: dict[str, TokenTable], tokenizer: Tokenizer) -> Collator:
    generators = {"mlm": WordMasking(tokenizer, 0.15, 5, "mlm"), "nsp": SentencePairing(5, "nsp")}
    rows = {"sentiment": tables["sentiment"], "mlm": corpus, "nsp": pairs}
    return Collator(rows, 24, {"nsp": "cross"}, generators=generators)


def test_labels_point_to_their_words_in_the_packed_batch(collator: Collator) -> None:
    rows = {"sentiment": np.arange(3), "mlm": np.arange(40, 52), "nsp": np.arange(4)}
    batch = collator(rows, step=2)
    begin = int(batch.packed.task_tokens[1])
    positions, targets = (batch.labels["mlm"][:, i] for i in (0, 1))
    plain = collator.tables["mlm"].columns[0]
    whole = np.concatenate([plain[row] for row in rows["mlm"]])
    np.testing.assert_array_equal(whole[positions], targets)
    assert (batch.packed.tokens[begin + positions] != targets).float().mean() > 0.5
    assert batch.targets == {"mlm": len(targets), "nsp": 4}
    assert batch.arity == {"sentiment": 1, "mlm": 1, "nsp": 1}
    assert batch.labels["nsp"].shape == (4,)


def test_a_resumed_run_gets_the_same_masks(collator: Collator) -> None:
    sampler = Sampler.from_tables(collator.tables, 8, "cycle", 1)

    def batches(start: int, stop: int) -> list[MultitaskBatch]:
        return [collator(sampler.rows(step), step) for step in range(start, stop)]

    whole, resumed = batches(0, 6), batches(3, 6)
    for one, two in zip(whole[3:], resumed, strict=True):
        assert torch.equal(one.packed.tokens, two.packed.tokens)
        assert all(torch.equal(one.labels[task], two.labels[task]) for task in one.labels)


def test_the_same_row_is_masked_differently_at_another_step(collator: Collator) -> None:
    rows = {"sentiment": np.arange(0), "mlm": np.arange(30), "nsp": np.arange(0)}
    assert not torch.equal(collator(rows, 0).labels["mlm"], collator(rows, 1).labels["mlm"])


def test_ranks_get_the_masks_of_a_single_process(collator: Collator) -> None:
    """The same words are masked for any number of processes; each process's labels point into its own token rows."""
    rows = {"sentiment": np.arange(5), "mlm": np.arange(100, 113), "nsp": np.arange(7)}
    whole = collator(rows, 6)
    parts = [
        Collator(collator.tables, 24, collator.encoders, rank=rank, ranks=3, generators=collator.generators)(rows, 6)
        for rank in range(3)
    ]
    for task in ("mlm", "nsp"):
        assert sum(part.loss_fraction(task) for part in parts) == pytest.approx(1)
        assert {part.totals.targets[task] for part in parts if part.totals} == {whole.targets[task]}
    index = whole.tasks.index("mlm")

    def seen(batch: MultitaskBatch) -> list[tuple[int, ...]]:
        begin, end = batch.packed.task_tokens[index : index + 2].tolist()
        tokens, starts = batch.packed.tokens[begin:end], batch.packed.positions[begin:end] == 0
        sentence = torch.cumsum(starts, 0) - 1
        return sorted(
            (
                int(batch.rows["mlm"][sentence[place]]),
                int(batch.packed.positions[begin + place]),
                int(tokens[place]),
                word,
            )
            for place, word in batch.labels["mlm"].tolist()
        )

    assert sorted(entry for part in parts for entry in seen(part)) == seen(whole)
    assert sorted(int(x) for part in parts for x in part.labels["nsp"]) == sorted(whole.labels["nsp"].tolist())


def test_padded_labels_are_ignored(collator: Collator) -> None:
    """For graph capture the bucket sets the number of labels; the unused ones have IGNORED targets."""
    sampler = Sampler.from_tables(collator.tables, 16, "cycle", 0)
    buckets = choose_buckets(sampler, collator.tables, 24, collator.encoders, count=2)
    roomy = Collator(collator.tables, 24, collator.encoders, buckets, generators=collator.generators)
    shapes = set()
    for step in range(20):
        rows = sampler.rows(step)
        labels, bare = roomy(rows, step).labels["mlm"], collator(rows, step).labels["mlm"]
        shapes.add(labels.shape)
        assert torch.equal(labels[: len(bare)], bare)
        assert (labels[len(bare) :, 1] == IGNORED).all()
    assert len(shapes) <= len(buckets.tokens)
    nothing = roomy({task: np.arange(0) for task in collator.tables}, 0)
    assert nothing.labels["mlm"].shape == (0, 2)


# ---- Helpers ----------------------------------------------------------------------------------------------------------

PINNED_POSITIONS = [1, 3, 4, 5, 6, 9, 11, 14, 17, 19]
PINNED_WORDS = [4, 262, 4, 4, 4, 4, 4, 4, 367, 118]


def one_column(sentences: list[np.ndarray]) -> TokenTable:
    return _table([Tokens.of(sentences)])


def two_columns(first: list[list[int]], second: list[list[int]]) -> TokenTable:
    return _table([Tokens.of(first), Tokens.of(second)])


def _table(columns: list[Tokens]) -> TokenTable:
    from minbert_fast.data.sentences import Text

    n = len(columns[0])
    return TokenTable("made", Path("made.csv"), tuple(columns), None, Text.of([""] * n), np.arange(n), (), "")
