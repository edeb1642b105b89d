# SPDX-License-Identifier: Apache-2.0
"""Reading a WordPiece vocabulary from tokenizer.json or vocab.txt, as data, every value checked.

A file that describes anything but BERT's pipeline is refused in one line; Rust's own loader never sees it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minbert_fast.data.files import open_regular
from minbert_fast.data.formats import DataError, show, show_path

MAX_FILE_BYTES = 64 << 20  # files beyond this are not read
MAX_WORD_ID = 1 << 24
SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}


@dataclass(frozen=True)
class Vocabulary:
    """Everything that decides which word ids a text gets."""

    words: dict[str, int]
    lowercase: bool = True
    strip_accents: bool | None = None  # None: as `lowercase`
    chinese_characters: bool = True  # set apart, each a word
    clean_text: bool = True
    prefix: str = "##"
    max_word_length: int = 100  # characters; longer words become [UNK]
    special: dict[str, str] = field(default_factory=lambda: dict(SPECIAL))  # role -> token
    added: tuple[dict[str, Any], ...] = ()  # AddedToken's arguments beside id


@dataclass(frozen=True)
class Source:
    """A vocabulary as read, and from which file."""

    path: Path
    vocabulary: Vocabulary
    model_max_length: int | None  # tokenizer_config.json's, where it says one


def read_vocabulary(folder: Path) -> Source:
    """Reads tokenizer.json, else vocab.txt, with tokenizer_config.json, from a model's directory.

    Raises DataError (one line) for missing, damaged or foreign files.
    """
    path = folder / "tokenizer_config.json"
    config = _read_json(path) if os.path.exists(path) else {}
    with blame(path):
        options = _options(config)
        max_length = _sane_length(config.get("model_max_length"))
    path = folder / "tokenizer.json"
    if os.path.exists(path):
        content = _read_json(path)
        with blame(path):
            return Source(path, _from_json(content, options), max_length)
    path = folder / "vocab.txt"
    if os.path.exists(path):
        words = _read_vocab(path)
        return Source(path, Vocabulary(words, **options), max_length)
    raise DataError(f"{show_path(folder)}: neither tokenizer.json nor vocab.txt")


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The Vocabulary fields that tokenizer_config.json decides. Raises ValueError for a wrong type."""
    options: dict[str, Any] = {}
    for key, name in (
        ("do_lower_case", "lowercase"),
        ("strip_accents", "strip_accents"),
        ("tokenize_chinese_chars", "chinese_characters"),
    ):
        value = config.get(key)
        if value is not None:
            options[name] = _expect(value, bool, key)
    special = dict(SPECIAL)
    for role in special:
        token = config.get(f"{role}_token")
        if isinstance(token, dict):  # an AddedToken written out
            token = token.get("content")
        if token is not None:
            special[role] = _expect(token, str, f"{role}_token")
    return {**options, "special": special}


def _from_json(content: dict[str, Any], options: dict[str, Any]) -> Vocabulary:
    """The vocabulary in a tokenizer.json; `options` take precedence, as in transformers.

    Raises ValueError where the file describes anything but BERT's WordPiece.
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
    unknown = _expect(model.get("unk_token", "[UNK]"), str, "unk_token")
    special = {**options["special"], "unk": unknown}
    return Vocabulary(words, **{**fields, **options, "special": special, "added": _added(content, special)})


def _component(content: dict[str, Any], key: str, kind: str) -> dict[str, Any]:
    """A component of the pipeline, which must be of one kind."""
    part: dict[str, Any] = _expect(content.get(key), dict, key)
    if part.get("type") != kind:
        raise ValueError(f"{key} is {show(str(part.get('type')))}, expected {kind!r}: not a BERT tokenizer")
    return part


def _check_template(part: Any, special: dict[str, str]) -> None:
    """Raises ValueError if the post-processor is known to make other sequences than [CLS] .. [SEP]."""
    if part is None or (isinstance(part, dict) and part.get("type") == "BertProcessing"):
        return
    cls = {"SpecialToken": {"id": special["cls"], "type_id": 0}}
    sep = {"SpecialToken": {"id": special["sep"], "type_id": 0}}
    single = [cls, {"Sequence": {"id": "A", "type_id": 0}}, sep]
    if not isinstance(part, dict) or part.get("type") != "TemplateProcessing" or part.get("single") != single:
        raise ValueError("post_processor makes other sequences than [CLS] .. [SEP]: not a BERT tokenizer")


def _added(content: dict[str, Any], special: dict[str, str]) -> tuple[dict[str, Any], ...]:
    """The added tokens beside BERT's own."""
    added = []
    for entry in _expect(content.get("added_tokens", []), list, "added_tokens"):
        entry = _expect(entry, dict, "an added token")
        token = {
            "content": _expect(entry.get("content"), str, "an added token's content"),
            "id": _expect(entry.get("id"), int, "an added token's id"),
        }
        if not token["content"]:
            raise ValueError("an added token is empty")
        for key in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            token[key] = _expect(entry.get(key, False), bool, f"an added token's {key}")
        if token["content"] not in special.values():
            added.append(token)
    return tuple(added)


def _check_words(words: dict[str, int]) -> None:
    """Raises ValueError unless each word has a number of its own, within limits."""
    if not words:
        raise ValueError("the vocabulary is empty")
    numbers = set(words.values())
    if len(numbers) != len(words):
        raise ValueError("two words of the vocabulary share a number")
    if min(numbers) < 0 or max(numbers) > MAX_WORD_ID:
        raise ValueError(f"word ids from {min(numbers)} to {max(numbers)}, expected 0 to at most {MAX_WORD_ID}")


def _expect(value: Any, kind: type, name: str) -> Any:
    """`value`, if it is of type `kind`. Raises ValueError."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {show(repr(value))}, expected {kind.__name__}")
    return value


def _sane_length(value: Any) -> int | None:
    """A model_max_length that means something; transformers writes 1e30 for none."""
    return value if isinstance(value, int) and 2 <= value <= 1 << 20 else None


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Turns a ValueError, or whatever Rust raises, into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        # pyo3's PanicException derives from BaseException and has no name to import.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{show_path(path)}: {' '.join(str(error).split())}") from error


def _read_bytes(path: Path) -> bytes:
    with open_regular(path) as file:
        try:
            content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise DataError(f"{show_path(path)}: cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{show_path(path)}: larger than {MAX_FILE_BYTES:,} bytes")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError with the line."""
    content = _read_bytes(path)
    try:
        value: dict[str, Any] = _expect(json.loads(content.decode("utf-8-sig")), dict, "the content")
        return value
    except json.JSONDecodeError as error:
        raise DataError(f"{show_path(path)}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{show_path(path)}:{line}: byte 0x{content[error.start]:02x} is not UTF-8") from None
    except RecursionError:
        raise DataError(f"{show_path(path)}: nested too deeply") from None
    except ValueError as error:  # numbers of thousands of digits; content that is no object
        raise DataError(f"{show_path(path)}: {error}") from None


def _read_vocab(path: Path) -> dict[str, int]:
    """A vocab.txt: one word a line, numbered from 0; of a word that stands twice the later number holds."""
    content = _read_bytes(path)
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{show_path(path)}:{line}: byte 0x{content[error.start]:02x} is not UTF-8") from None
    if not lines[-1]:
        lines.pop()
    words = {line.removesuffix("\r"): index for index, line in enumerate(lines)}
    with blame(path):
        _check_words(words)
    return words
