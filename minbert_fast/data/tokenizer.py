# SPDX-License-Identifier: Apache-2.0
"""BERT's WordPiece tokenizer, by the `tokenizers` library.

The Rust pipeline is built from a checked vocabulary: BERT's own normalizer, pre-tokenizer and template, and
nothing that a file might smuggle in (other components, truncation, padding). The word ids equal those of
transformers' BertTokenizerFast.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from minbert_fast.common.storage import write_text
from minbert_fast.data.formats import show
from minbert_fast.data.tokens import Tokens, join
from minbert_fast.data.vocabulary import Vocabulary, blame, read_vocabulary

BATCH = 1024  # sentences that are out of Rust's hands and not yet in an array


class Tokenizer:
    """Texts to word ids. Single sentences become [CLS] .. [SEP], pairs [CLS] a [SEP] b [SEP]."""

    def __init__(self, vocabulary: Vocabulary, model_max_length: int | None = None) -> None:
        """Raises ValueError for a vocabulary without [UNK], [SEP], [PAD] or [CLS]."""
        self.vocabulary = vocabulary
        self.model_max_length = model_max_length
        self._rust = _build(vocabulary)
        self.unk_id = self._special("unk")
        self.sep_id = self._special("sep")
        self.pad_id = self._special("pad")
        self.cls_id = self._special("cls")
        mask = vocabulary.special["mask"]
        self.mask_id: int | None = self._rust.token_to_id(mask)  # None: not made for masked training
        self.vocab_size: int = max(self._rust.get_vocab(with_added_tokens=True).values()) + 1
        canonical = json.dumps(asdict(vocabulary), sort_keys=True, ensure_ascii=True)
        self.fingerprint: str = hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        """Reads tokenizer.json, else vocab.txt, with tokenizer_config.json, from a model's directory.

        Raises DataError (one line) for missing, damaged or foreign files.
        """
        source = read_vocabulary(Path(directory))
        with blame(source.path):
            return cls(source.vocabulary, source.model_max_length)

    @property
    def lowercase(self) -> bool:
        """Whether texts are lower-cased."""
        return self.vocabulary.lowercase

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> Tokens:
        """Word ids of each text as [CLS] .. [SEP], cut to `max_length` tokens, [SEP] kept.

        `truncated` of the result counts the texts that were cut. Raises ValueError for `max_length` below
        2 and what is no string.
        """
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}, expected at least 2 ([CLS] and [SEP])")
        truncated = 0
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        parts = [np.empty(0, dtype=np.int32)]
        for begin in range(0, len(texts), BATCH):
            batch = list(texts[begin : begin + BATCH])
            for index, text in enumerate(batch, start=begin):
                if not isinstance(text, str):
                    raise ValueError(f"sentence {index} is {text!r:.60}, expected a string")
            encodings = self._rust.encode_batch_fast(batch)
            sentences = [encoding.ids for encoding in encodings]
            if max_length is not None:
                for index, ids in enumerate(sentences):
                    if len(ids) > max_length:
                        truncated += 1
                        sentences[index] = [*ids[: max_length - 1], self.sep_id]
            lengths = [len(ids) for ids in sentences]
            offsets[begin + 1 : begin + 1 + len(lengths)] = lengths
            parts.append(np.fromiter(itertools.chain.from_iterable(sentences), np.int32, sum(lengths)))
        return Tokens(np.concatenate(parts), np.cumsum(offsets), truncated)

    def encode_pairs(
        self, first: Sequence[str], second: Sequence[str], max_length: int | None = None
    ) -> tuple[Tokens, Tokens]:
        """Word ids of each pair as [CLS] a [SEP] b [SEP], and the token types (0, then 1) laid out alike.

        Pairs beyond `max_length` are cut as `tokens.join` says; `truncated` counts them.
        Raises ValueError for `max_length` below 3 or lists of unequal length.
        """
        left, right = self.encode(first), self.encode(second)
        joined = [join(a, b, max_length) for a, b in zip(left, right, strict=True)]
        whole = left.lengths + right.lengths - 1
        truncated = int((whole > max_length).sum()) if max_length is not None else 0
        return Tokens.of([ids for ids, _ in joined], truncated), Tokens.of([types for _, types in joined])

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, vocab.txt, tokenizer_config.json, special_tokens_map.json to `directory`."""
        folder = Path(directory)
        vocabulary = self.vocabulary
        names = {f"{role}_token": token for role, token in vocabulary.special.items()}
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": vocabulary.lowercase,
            "strip_accents": vocabulary.strip_accents,
            "tokenize_chinese_chars": vocabulary.chinese_characters,
            **({"model_max_length": self.model_max_length} if self.model_max_length else {}),
            **names,
        }
        by_id = {index: word for word, index in vocabulary.words.items()}
        lines = [by_id.get(index, f"[unused-{index}]") for index in range(max(by_id) + 1)]
        files = {
            "tokenizer.json": self._rust.to_str(pretty=False),
            "vocab.txt": "".join(f"{line}\n" for line in lines),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
            "special_tokens_map.json": json.dumps(names, indent=2) + "\n",
        }
        for name, text in files.items():
            write_text(folder / name, text)

    def _special(self, role: str) -> int:
        token = self.vocabulary.special[role]
        index: int | None = self._rust.token_to_id(token)
        if index is None:
            raise ValueError(f"the vocabulary has no {token}")
        return index


def _build(vocabulary: Vocabulary) -> RustTokenizer:
    """The Rust pipeline of a vocabulary."""
    special = vocabulary.special
    rust = RustTokenizer(
        models.WordPiece(
            vocabulary.words,
            unk_token=special["unk"],
            continuing_subword_prefix=vocabulary.prefix,
            max_input_chars_per_word=vocabulary.max_word_length,
        )
    )
    rust.normalizer = normalizers.BertNormalizer(
        clean_text=vocabulary.clean_text,
        handle_chinese_chars=vocabulary.chinese_characters,
        strip_accents=vocabulary.strip_accents,
        lowercase=vocabulary.lowercase,
    )
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(prefix=vocabulary.prefix)
    present = [token for token in special.values() if token in vocabulary.words]
    rust.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in present])
    for entry in vocabulary.added:
        rust.add_tokens([AddedToken(**{key: value for key, value in entry.items() if key != "id"})])
        index = rust.token_to_id(entry["content"])
        if index != entry["id"]:
            raise ValueError(f"added token {show(entry['content'])} has id {entry['id']}, expected {index}")
    cls, sep = rust.token_to_id(special["cls"]), rust.token_to_id(special["sep"])
    if cls is not None and sep is not None:
        rust.post_processor = processors.TemplateProcessing(
            single=f"{special['cls']} $A {special['sep']}",
            pair=f"{special['cls']} $A {special['sep']} $B:1 {special['sep']}:1",
            special_tokens=[(special["cls"], cls), (special["sep"], sep)],
        )
    return rust
