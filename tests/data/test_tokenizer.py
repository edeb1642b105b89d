# SPDX-License-Identifier: Apache-2.0
"""Word ids are those of the tokenizers library's own loader and of transformers, for every option of a tokenizer's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.data.messages import DataError

TEXTS = [
    "", "a film", "The Girl EATS Éclair naïve cafe\u0301", "日本語 film", "\x00\x01 bad\u200b\u200dfilm\ufeff\tgood\r\n",
    "a [SEP] b [MASK] [cls] [PAD]", "NEWWORD newword, a NEWWORDb x <ent> y<ent> z", "girlgirlgirl good", "x" * 120, "İ ß",
]  # fmt: skip
NORMALIZER, MODEL = "normalizer", "model"
Edit = Mapping[str, Mapping[str, Any]]
EDITS: Mapping[str, Edit] = {
    "as it is": {},
    "cased": {NORMALIZER: {"lowercase": False}},
    "cased, without accents": {NORMALIZER: {"lowercase": False, "strip_accents": True}},
    "lower case, with accents": {NORMALIZER: {"strip_accents": False}},
    "Chinese words": {NORMALIZER: {"handle_chinese_chars": False}},
    "control characters": {NORMALIZER: {"clean_text": False}},
    "short words": {MODEL: {"max_input_chars_per_word": 5}},
    "another prefix": {MODEL: {"continuing_subword_prefix": "@@"}},
    "unknown words": {MODEL: {"unk_token": "good"}},
}
ADDED: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "single word": {"single_word": True},
    "normalized": {"normalized": True},
    "strips": {"lstrip": True, "rstrip": True},
    "special": {"special": True},
}


def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((sample_directory().model / "tokenizer.json").read_text(encoding="utf-8"))
    return found


def write(folder: Path, file: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def ids(folder: Path) -> list[list[int]]:
    return [sentence.tolist() for sentence in Tokenizer.from_pretrained(folder).encode(TEXTS)]


def rust_ids(folder: Path) -> list[list[int]]:
    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [loaded.encode(text).ids for text in TEXTS]


def check(folder: Path, differs: bool) -> None:
    """The file's ids are Rust's, and stay so when the tokenizer is saved; `differs`: the file's edit matters."""
    found = ids(folder)
    assert found == rust_ids(folder)
    assert (found != ids(sample_directory().model)) == differs
    before = Tokenizer.from_pretrained(folder)
    before.save(folder)
    assert ids(folder) == rust_ids(folder) == found
    assert Tokenizer.from_pretrained(folder).fingerprint == before.fingerprint


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_every_value_of_the_file_counts(tmp_path: Path, edit: Edit) -> None:
    file = content()
    for part, values in edit.items():
        file[part] |= values
    check(write(tmp_path, file), differs=bool(edit))


@pytest.mark.parametrize("flags", ADDED.values(), ids=ADDED.keys())
def test_added_words_are_found_as_their_flags_say(tmp_path: Path, flags: Mapping[str, Any]) -> None:
    file = content()
    last = max(file["model"]["vocab"].values())
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    words = [
        {"id": last + place, "content": word, **off, **flags} for place, word in enumerate(("NEWWORD", "<ent>"), 1)
    ]
    file["added_tokens"] += words
    check(write(tmp_path, file), differs=True)
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == last + 3
    assert transformers_ids(tmp_path) == ids(tmp_path)


