# SPDX-License-Identifier: Apache-2.0
"""Writes all files of the package.

A file or directory is complete or absent: it is written under a temporary name, flushed to the disk and renamed. Symbolic
links are followed. A stream (`-`, a pipe, a device, the file that the shell opened as standard output) is never replaced.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from minbert_fast.common.schema import ConfigError

STDOUT = Path("-")  # as an output: standard output
TEMPORARY = ".writing-"  # prefix of names that a crash may leave behind; `sweep` removes them

# The names that the safetensors format gives to torch's dtypes (its specification, "Format").
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def regular(path: Path) -> Path:
    """Returns `path` if it can be read. Raises OSError for a FIFO or a device: opening or reading it might never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # open() rejects directories itself
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def inside(directory: Path, name: str) -> Path:
    """`directory / name`, where `name` comes from a file. Raises ValueError if it leads out of the directory."""
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise ValueError(f"{name!r} leads out of the directory")
    return directory / name


def flush_file(path: Path) -> None:
    """Returns once the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Returns once the directory's entries (new names, renames) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A seekable file to write to. It gets its name when the block ends without error; missing folders are created.

    A stream (see `is_stream`) is written directly. Raises OSError, which names the file also if its disk is full.
    """
    try:
        with _open_stream(path) if is_stream(path) else _open_whole(path) as file:
            yield file
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write does not say which file it was
            error.filename = "standard output" if path == STDOUT else os.fspath(path)
        raise


@contextmanager
def _open_whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends without error."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        flush_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Whether `path` must not be replaced: `-`, a pipe, a device or this process's standard output."""
    if path == STDOUT or _standard(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _standard(path: Path) -> int | None:
    """The descriptor of standard output or error if `path` names the same open file, pipe or device, else None."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
    return None


def _open_stream(path: Path) -> BinaryIO:
    """Opens a stream for writing. Standard output keeps its position in the file; opening it by name would start at 0."""
    descriptor = 1 if path == STDOUT else _standard(path)
    if descriptor is None:
        return path.open("wb")
    for text in (sys.stdout, sys.stderr):
        text.flush()  # earlier prints come first
    return os.fdopen(os.dup(descriptor), "wb")


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file atomically: a reader finds the old content or the new one. Missing folders are created."""
    with whole_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Replaces a UTF-8 text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def csv_lines(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV (RFC 4180 but for plain line feeds); None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by `value` as indented JSON, atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file, of type `kind` (dict or list). Raises ConfigError naming the file."""
    try:
        value = json.loads(regular(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, kind):
        raise ConfigError(f"{path}: expected a JSON {'list' if kind is list else 'object'}")
    return value


def finite(value: Any) -> Any:
    """`value` with None in place of nan and infinities, which JSON cannot express; mappings and lists are searched."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file tensor by tensor, flushed to the disk; returns the SHA-256 of the file.

    The library's own writer copies all tensors first and reports a full disk without its errno.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with whole_file(path) as file:
        head: list[bytes | memoryview] = [len(encoded).to_bytes(8, "little"), encoded]
        for content in itertools.chain(head, map(raw, tensors.values())):
            file.write(content)
            digest.update(content)
    return digest.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes, row by row; a contiguous CPU tensor is not copied."""
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data


class ArrayFile:
    """Appends rows to an fp32 array [n, width] in a .npy or .safetensors file; the header with n is written at the end.

    Use it as a context manager. `name` is the name of a safetensors file's only tensor.
    """

    HEADER = 128  # bytes reserved for either format's header

    def __init__(self, file: BinaryIO, width: int, name: str | None = None) -> None:
        self.file = file
        self.width = width
        self.name = name  # None: .npy
        self.rows = 0
        if not file.seekable():
            raise OSError(errno.ESPIPE, "a pipe cannot hold this format: its header is written last")
        file.write(bytes(self.HEADER))

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        self.file.seek(0)
        shape = (self.rows, self.width)
        if self.name is None:  # numpy pads this header to HEADER bytes
            layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self.file, layout)
        else:
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * self.rows * self.width]}
            text = json.dumps({self.name: entry}, separators=(",", ":"))
            self.file.write((self.HEADER - 8).to_bytes(8, "little") + text.ljust(self.HEADER - 8).encode())

    def write(self, rows: np.ndarray) -> None:
        """Appends rows [n, width]."""
        assert rows.shape[1:] == (self.width,)
        self.file.write(np.ascontiguousarray(rows, dtype="<f4").data)
        self.rows += len(rows)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Creates or replaces directory `path` (a link's target); `fill(directory)` writes its files.

    A crash leaves the old directory or the new one. Between two renames it has a temporary name, which `sweep` restores.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    old = path.with_name(f"{TEMPORARY}{path.name}.old")
    remove(temporary)
    remove(old)
    temporary.mkdir()
    try:
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                flush_file(file)
        flush_directory(temporary)
    except BaseException:
        with suppress(OSError):
            remove(temporary)  # it may have filled the disk
        raise
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    flush_directory(path.parent)
    remove(old)


def sweep(directory: Path) -> None:
    """Restores directories that a crash left between two renames; removes incomplete files and directories."""
    for entry in sorted(directory.glob(f"{TEMPORARY}*.old")):
        target = directory / entry.name.removeprefix(TEMPORARY).removesuffix(".old")
        if not target.exists():
            entry.rename(target)
    for entry in directory.glob(f"{TEMPORARY}*"):
        remove(entry)


def remove(path: Path) -> None:
    """Removes a file, link or directory tree if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
