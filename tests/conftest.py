# SPDX-License-Identifier: Apache-2.0
"""Fixtures every test may use: real data and weights where they are, a GPU where there is one, threads kept few."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# Before torch loads libgomp: threads that wait must not take a shared machine's cores (minbert_fast/__init__.py).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch

from minbert_fast import _C
from minbert_fast.ops import native
from tests.tolerance import poisoned_memory
from tests.without_gpu import cuda_on_cpu
from tests.without_gpu.accesses import check_accesses
from tests.zygote import Zygote


def faster_interpreter() -> None:
    """Halves the time of Triton's interpreter, which patches `triton.language` at each call of a device function.

    Here it does so once a launch for each module that a function comes from, and copies no tensor's storage onto itself
    when the launch ends. Raises ImportError without Triton.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang
    done: dict[int, Any] = {}

    def patch_lang(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in done:
            scope = done[module] = patch(fn)
            restore = scope.restore

            def end() -> None:  # of the launch
                done.clear()
                restore()

            scope.restore = end
        return done[module]

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor._restore_args_dev = lambda *arguments: None


# Without a GPU, Triton kernels run in Triton's interpreter. It must be chosen before any kernel is defined, so for the
# whole test process.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with suppress(ImportError):
        faster_interpreter()
        check_accesses()

# Two threads show what several would, but one a process where pytest-xdist runs several processes. An environment that asks
# for another number gets it.
if "OMP_NUM_THREADS" not in os.environ:
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // processes)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    slow = pytest.mark.skip(reason="slow: run with --run-slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(without_gpu)
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(slow)


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Leaves out flushes to the disk in this process: no test cuts the power, and each costs milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real course data: `MINBERT_FAST_DATA`, else ../shared/data relative to the checkout."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MINBERT_FAST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set MINBERT_FAST_DATA)")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A folder with real MiniLM-L6 weights in the Hugging Face layout (`MINBERT_FAST_MINILM`)."""
    folder = os.environ.get("MINBERT_FAST_MINILM")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real weights: set MINBERT_FAST_MINILM to a MiniLM-L6 folder")
    return Path(folder)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    server = Zygote()
    yield server
    server.close()


@pytest.fixture(params=_C.isas().split())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One test per instruction set that both this build and this processor support."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """For tiny models, whom a second thread only costs (pytest.mark.usefixtures)."""
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def hardware(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0 if request.param == "cuda" else None)


@pytest.fixture(params=["native", "triton", "torch", cuda_on_cpu.NAME])
def anywhere(request: pytest.FixtureRequest, hardware: torch.device) -> Iterator[torch.device]:
    """A device, and one implementation that runs surgery's ops there. Outputs begin as NaN."""
    if request.param == "native" and hardware.type == "cuda" and not native.HAS_CUDA:
        pytest.skip("the extension was built without CUDA")
    if request.param == "triton" and hardware.type == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU Triton's kernels are compiled for it, and the interpreter is off")
    with cuda_on_cpu.running(request.param, hardware), poisoned_memory():
        yield hardware
