# SPDX-License-Identifier: Apache-2.0
"""The token cache: each data file is tokenized once, into memory-mapped arrays, and again when anything changes.

An entry is a directory named after everything that determines its content: the file's bytes, the tokenizer, the layout,
the rule that turns labels into numbers. It holds one raw array per file, and a meta.json with each array's dtype, length
and checksum. Entries are written under a temporary name, flushed and renamed, so an entry with a final name is complete.
Checksums detect damaged entries, which are rebuilt. Writing an entry also deletes those that were not opened for a month.
If the directory cannot be written, the arrays stay in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from minbert_fast.common.storage import flush_directory, flush_file, write_text
from minbert_fast.data.files import MAX_BAD_ROWS, Table, open_rows
from minbert_fast.data.formats import Layout
from minbert_fast.data.inputs import Input, file_input
from minbert_fast.data.labels import Rule
from minbert_fast.data.messages import BadRow, DataError, check_bad_rows, show_path
from minbert_fast.data.prefetch import prefetch
from minbert_fast.data.readers.records import STANDARD_INPUT, open_regular
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import Text, Tokens, TokenTable, chain

VERSION = 2  # of an entry's layout; entries of other versions are ignored
BLOCK = 1 << 20  # bytes of a cached array that are read at a time
ABANDONED_SECONDS = 86_400  # an unfinished entry of this age is deleted: its process was killed
UNUSED_SECONDS = 30 * 86_400  # an entry not opened for this long is deleted
ENTRY = re.compile(r"[A-Za-z0-9_-]*-[0-9a-f]{32}")
UNFINISHED = re.compile(rf"\.{ENTRY.pattern}\.\d+\.tmp")

Progress = Callable[[int, int, int], None]  # rows done, bytes of the file done, bytes of the file


@dataclass(frozen=True)
class _Entry:
    """What was read from one input."""

    arrays: dict[str, np.ndarray]  # by name
    bad_rows: list[tuple[int, str]]  # line, reason
    skipped: int


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/minbert_fast, or ~/.cache/minbert_fast."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return root / "minbert_fast"


def load_tokens(
    source: Input | str | os.PathLike[str],
    rule: Rule | Layout | str | None,
    tokenizer: Tokenizer,
    *,
    labeled: bool = True,
    max_bad_rows: float = MAX_BAD_ROWS,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> TokenTable:
    """The rows of an input as word ids, with labels by `rule` (None: without labels).

    They come from the cache, or else are read, tokenized and cached; rows in memory are tokenized in memory. Each file has
    an entry of its own. Memory is bounded for files of any size. `progress` is called during tokenization; `notify` gets one
    line for the user if rows are left out or the cache cannot be written. Raises DataError like `read_rows`.

    A path with a layout (or its name) in the place of the rule is a file of that layout, with the layout's own rule;
    `labeled=False` reads it without labels.
    """
    if not isinstance(source, Input):
        assert isinstance(rule, str | Layout)
        source = file_input(os.fspath(source), rule)
        rule = source.layout.rule
    assert not isinstance(rule, str | Layout)
    rule = rule if labeled else None
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    tables, sizes = [], [sum(file.stat().st_size for file in part.files if file.exists()) for part in source.parts]
    rows = 0
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
    entry = folder / name
    build = partial(_build, part, rule, tokenizer, max_bad_rows, progress)
    found = _open_entry(entry) if part.stored else build(None)
    if found is not None:
        with suppress(OSError):
            os.utime(entry)  # marks the entry as used
    else:
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            _prepare(folder, temporary)
            found = build(temporary)
            _publish(temporary, entry)
        except OSError as error:
            if notify:
                reason = error.strerror or str(error)
                notify(f"{show_path(folder)}: no token cache there ({reason}); the tokens stay in memory")
            found = build(None)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
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
    with open_rows(part, rule, max_bad_rows=1.0) as reader:
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


class _GrowingArray:
    """An array that grows at its end, in a file or in memory, with a running checksum."""

    def __init__(self, dtype: str, path: Path | None) -> None:
        self.dtype = np.dtype(dtype)
        self.path = path
        self.count = 0
        self.checksum = 0
        self.parts: list[np.ndarray] = []

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, dtype=self.dtype)
        self.count += len(values)
        if self.path is None:
            self.parts.append(values)
        else:
            data = values.tobytes()
            self.checksum = zlib.crc32(data, self.checksum)
            # Opened for each part (thousands of rows), so that a failure leaves no open file.
            with open(self.path, "ab") as file:
                file.write(data)

    def finish(self) -> np.ndarray:
        if self.path is None:
            return np.concatenate([np.empty(0, dtype=self.dtype), *self.parts])
        self.path.touch()  # creates the file of an array without rows
        flush_file(self.path)
        return _map(self.path, self.dtype, self.count)


def _build(
    part: Input,
    rule: Rule | None,
    tokenizer: Tokenizer,
    max_bad_rows: float,
    progress: Progress | None,
    folder: Path | None,
) -> _Entry:
    """Reads and tokenizes a file; writes a complete entry into `folder` unless it is None.

    A background thread reads ahead while the tokenizer runs on all cores, in threads of the tokenizers library.
    """
    types = {"lines": "int64", "ids": "uint8", "id_offsets": "int64"}
    if rule is not None:
        types["labels"] = rule.dtype
    for column in range(part.texts):
        word = "uint16" if tokenizer.vocab_size <= 1 << 16 else "int32"
        types |= {f"tokens{column}": word, f"offsets{column}": "int64"}
    growing = {name: _GrowingArray(dtype, folder and folder / name) for name, dtype in types.items()}
    for name, array in growing.items():
        if "offsets" in name:
            array.append(np.zeros(1, dtype=np.int64))

    def append(name: str, offsets: str, pieces: Tokens | Text) -> None:
        growing[offsets].append(pieces.offsets[1:] + growing[name].count)
        growing[name].append(pieces.flat)

    bad_rows: list[tuple[int, str]] = []
    rows = skipped = 0
    with (
        open_rows(part, rule, max_bad_rows=max_bad_rows) as reader,
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
        summary = {name: [array.dtype.name, array.count, array.checksum] for name, array in growing.items()}
        body = {"version": VERSION, "arrays": summary, "bad_rows": bad_rows, "skipped": skipped}
        write_text(folder / "meta.json", json.dumps({"body": body, "checksum": _checksum(body)}))
    return _Entry(arrays, bad_rows, skipped)


def _open_entry(entry: Path) -> _Entry | None:
    """A cached entry with its arrays memory-mapped; None if it does not exist or is damaged."""
    try:
        meta: Any = json.loads((entry / "meta.json").read_text(encoding="ascii"))
        body = meta["body"]
        if meta["checksum"] != _checksum(body) or body["version"] != VERSION:
            return None
        arrays = {}
        for name, (dtype, count, checksum) in body["arrays"].items():
            path = entry / name
            if path.stat().st_size != count * np.dtype(dtype).itemsize or _file_checksum(path) != checksum:
                return None
            arrays[name] = _map(path, np.dtype(dtype), count)
        return _Entry(arrays, [(line, reason) for line, reason in body["bad_rows"]], body["skipped"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _file_checksum(path: Path) -> int:
    """CRC-32 of a file, read block by block: the pages of a memory map would count as the process's memory."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    # A plain array: slicing a memmap is several times slower. Empty files cannot be mapped.
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(count,))) if count else np.empty(0, dtype)


def _prepare(folder: Path, temporary: Path) -> None:
    """Creates the temporary directory; deletes unfinished entries of killed processes, and unused entries."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        unfinished = UNFINISHED.fullmatch(old.name)
        if not unfinished and not ENTRY.fullmatch(old.name):
            continue  # not a cache entry
        with suppress(OSError):
            age = time.time() - old.stat().st_mtime
            if old == temporary or age > (ABANDONED_SECONDS if unfinished else UNUSED_SECONDS):
                shutil.rmtree(old)
    temporary.mkdir()


def _publish(temporary: Path, entry: Path) -> None:
    """Renames a complete entry to its final name, replacing a damaged entry.

    It tries to rename first and checks afterwards: another process may publish the same entry at any time.
    """
    flush_directory(temporary)
    while True:
        try:
            temporary.rename(entry)
            break
        except OSError:
            if _open_entry(entry) is not None:
                return  # another process was faster; its arrays are the same
            if not os.path.lexists(entry):
                raise
        with suppress(FileNotFoundError):
            entry.rename(temporary / "damaged")
    shutil.rmtree(entry / "damaged", ignore_errors=True)
    flush_directory(entry.parent)


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


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
