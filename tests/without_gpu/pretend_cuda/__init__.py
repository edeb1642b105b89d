# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that gives a CPU build of PyTorch the device cuda:0, so that tests marked `gpu` run without a GPU.

    python -m pytest -p tests.without_gpu.pretend_cuda -m gpu tests/test_gpu_runs.py tests/step tests/tasks

Tensors know their device, and operations refuse tensors of both devices. Graphs are recorded (`RecordedGraph`): a capture
that waits for the device, reads a value, or copies between host and device is an error. Surgery and AdamW run as the CUDA
kernels (`cuda_on_cpu`), the encoder's ops as on a CPU, and no op by Triton. So this shows whether the package puts its
tensors where a GPU needs them. It shows nothing about Triton's kernels, streams and speed.

The device (device.cpp) must be loaded before torch; pytest imports plugins first. It is compiled against the installed
torch, and known to work with the version in constraints.txt.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[3]


def build(source: Path, torch: Path) -> Path:
    """The compiled device: compiled again if its source or torch has changed."""
    digest = hashlib.sha256(source.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:12]
    library = ROOT / "build" / f"pretend-cuda-{digest}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-isystem{torch}/include", f"-L{torch}/lib"]
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        subprocess.run([*compiler, *flags, str(source), "-o", str(partial), "-ltorch_cpu", "-lc10"], check=True)
        partial.replace(library)
    return library


if "torch" in sys.modules:
    raise RuntimeError(
        "torch was imported before its pretended device: run pytest with -p tests.without_gpu.pretend_cuda"
    )
found = importlib.util.find_spec("torch")
assert found is not None
assert found.origin is not None
folder = Path(found.origin).parent
for name in ("libtorch_global_deps", "libc10", "libtorch_cpu"):
    ctypes.CDLL(str(folder / "lib" / f"{name}.so"), mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(build(Path(__file__).with_name("device.cpp"), folder)))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.without_gpu.recorded_graph import RecordedGraph  # noqa: E402

if torch.version.cuda:
    raise RuntimeError("this torch is built for CUDA: the pretended device needs a CPU build")

# ---- torch.cuda ----------------------------------------------------------------------------------------------------------

capturing = False


def wait(*arguments: Any) -> None:
    assert not capturing, "a capture waits for the device"


class Stream:
    """All streams are one, in which everything has already run."""

    cuda_stream = device_index = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    synchronize = wait


class Event:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3

    synchronize = wait


class Device:
    """torch.cuda.device and .device_of."""

    def __init__(self, device: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def graph(recorded: RecordedGraph, **options: Any) -> Iterator[None]:
    global capturing
    capturing = True
    try:
        with recorded.captured():
            yield
    finally:
        capturing = False


def always(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: value


PROPERTIES = SimpleNamespace(name="a pretended GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
constants = {
    **dict.fromkeys(
        ("_lazy_init", "init", "set_device", "set_stream", "empty_cache", "reset_peak_memory_stats", "_sleep")
    ),
    **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), 0),
    **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
    **dict.fromkeys(("max_memory_allocated", "memory_allocated"), 1 << 20),
    "device_count": 1,
    "get_device_properties": PROPERTIES,
    "get_device_capability": (9, 0),
    "get_device_name": PROPERTIES.name,
    "mem_get_info": (70 << 30, 80 << 30),
    "graph_pool_handle": (0, 0),
    "current_stream": Stream(),
    "stream": nullcontext(),
}
for name, value in {
    **{name: always(constant) for name, constant in constants.items()},
    "synchronize": wait,
    "is_current_stream_capturing": lambda: capturing,
    "default_generators": (torch.default_generator,),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "Stream": Stream,
    "Event": Event,
    "device": Device,
    "device_of": Device,
    "CUDAGraph": RecordedGraph,
    "graph": graph,
}.items():
    setattr(torch.cuda, name, value)
vars(torch._C)["_cuda_clearCublasWorkspaces"] = always(None)
torch.backends.cuda.enable_flash_sdp(False)
torch.backends.cuda.enable_mem_efficient_sdp(False)

# ---- Page-locked memory, copies of storages ------------------------------------------------------------------------------

locked: set[int] = set()


def pin_memory(self: Tensor) -> Tensor:
    copy = self.clone()
    locked.add(copy.untyped_storage().data_ptr())
    return copy


def on_storages(operation: Callable[..., Tensor]) -> Callable[..., torch.UntypedStorage]:
    """Methods of storages, which PyTorch implements for devices that it knows, by those of tensors."""

    def method(*storages: torch.UntypedStorage, **options: Any) -> torch.UntypedStorage:
        views = [torch.empty(0, dtype=torch.uint8, device=each.device).set_(each) for each in storages]
        return operation(*views).untyped_storage()

    return method


methods: list[tuple[type, str, Any]] = [
    (Tensor, "pin_memory", pin_memory),
    (Tensor, "is_pinned", lambda self: self.untyped_storage().data_ptr() in locked),
    (Tensor, "cuda", lambda self, *arguments, **options: self.to("cuda")),
    (torch.UntypedStorage, "clone", on_storages(Tensor.clone)),
    (torch.UntypedStorage, "copy_", on_storages(Tensor.copy_)),
    (torch.UntypedStorage, "cpu", on_storages(Tensor.cpu)),
]
for owner, name, method in methods:
    setattr(owner, name, method)

# ---- Our ops -------------------------------------------------------------------------------------------------------------

from minbert_fast import _C  # noqa: E402
from minbert_fast.ops import backend, native  # noqa: E402
from tests.without_gpu import cuda_on_cpu  # noqa: E402


def on_host(op: Callable[..., Any]) -> Callable[..., Any]:
    """One of the encoder's ops, which takes tensors."""

    def called(*arguments: Any) -> Any:
        return op(*(
            torch.ops.pretend_cuda.host(a.detach()) if isinstance(a, Tensor) and a.is_cuda else a for a in arguments
        ))  # fmt: skip

    return called


def struct(name: str) -> Callable[..., Any]:
    """A struct that surgery's ops take. `of_library` makes it that of the library that has the op."""
    return lambda *members: (name, members)


def of_library(library: Any, name: str) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        return getattr(library, name)(
            *(getattr(library, a[0])(*a[1]) if isinstance(a, tuple) else a for a in arguments)
        )

    return called


for name in ("add_norm", "attention", "bias_gelu", "embedding"):
    for direction in ("forward", "backward"):
        setattr(_C, f"{name}_{direction}", on_host(getattr(_C, f"{name}_{direction}")))
_C.column_sums = on_host(_C.column_sums)
cuda = cuda_on_cpu.extension()
structs = {name: struct(name) for name in ("Where", "Matrix", "AdamW")}
operations = [name for name, op in vars(cuda).items() if callable(op) and name not in structs]
cpu_ops = {name: of_library(_C, name) for name in operations}
cuda_ops = {f"cuda_{name}": of_library(cuda, name) for name in operations}
vars(native.surgery)["_C"] = SimpleNamespace(**structs, **cpu_ops, **cuda_ops)
backend._forced = "native"
