# SPDX-License-Identifier: Apache-2.0
"""The runner finds the faults that it is for, and in the builds of tests/sanitize.sh the sanitizers find theirs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.without_gpu import cuda_on_cpu

BARRIER = "a barrier that some threads of the block do not reach"
# Messages of each build about kernels in faults.cu.
FAULTS = {
    "ordinary": {
        "sound": "",
        "missing_barrier": "two results",
        "shared_memory_read_first": "two results",  # NaN equals nothing
        "barrier_of_half_a_block": BARRIER,
        "two_barriers_at_once": BARRIER,
        "shuffle_of_half_a_warp": "a shuffle without some lanes of its warp",
        "too_much_shared_memory": "more than 48 KB of shared memory",
        "more_threads_than_bounds": "more threads than __launch_bounds__ allows",
    },
    "sanitized-address": {
        "sound": "",
        "beyond_the_end": "AddressSanitizer: heap-buffer-overflow",
        "beyond_shared_memory": "AddressSanitizer: global-buffer-overflow",
        "misaligned": "store to misaligned address",
    },
    "sanitized-thread": {
        "sound": "",
        "missing_barrier": "ThreadSanitizer: data race",
        "race_of_same_values": "ThreadSanitizer: data race",
    },
}[Path(os.environ.get("MINBERT_FAST_SANITIZED", "ordinary")).name]
RUN = """import ctypes, sys
run = ctypes.CDLL(sys.argv[1]).run
run.restype = ctypes.c_char_p
print(run(sys.argv[2].encode()).decode())"""


def library() -> Path:
    return cuda_on_cpu.build([Path(__file__).with_name("faults.cu")])


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
    }
    command = [sys.executable, "-c", RUN, library(), name]
    run = subprocess.run(command, env=os.environ | options, capture_output=True, text=True, check=False)
    if FAULTS[name]:
        assert FAULTS[name] in run.stdout + run.stderr
    else:
        assert (run.stdout, run.stderr) == ("\n", "")


@pytest.mark.parametrize(("grid", "block"), [(0, 32), (1, 0), (1, 1025), (2**31, 32)])
def test_launches_that_a_gpu_refuses(grid: int, block: int) -> None:
    launch = ctypes.CDLL(str(library())).launch
    launch.restype = ctypes.c_char_p
    assert launch(grid, block) == b"invalid configuration argument"
    assert launch(1, 64) == b""
