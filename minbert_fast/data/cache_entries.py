# SPDX-License-Identifier: Apache-2.0
"""Entries of the token cache: directories of raw arrays that are complete or absent, checked, and memory-mapped.

An entry holds one raw array per file, and a meta.json with each array's dtype, length and checksum. It is written under a
temporary name, flushed and renamed, so an entry with a final name is complete. Checksums detect damaged entries. Writing
an entry also deletes those that were not opened for a month.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.common.storage import flush_directory, flush_file, write_text
from minbert_fast.data.messages import show_path

VERSION = 3  # of an entry's layout and of what the readers take for a row; part of an entry's name
BLOCK = 1 << 20  # bytes of a cached array that are read at a time
ABANDONED_SECONDS = 86_400  # an unfinished entry of this age is deleted: its process was killed
UNUSED_SECONDS = 30 * 86_400  # an entry not opened for this long is deleted
ENTRY = re.compile(r"[A-Za-z0-9_-]*-[0-9a-f]{32}")
UNFINISHED = re.compile(rf"\.{ENTRY.pattern}\.[0-9a-f]+\.tmp")


@dataclass(frozen=True)
class Entry:
    """The tokenized content of one file, one split or rows in memory."""

    arrays: dict[str, np.ndarray]  # by name
    bad_rows: list[tuple[int, str]]  # line, reason
    skipped: int


class GrowingArray:
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


def open_or_build(
    entry: Path, build: Callable[[Path | None], Entry], notify: Callable[[str], None] | None = None
) -> Entry:
    """The entry, which `build` writes into the directory that it is given unless it exists.

    If the directory cannot be written, `notify` gets a line, and `build(None)` keeps the arrays in memory.
    """
    found = _open(entry)
    if found is not None:
        with suppress(OSError):
            os.utime(entry)  # marks the entry as used
        return found
    # Not named after the process: containers that share a cache may share process ids too.
    temporary = entry.with_name(f".{entry.name}.{secrets.token_hex(8)}.tmp")
    try:
        _prepare(temporary)
        found = build(temporary)
        _publish(temporary, entry)
    except OSError as error:
        if notify:
            reason = error.strerror or str(error)
            notify(f"{show_path(entry.parent)}: no token cache there ({reason}); the tokens stay in memory")
        found = build(None)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def write_meta(folder: Path, arrays: dict[str, GrowingArray], bad_rows: list[tuple[int, str]], skipped: int) -> None:
    """Writes what belongs to the arrays in `folder`, once they are finished."""
    summary = {name: [array.dtype.name, array.count, array.checksum] for name, array in arrays.items()}
    body = {"arrays": summary, "bad_rows": bad_rows, "skipped": skipped}
    write_text(folder / "meta.json", json.dumps({"body": body, "checksum": _checksum(body)}))


def _open(entry: Path) -> Entry | None:
    """A cached entry with its arrays memory-mapped; None if it does not exist or is damaged."""
    try:
        meta: Any = json.loads((entry / "meta.json").read_text(encoding="ascii"))
        body = meta["body"]
        if meta["checksum"] != _checksum(body):
            return None
        arrays = {}
        for name, (dtype, count, checksum) in body["arrays"].items():
            path = entry / name
            if path.stat().st_size != count * np.dtype(dtype).itemsize or _file_checksum(path) != checksum:
                return None
            arrays[name] = _map(path, np.dtype(dtype), count)
        return Entry(arrays, [(line, reason) for line, reason in body["bad_rows"]], body["skipped"])
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


def _prepare(temporary: Path) -> None:
    """Creates the temporary directory; deletes unfinished entries of killed processes, and unused entries."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for old in temporary.parent.iterdir():
        unfinished = UNFINISHED.fullmatch(old.name)
        if not unfinished and not ENTRY.fullmatch(old.name):
            continue  # not a cache entry
        with suppress(OSError):
            age = time.time() - old.stat().st_mtime
            if age > (ABANDONED_SECONDS if unfinished else UNUSED_SECONDS):
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
            if _open(entry) is not None:
                return  # another process was faster; its arrays are the same
            if not os.path.lexists(entry):
                raise
        with suppress(FileNotFoundError):
            entry.rename(temporary / "damaged")
    shutil.rmtree(entry / "damaged", ignore_errors=True)
    flush_directory(entry.parent)


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
