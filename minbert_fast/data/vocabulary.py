# SPDX-License-Identifier: Apache-2.0
"""Reads a WordPiece vocabulary from tokenizer.json or vocab.txt and checks every value.

A file that describes any other pipeline than BERT's is rejected with one line. The files never reach Rust's own loader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minbert_fast.data.messages import DataError, show, show_path
from minbert_fast.data.readers.records import open_regular

MAX_FILE_BYTES = 64 << 20  # larger files are rejected
MAX_WORD_ID = 1 << 24
SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}


@dataclass(frozen=True)
class Vocabulary:
    """Everything that determines the word ids of a text."""

    words: dict[str, int]
    lowercase: bool = True
    strip_accents: bool | None = None  # None: same as `lowercase`
    chinese_characters: bool = True  # split Chinese characters into one word each
    clean_text: bool = True
    prefix: str = "##"
    max_word_length: int = 100  # characters; a longer word becomes [UNK]
    special: dict[str, str] = field(default_factory=lambda: dict(SPECIAL))  # role -> token
    added: tuple[dict[str, Any], ...] = ()  # the arguments of AddedToken, and `id`


def read_vocabulary(folder: Path) -> tuple[Path, Vocabulary, int | None]:
    """Reads tokenizer.json, or else vocab.txt, and tokenizer_config.json from a model directory.

    Returns the vocabulary's file, the vocabulary, and tokenizer_config.json's model_max_length if it has one. Raises
    DataError (one line) if the files are missing, damaged or describe another kind of tokenizer.
    """
    path = folder / "tokenizer_config.json"
    config = _read_json(path) if os.path.exists(path) else {}
    with errors_name(path):
        options = _read_options(config)
    max_length = config.get("model_max_length")
    if not isinstance(max_length, int) or not 2 <= max_length <= 1 << 20:  # transformers writes 1e30 for no limit
        max_length = None
    path = folder / "tokenizer.json"
    if os.path.exists(path):
        content = _read_json(path)
        with errors_name(path):
            return path, _parse_tokenizer(content, options), max_length
    path = folder / "vocab.txt"
    if os.path.exists(path):
        lines = _read_text(path).split("\n")
        if not lines[-1]:
            lines.pop()
        words = {line.removesuffix("\r"): index for index, line in enumerate(lines)}  # the last of duplicates counts
        with errors_name(path):
            _check_words(words)
        return path, Vocabulary(words, **options), max_length
    raise DataError(f"{show_path(folder)}: neither tokenizer.json nor vocab.txt")


def _read_options(config: dict[str, Any]) -> dict[str, Any]:
    """The Vocabulary fields that tokenizer_config.json sets. Raises ValueError for a wrong type."""
    names = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "chinese_characters",
    }
    options = {name: _expect(config[key], bool, key) for key, name in names.items() if config.get(key) is not None}
    special = dict(SPECIAL)
    for role in special:
        token = config.get(f"{role}_token")
        if isinstance(token, dict):  # a serialised AddedToken
            token = token.get("content")
        if token is not None:
            special[role] = _expect(token, str, f"{role}_token")
    return {**options, "special": special}


def _parse_tokenizer(content: dict[str, Any], options: dict[str, Any]) -> Vocabulary:
    """The vocabulary in a tokenizer.json. `options` take precedence, as in transformers.

    Raises ValueError if the file describes anything but BERT's WordPiece.
    """
    model = _expect(content.get("model"), dict, "model")
    if model.get("type", "WordPiece") != "WordPiece":
        raise ValueError(f"model is {show(str(model['type']))}, expected 'WordPiece'")
    normalizer = _component(content, "normalizer", "BertNormalizer")
    _component(content, "pre_tokenizer", "BertPreTokenizer")
    _check_template(content.get("post_processor"), options["special"])
    words = _expect(model.get("vocab"), dict, "model.vocab")
    for word, index in words.items():
        _expect(index, int, f"model.vocab[{show(word)}]")
    _check_words(words)
    fields: dict[str, Any] = {
        "lowercase": _expect(normalizer.get("lowercase", True), bool, "normalizer.lowercase"),
        "chinese_characters": _expect(normalizer.get("handle_chinese_chars", True), bool, "handle_chinese_chars"),
        "clean_text": _expect(normalizer.get("clean_text", True), bool, "normalizer.clean_text"),
        "prefix": _expect(model.get("continuing_subword_prefix", "##"), str, "continuing_subword_prefix"),
        "max_word_length": _expect(model.get("max_input_chars_per_word", 100), int, "max_input_chars_per_word"),
    }
    if normalizer.get("strip_accents") is not None:
        fields["strip_accents"] = _expect(normalizer["strip_accents"], bool, "normalizer.strip_accents")
    if not 1 <= fields["max_word_length"] <= 1 << 20:
        raise ValueError(f"max_input_chars_per_word is {fields['max_word_length']}, expected 1 to {1 << 20}")
    special = {**options["special"], "unk": _expect(model.get("unk_token", "[UNK]"), str, "unk_token")}
    return Vocabulary(words, **{**fields, **options, "special": special, "added": _added_tokens(content, special)})


def _component(content: dict[str, Any], key: str, kind: str) -> dict[str, Any]:
    """A component of the pipeline. Raises ValueError unless its type is `kind`."""
    part: dict[str, Any] = _expect(content.get(key), dict, key)
    if part.get("type") != kind:
        raise ValueError(f"{key} is {show(str(part.get('type')))}, expected {kind!r}: not a BERT tokenizer")
    return part


def _check_template(part: Any, special: dict[str, str]) -> None:
    """Raises ValueError if the post-processor builds other sequences than [CLS] .. [SEP]."""
    if part is None or (isinstance(part, dict) and part.get("type") == "BertProcessing"):
        return
    cls, sep = ({"SpecialToken": {"id": special[role], "type_id": 0}} for role in ("cls", "sep"))
    single = [cls, {"Sequence": {"id": "A", "type_id": 0}}, sep]
    if not isinstance(part, dict) or part.get("type") != "TemplateProcessing" or part.get("single") != single:
        raise ValueError("post_processor makes other sequences than [CLS] .. [SEP]: not a BERT tokenizer")


def _added_tokens(file: dict[str, Any], special: dict[str, str]) -> tuple[dict[str, Any], ...]:
    """The added tokens except BERT's special ones."""
    added = []
    for entry in _expect(file.get("added_tokens", []), list, "added_tokens"):
        content = _expect(_expect(entry, dict, "an added token").get("content"), str, "an added token's content")
        token = {"content": content, "id": _expect(entry.get("id"), int, "an added token's id")}
        if not content:
            raise ValueError("an added token is empty")
        for key in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            token[key] = _expect(entry.get(key, False), bool, f"an added token's {key}")
        if content not in special.values():
            added.append(token)
    return tuple(added)