def transformers_ids(folder: Path) -> list[list[int]]:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    found: list[list[int]] = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    return found


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"unk_token": {"content": "[UNK]", "__type": "AddedToken"}},
    ],
)
def test_tokenizer_config_takes_precedence_as_in_transformers(
    tmp_path: Path, file: str, config: Mapping[str, Any]
) -> None:
    shutil.copy(sample_directory().model / file, tmp_path)
    settings = {"tokenizer_class": "BertTokenizer", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    found = ids(tmp_path)
    assert found == transformers_ids(tmp_path)
    assert (found != ids(sample_directory().model)) == any(value in (True, False) for value in config.values())


def test_special_words_may_have_other_names(tmp_path: Path) -> None:
    lines = (sample_directory().model / "vocab.txt").read_text(encoding="utf-8").splitlines()
    names = {"unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}
    numbers = {role: lines.index(f"[{role.upper()}]") for role in names}
    for role, name in names.items():
        lines[numbers[role]] = name
    (tmp_path / "vocab.txt").write_text(
        "\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8"
    )  # as Windows writes it
    config = {f"{role}_token": name for role, name in names.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = Tokenizer.from_pretrained(tmp_path)
    special = (found.unk_id, found.sep_id, found.pad_id, found.cls_id, found.mask_id)
    assert special == tuple(numbers.values())
    assert found.vocab_size == len(lines)
    assert found.encode(["a xyzzy☃ </s>"])[0].tolist()[-3:] == [numbers["unk"], numbers["sep"], numbers["sep"]]
    found.save(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2, 2), (512, 512), (1 << 20, 1 << 20), (1, None), ((1 << 20) + 1, None), (1e30, None), (None, None), ("8", None)],
)
def test_a_maximum_length_is_a_whole_number_of_tokens(tmp_path: Path, value: Any, expected: int | None) -> None:
    found = Tokenizer.from_pretrained(write(tmp_path, content(), {"model_max_length": value}))
    assert found.model_max_length == expected
    found.save(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).model_max_length == expected


def test_a_vocabulary_with_gaps_keeps_its_numbers(tmp_path: Path) -> None:
    """vocab.txt numbers its lines; unnumbered ids get a line of their own."""
    file = content()
    last = max(file["model"]["vocab"].values())
    file["model"]["vocab"]["snowman"] = last + 3
    before = Tokenizer.from_pretrained(write(tmp_path, file))
    before.save(tmp_path)
    lines = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines[-3:] == [f"[unused-{last + 1}]", f"[unused-{last + 2}]", "snowman"]
    (tmp_path / "tokenizer.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).encode(["snowman"])[0].tolist()[1] == last + 3


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ({"model": {"type": "BPE"}}, "model is 'BPE', expected 'WordPiece'"),
        ({"normalizer": {"type": "NFC"}}, "normalizer is 'NFC', expected 'BertNormalizer'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer is 'Whitespace'"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "post_processor makes other sequences"),
        ({"post_processor": {"single": []}}, "post_processor makes other sequences"),
        ({"model": {"max_input_chars_per_word": 0}}, "max_input_chars_per_word is 0, expected 1 to"),
        ({"model": {"vocab": {}}}, "the vocabulary is empty"),
        ({"model": {"vocab": {"a": 0, "b": 0}}}, "two words of the vocabulary share a number"),
        ({"model": {"vocab": {"a": -1}}}, "word ids from -1 to -1, expected 0 to at most"),
        ({"model": {"vocab": {"a": 1 << 25}}}, "expected 0 to at most"),
        ({"model": {"vocab": {"a": True}}}, "vocab['a'] is 'True', expected int"),
        ({"model": {"vocab": {"[UNK]": 0, "[SEP]": 1, "[PAD]": 2}}}, "the vocabulary has no [CLS]"),
        ({"added_tokens": [{"id": 9, "content": ""}]}, "an added token is empty"),
        ({"added_tokens": [{"id": 9, "content": "snowman"}]}, "added token 'snowman' has id 9, expected"),
    ],
)
def test_what_is_no_tokenizer_of_bert_is_one_line(tmp_path: Path, edit: Mapping[str, Any], problem: str) -> None:
    file = content()
    for key, value in edit.items():
        file[key] = value if isinstance(value, list) else {**file[key], **value}
    with pytest.raises(DataError) as caught:
        Tokenizer.from_pretrained(write(tmp_path, file))
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "damaged", "problem"),
    [
        ("tokenizer.json", b'{\n"model": {,', ":2: not JSON"),
        ("tokenizer.json", b"[]", ": the content is"),
        ("tokenizer.json", b"[" * 100_000, ": nested too deeply"),
        ("tokenizer_config.json", b'{"do_lower_case": "yes"}', ": do_lower_case is"),
        ("tokenizer_config.json", b'{"cls_token": 7}', ": cls_token is"),
        ("vocab.txt", b"[UNK]\n[SEP]\n\xff\n", ":3: byte 0xff is not UTF-8"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, name: str, damaged: bytes, problem: str) -> None:
    if name == "tokenizer_config.json":
        write(tmp_path, content())
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(DataError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}{problem}")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_vocabulary_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor vocab\.txt"):
        Tokenizer.from_pretrained(tmp_path)


def test_long_texts_are_cut_and_keep_their_end() -> None:
    tokenizer = Tokenizer.from_pretrained(sample_directory().model)
    whole = tokenizer.encode(["a", "the girl eats an apple"])
    cut = tokenizer.encode(["a", "the girl eats an apple"], max_length=4)
    assert cut[0].tolist() == whole[0].tolist()
    assert cut[1].tolist() == [*whole[1].tolist()[:3], tokenizer.sep_id]
    assert tokenizer.encode(["a film"], max_length=2)[0].tolist() == [tokenizer.cls_id, tokenizer.sep_id]
    with pytest.raises(ValueError, match="max_length is 1, expected at least 2"):
        tokenizer.encode(["a film"], max_length=1)
    with pytest.raises(ValueError, match="expected a list of strings"):
        tokenizer.encode("a film")
    with pytest.raises(ValueError, match="sentence 1025 is 7, expected a string"):
        tokenizer.encode([*["a"] * 1025, 7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="sentence 1 has half a surrogate pair"):
        tokenizer.encode(["a", "\ud800"])
