# SPDX-License-Identifier: Apache-2.0
"""The token cache: each data file is tokenized once, into memory-mapped arrays, and again when anything changes.

An entry is named after everything that determines its content: the file's bytes, the tokenizer, the layout, the rule that
turns labels into numbers. A damaged entry (cache_entries.py) is rebuilt. If the directory cannot be written, the arrays
stay in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers

from minbert_fast.data.cache_entries import VERSION, Entry, GrowingArray, open_or_build, write_meta
from minbert_fast.data.files import MAX_BAD_ROWS, Table, TableReader
from minbert_fast.data.inputs import Input
from minbert_fast.data.labels import Rule
from minbert_fast.data.messages import BadRow, DataError, check_bad_rows, show_path
from minbert_fast.data.prefetch import prefetch
from minbert_fast.data.readers.records import STANDARD_INPUT, open_regular
from minbert_fast.data.sentences import Text, Tokens
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable, chain

Progress = Callable[[int, int, int], None]  # rows done, bytes of the file done, bytes of the file


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/minbert_fast, or ~/.cache/minbert_fast."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return root / "minbert_fast"


def load_tokens(
    source: Input,
    rule: Rule | None,
    tokenizer: Tokenizer,
    *,
    max_bad_rows: float = MAX_BAD_ROWS,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> TokenTable:
    """The rows of an input as word ids, with labels by `rule` (None: without labels).

    They come from the cache, or else are read, tokenized and cached; rows in memory are tokenized in memory. Each file has
    an entry of its own. Memory is bounded for files of any size. `progress` is called during tokenization; `notify` gets one
    line for the user if rows are left out or the cache cannot be written. Raises DataError like `read_rows`.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    tables, rows, sizes = [], 0, [part.size for part in source.parts]
    for index, part in enumerate(source.parts):
        if STANDARD_INPUT in part.files:
            raise DataError("standard input can be read only once; save it to a file")
        shifted = progress and partial(_shifted, progress, rows, sum(sizes[:index]), sum(sizes[index + 1 :]))
        table = _load_part(part, rule, tokenizer, max_bad_rows, folder, shifted, notify)
        if table.skipped and notify:
            labels = ", ".join(map(repr, part.layout.skip))
            notify(f"{part.name}: {table.skipped:,} rows with the label {labels} are left out")
        rows += len(table)
        tables.append(table)
    return tables[0] if len(tables) == 1 else chain(source.layout.name, tables)


def _shifted(progress: Progress, rows: int, before: int, after: int, read: int, position: int, size: int) -> None:
    """Reports the progress in one of several files as that in all of them."""
    progress(rows + read, before + position, before + size + after)


def _load_part(
    part: Input,
    rule: Rule | None,
    tokenizer: Tokenizer,
    max_bad_rows: float,
    folder: Path,
    progress: Progress | None,
    notify: Callable[[str], None] | None,
) -> TokenTable:
    """The rows of one file, one hub split or rows in memory."""
    path = part.path
    if part.files:
        source_hash, signature = _hash_file(path)
        layout = repr((part.layout, part.format))
    else:
        source_hash, layout = part.fingerprint(rule is not None), repr(part.layout)
    parts = (VERSION, source_hash, tokenizer.fingerprint, tokenizers.__version__, layout, part.texts, repr(rule))
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in path.stem[:48])
    name = f"{stem}-{hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()}"
    build = partial(_build, part, rule, tokenizer, max_bad_rows, progress)
    found = open_or_build(folder / name, build, notify) if part.stored else build(None)
    if part.files:
        with open_regular(path) as file:
            if _signature(os.fstat(file.fileno())) != signature:
                raise DataError(f"{show_path(path)}: changed while it was read")
    arrays = found.arrays
    bad_rows = tuple(BadRow(path, line, reason) for line, reason in found.bad_rows)
    read = len(arrays["lines"]) + len(bad_rows) + found.skipped
    check_bad_rows(path, read, len(bad_rows), next(iter(bad_rows), None), max_bad_rows)
    labels = arrays.get("labels")
    if labels is not None and rule is not None and rule.width is not None:
        labels = labels.reshape(-1, rule.width)
    return TokenTable(
        task=part.layout.name,
        path=path,
        columns=tuple(Tokens(arrays[f"tokens{c}"], arrays[f"offsets{c}"]) for c in range(part.texts)),
        labels=labels,
        ids=Text(arrays["ids"], arrays["id_offsets"]),
        lines=arrays["lines"],
        bad_rows=bad_rows,
        source_hash=source_hash,
        skipped=found.skipped,
        reread=partial(_reread, part, rule),
    )