def _check_words(words: dict[str, int]) -> None:
    """Raises ValueError unless the vocabulary has words and each has a different id within limits."""
    if not words:
        raise ValueError("the vocabulary is empty")
    ids = set(words.values())
    if len(ids) != len(words):
        raise ValueError("two words of the vocabulary share a number")
    if min(ids) < 0 or max(ids) > MAX_WORD_ID:
        raise ValueError(f"word ids from {min(ids)} to {max(ids)}, expected 0 to at most {MAX_WORD_ID}")


def _expect(value: Any, kind: type, name: str) -> Any:
    """Returns `value`. Raises ValueError unless it is of type `kind`."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {show(repr(value))}, expected {kind.__name__}")
    return value


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Turns a ValueError inside the block, and any error of Rust's, into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        # pyo3's PanicException derives from BaseException and cannot be imported by name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{show_path(path)}: {' '.join(str(error).split())}") from error


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises DataError with the line."""
    with open_regular(path) as file:
        try:
            content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise DataError(f"{show_path(path)}: cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{show_path(path)}: larger than {MAX_FILE_BYTES:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{show_path(path)}:{line}: byte 0x{content[error.start]:02x} is not UTF-8") from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError with the line."""
    text = _read_text(path)
    try:
        return dict(_expect(json.loads(text), dict, "the content"))
    except json.JSONDecodeError as error:
        raise DataError(f"{show_path(path)}:{error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{show_path(path)}: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, or content that is not an object
        raise DataError(f"{show_path(path)}: {error}") from None
