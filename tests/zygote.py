# SPDX-License-Identifier: Apache-2.0
"""A process that has imported everything, and forks training processes: a test can start and kill training dozens of times
without paying for as many imports of torch.

`Zygote` in the test speaks JSON lines with `main` in that process: a job, answered by {"pids": [...]} at once and by
{"statuses": [...]} when its processes have ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


class Zygote:
    """The test's side."""

    def __init__(self) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def start(
        self, flags: Sequence[str], ranks: int = 1, folder: Path | None = None, own: Sequence[Sequence[str]] = ()
    ) -> list[int]:
        """Starts `train` with these flags in `ranks` processes, which meet as under torchrun; returns their ids.

        In `folder`, if it is given, they have their working directory, caches, and output (rank-R.log). `own`, if given,
        has further flags for each rank.
        """
        assert self.process.stdin is not None
        job = {"flags": list(flags), "ranks": ranks, "folder": folder and str(folder), "port": free_port()}
        job["own"] = [list(more) for more in own] or [[]] * ranks
        print(json.dumps(job), file=self.process.stdin, flush=True)
        pids: list[int] = self._answer()["pids"]
        return pids

    def wait(self) -> list[int]:
        """The exit statuses of the processes started last (minus the signal's number for a killed one)."""
        statuses: list[int] = self._answer()["statuses"]
        return statuses

    def run(self, flags: Sequence[str], kill_after: float | None = None) -> int:
        """Runs `train` and returns its exit status; sends SIGKILL after `kill_after` seconds unless it has ended by then."""
        (pid,) = self.start(flags)
        if kill_after is None:
            return self.wait()[0]

        def kill() -> None:
            with suppress(ProcessLookupError):  # the process has ended already
                os.kill(pid, signal.SIGKILL)

        killer = threading.Timer(kill_after, kill)
        killer.start()
        (status,) = self.wait()
        killer.cancel()
        killer.join()
        return status

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


# ---- The process that forks ------------------------------------------------------------------------------------------


def main() -> None:
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps the output of training apart from the answers
    warm_up()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        pids = [fork(job, rank) for rank in range(job["ranks"])]
        print(json.dumps({"pids": pids}), file=answers)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"statuses": statuses}), file=answers)


def warm_up() -> None:
    """Takes one step, so that all modules are imported before the fork."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--output", folder, "--max-steps", "1", "--precision", "fp32", "--set", f"data.cache={folder}/cache"]
        assert train([*flags, "--set", "training.evaluate_untrained=false"]) == 0


def fork(job: dict[str, Any], rank: int) -> int:
    """Starts one process of a job."""
    import torch

    pid = os.fork()
    if pid:
        return pid
    # torch makes a pool of threads anew after a fork, at the first such call in each thread. Two threads that do so at
    # the same time end the run ("Invalid thread pool!"), so this happens while there is one.
    torch.set_num_threads(1)
    if job["folder"]:
        os.chdir(job["folder"])
        os.environ["XDG_CACHE_HOME"] = str(Path(job["folder"], "cache"))
        log: TextIO = open(f"rank-{rank}.log", "w")  # noqa: SIM115  # until the process ends
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if job["ranks"] > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"]}
        os.environ |= {key: str(value) for key, value in (address | place).items()}
    status = train([*job["flags"], *job["own"][rank]])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def train(flags: list[str]) -> int:
    from minbert_fast import train as command
    from minbert_fast.common import cli

    return cli.run(command.main, flags)


if __name__ == "__main__":
    main()