def _reread(part: Input, rule: Rule | None) -> Iterator[Table]:
    """The rows of a part again, with their texts."""
    with TableReader(part, rule, max_bad_rows=1.0) as reader:
        yield from reader.chunks()


def tokenize_table(table: Table, tokenizer: Tokenizer) -> TokenTable:
    """The rows of a table as word ids, in memory."""
    return TokenTable(
        task=table.task,
        path=table.path,
        columns=tuple(map(tokenizer.encode, table.sentences)),
        labels=table.labels,
        ids=Text.of(table.ids),
        lines=table.lines,
        bad_rows=table.bad_rows,
        source_hash="",
        skipped=table.skipped,
        reread=lambda: iter((table,)),
    )


def _build(
    part: Input,
    rule: Rule | None,
    tokenizer: Tokenizer,
    max_bad_rows: float,
    progress: Progress | None,
    folder: Path | None,
) -> Entry:
    """Reads and tokenizes a file; writes a complete entry into `folder` unless it is None.

    A background thread reads ahead while the tokenizer runs on all cores, in threads of the tokenizers library.
    """
    types = {"lines": "int64", "ids": "uint8", "id_offsets": "int64"}
    if rule is not None:
        types["labels"] = rule.dtype
    for column in range(part.texts):
        word = "uint16" if tokenizer.vocab_size <= 1 << 16 else "int32"
        types |= {f"tokens{column}": word, f"offsets{column}": "int64"}
    growing = {name: GrowingArray(dtype, folder and folder / name) for name, dtype in types.items()}
    for name, array in growing.items():
        if "offsets" in name:
            array.append(np.zeros(1, dtype=np.int64))

    def append(name: str, offsets: str, pieces: Tokens | Text) -> None:
        growing[offsets].append(pieces.offsets[1:] + growing[name].count)
        growing[name].append(pieces.flat)

    bad_rows: list[tuple[int, str]] = []
    rows = skipped = 0
    with (
        TableReader(part, rule, max_bad_rows=max_bad_rows) as reader,
        closing(prefetch(reader.chunks())) as tables,
    ):
        for table in tables:
            for column, texts in enumerate(table.sentences):
                append(f"tokens{column}", f"offsets{column}", tokenizer.encode(texts))
            append("ids", "id_offsets", Text.of(table.ids))
            growing["lines"].append(table.lines)
            if table.labels is not None:
                growing["labels"].append(table.labels.reshape(-1))
            bad_rows += [(bad.line, bad.reason) for bad in table.bad_rows]
            skipped += table.skipped
            rows += table.rows_read
            if progress:
                progress(rows, reader.position, reader.size)
    arrays = {name: array.finish() for name, array in growing.items()}
    if folder is not None:
        write_meta(folder, growing, bad_rows, skipped)
    return Entry(arrays, bad_rows, skipped)


def _hash_file(path: Path) -> tuple[str, tuple[int, ...]]:
    """The hash of a file's content, and a signature that changes when the file is modified."""
    with open_regular(path) as file:
        signature = _signature(os.fstat(file.fileno()))
        try:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        except OSError as error:
            raise DataError(f"{show_path(path)}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest(), signature


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns
