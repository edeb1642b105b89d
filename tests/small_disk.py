# SPDX-License-Identifier: Apache-2.0
"""Trains on a private disk that is full, then read-only, then without write permission; for tests/trainer/test_faults.py.

    unshare --mount python -m tests.small_disk DATA OUTPUT WHOLE

OUTPUT is the disk, a tmpfs visible to this process alone. Prints one JSON line per attempt: name, exit status, standard
error. Copies the results to WHOLE at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from minbert_fast import train
from minbert_fast.common import cli
from minbert_fast.trainer import disk as room
from tests.small import small_run

MEGABYTES = 64
LEFT = 64 << 10  # free bytes on the full disk: enough for a record, not for a checkpoint


def attempt(name: str, data: Path, output: Path, *flags: str) -> None:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        more = (
            "--lr",
            "1e-3",
            "--epochs",
            "1",
            "--set",
            "checkpoint.every=1",
            "--set",
            "training.evaluate_untrained=false",
            *flags,
        )
        status = cli.run(train.main, small_run(data, output, *more))
    print(json.dumps([name, status, errors.getvalue()]), flush=True)


def mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    os.truncate(filler, filler.stat().st_size - LEFT)
    yield
    filler.unlink()


@contextmanager
def forbidden(disk: Path) -> Iterator[None]:
    """Removes the write permission, and root's capability to ignore it (CAP_DAC_OVERRIDE, number 1)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~(1 << 1)
    assert libc.capset(header, less) == 0
    disk.chmod(0o500)
    yield
    disk.chmod(0o700)
    assert libc.capset(header, before) == 0


def main() -> None:
    data, disk, whole = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "none", str(disk))
    run = disk / "run"
    attempt("begun", data, run, "--stop-after", "3")
    mount("-o", "remount,ro", str(disk))
    attempt("read-only", data, run, "--resume")
    mount("-o", "remount,rw", str(disk))
    with forbidden(run):
        attempt("forbidden", data, run, "--resume")
    with full(disk):
        attempt("no room", data, run, "--resume")
        check_room, room.check_room = room.check_room, lambda *_: None  # as if the disk filled up later
        attempt("full", data, run, "--resume")
        room.check_room = check_room
    attempt("in the end", data, run, "--resume")
    shutil.copytree(run, whole)


if __name__ == "__main__":
    main()
