# SPDX-License-Identifier: Apache-2.0
"""BERT's WordPiece tokenizer, based on the `tokenizers` library.

The Rust pipeline is built from a checked vocabulary with BERT's normalizer, pre-tokenizer and template. It ignores
everything else that a tokenizer file may request (other components, truncation, padding). The word ids equal those of
transformers' BertTokenizerFast.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from minbert_fast.common.storage import write_text
from minbert_fast.data.messages import show
from minbert_fast.data.sentences import Tokens, offsets_of
from minbert_fast.data.vocabulary import Vocabulary, errors_name, read_vocabulary

BATCH = 1024  # sentences per call of the Rust tokenizer; limits the memory of its Python objects


class Tokenizer:
    """Converts texts to word ids."""

    def __init__(self, vocabulary: Vocabulary, model_max_length: int | None = None) -> None:
        """Raises ValueError for a vocabulary without [UNK], [SEP], [PAD] or [CLS]."""
        self.vocabulary = vocabulary
        self.model_max_length = model_max_length
        self._rust = _build(vocabulary)
        ids: dict[str, Any] = {role: self._rust.token_to_id(token) for role, token in vocabulary.special.items()}
        for role in ("unk", "sep", "pad", "cls"):
            if ids[role] is None:
                raise ValueError(f"the vocabulary has no {vocabulary.special[role]}")
        self.unk_id, self.sep_id, self.pad_id, self.cls_id = ids["unk"], ids["sep"], ids["pad"], ids["cls"]
        self.mask_id: int | None = ids["mask"]  # None: the vocabulary has no [MASK]
        self.vocab_size: int = max(self._rust.get_vocab(with_added_tokens=True).values()) + 1
        canonical = json.dumps(asdict(vocabulary), sort_keys=True, ensure_ascii=True)
        self.fingerprint: str = hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        """Reads tokenizer.json, or else vocab.txt, and tokenizer_config.json from a model directory.

        Raises DataError (one line) if the files are missing, damaged or describe another kind of tokenizer.
        """
        path, vocabulary, model_max_length = read_vocabulary(Path(directory))
        with errors_name(path):
            return cls(vocabulary, model_max_length)

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> Tokens:
        """Word ids of each text as [CLS] .. [SEP], truncated to `max_length` tokens; [SEP] is kept.

        Raises ValueError if max_length < 2, for a single string, or as `check_sentences` does.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is {texts!r:.60}, expected a list of strings")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}, expected at least 2 ([CLS] and [SEP])")
        lengths: list[int] = []
        parts = [np.empty(0, dtype=np.int32)]
        for begin in range(0, len(texts), BATCH):
            batch = list(texts[begin : begin + BATCH])
            check_sentences(batch, begin)
            sentences = [encoding.ids for encoding in self._rust.encode_batch_fast(batch)]
            if max_length is not None:
                sentences = [x if len(x) <= max_length else [*x[: max_length - 1], self.sep_id] for x in sentences]
            lengths += map(len, sentences)
            parts.append(np.fromiter(itertools.chain.from_iterable(sentences), np.int32, sum(map(len, sentences))))
        return Tokens(np.concatenate(parts), offsets_of(lengths))

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, vocab.txt, tokenizer_config.json, special_tokens_map.json to `directory`."""
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
            write_text(Path(directory) / name, text)


def check_sentences(texts: Sequence[str], first: int = 0) -> None:
    """Raises ValueError for a text that is no string, or that cannot be UTF-8; the texts are numbered from `first`."""
    for number, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise ValueError(f"sentence {number} is {text!r:.60}, expected a string")
        if not text.isascii():  # the common case costs no encoding
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"sentence {number} has half a surrogate pair: {show(text)}") from None


def _build(vocabulary: Vocabulary) -> RustTokenizer:
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
