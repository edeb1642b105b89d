# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one does: the same losses and weights, one output, resumed with any number, ended together."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minbert_fast import BertModel, PCGrad, fit
from minbert_fast.common.errors import InterruptError, RunError, is_out_of_memory
from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.collate import Collator
from minbert_fast.data.sampling import Sampler
from minbert_fast.data.tokens import Encoder
from minbert_fast.parallel.exchange import AllReduce
from minbert_fast.parallel.sharding import ShardedGradients, connect
from minbert_fast.parallel.world import Agreement, World, joined
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel, build_tasks
from minbert_fast.trainer.records import Observer
from tests.parallel.threads import side_by_side
from tests.small import small_data
from tests.step.test_step import CONFIG, SIZES, make_batch, make_model, recipe
from tests.zygote import Zygote, free_port

WITHOUT_DROPOUT = ["--dropout", "0", "--set", "tasks.sentiment.dropout=0.0", "--set", "tasks.paraphrase.dropout=0.0"]
COMMON = [
    "--recipe", "default", "--lr", "1e-3", "--surgery", "pcgrad", "--batch-size", "7", *WITHOUT_DROPOUT,
    "--set", "training.evaluate_untrained=false", "--set", "logging.every=1",
]  # fmt: skip


def command(ranks: int, *flags: str) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, "-m", "minbert_fast.train", *COMMON, *flags]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}


def run(ranks: int, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, *flags), capture_output=True, text=True, timeout=240, env=environment(folder), cwd=folder
    )


def succeed(zygote: Zygote, ranks: int, folder: Path, *flags: str) -> None:
    """As `run`, without torchrun and its imports."""
    zygote.start([*COMMON, *flags], ranks, folder)
    assert zygote.wait() == [0] * ranks, [log.read_text() for log in folder.glob("rank-*.log")]


def losses(output: Path, tasks: tuple[str, ...] = ("sentiment", "paraphrase", "similarity")) -> list[list[float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [[line[f"loss/{task}"] for task in tasks] for line in lines]


def same(one: Path, other: Path, tasks: tuple[str, ...] = ("sentiment", "paraphrase", "similarity")) -> None:
    for name in ("model.safetensors", "heads.safetensors"):
        a, b = load_file(one / "last" / name), load_file(other / "last" / name)
        for key, tensor in a.items():
            torch.testing.assert_close(b[key], tensor, atol=2e-5, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}")
    np.testing.assert_allclose(losses(one, tasks), losses(other, tasks), rtol=1e-4)


@pytest.fixture(scope="module")
def alone(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps in one process."""
    folder = tmp_path_factory.mktemp("alone")
    succeed(zygote, 1, folder, "--max-steps", "12", "--precision", "fp32", "--output", "run")
    return folder / "run"


@pytest.mark.parametrize(
    ("ranks", "shard"),
    [
        (2, False),
        (2, True),
        *(pytest.param(4, shard, marks=pytest.mark.slow) for shard in (True, False)),
    ],
)
def test_ranks_with_shares_train_as_one_process_does(ranks: int, shard: bool, alone: Path, tmp_path: Path) -> None:
    """Seven examples a task: no number of ranks here divides it."""
    flags = ["--max-steps", "12", "--precision", "fp32", "--output", "run"]
    done = run(ranks, tmp_path, *flags, "--set", f"training.shard={str(shard).lower()}")
    assert done.returncode == 0, done.stderr
    same(alone, tmp_path / "run")
    a, b = (json.loads((run / "summary.json").read_text()) for run in (alone, tmp_path / "run"))
    assert a["tokens"] == b["tokens"]
    assert a["dev"]["score"] == pytest.approx(b["dev"]["score"], abs=0.01)


@pytest.mark.ci
def test_a_run_of_two_goes_on_as_one_and_one_as_two(zygote: Zygote, alone: Path, tmp_path: Path) -> None:
    flags = ["--max-steps", "12", "--precision", "fp32", "--output", "run", "--set", "checkpoint.every=4"]
    succeed(zygote, 2, tmp_path, "--stop-after", "4", *flags)
    succeed(zygote, 1, tmp_path, "--stop-after", "8", *flags, "--resume")
    succeed(zygote, 2, tmp_path, "--stop-after", "10", *flags, "--resume", "--set", "training.shard=true")
    succeed(zygote, 2, tmp_path, *flags, "--resume")
    same(alone, tmp_path / "run")


def on_two_machines(folders: Sequence[Path], *flags: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs one rank on each of two machines, with separate folders, caches and torchrun processes."""
    port, started = free_port(), []
    for number, folder in enumerate(folders):
        where = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        line = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "minbert_fast.train", *COMMON, *flags]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(line, env=environment(folder), cwd=folder, **pipes))
    results = [process.communicate(timeout=240) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *result)
        for process, result in zip(started, results, strict=True)
    ]


def refused_together(ended: Sequence[subprocess.CompletedProcess[str]], reason: str) -> None:
    """Each of the processes ended, and at least one said why (another may have seen only that it went)."""
    assert all(done.returncode for done in ended)
    lines = [line for done in ended for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any(re.match(f"error: cannot train together: {reason}", line) for line in lines), lines


@pytest.mark.ci
def test_two_machines_train_as_one_process_and_go_on_from_the_same_checkpoint(alone: Path, tmp_path: Path) -> None:
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        machine.mkdir()
    flags = ["--max-steps", "12", "--precision", "fp32", "--output", "run"]
    begun = on_two_machines(machines, "--stop-after", "4", *flags)
    assert [done.returncode for done in begun] == [0, 0], begun
    assert not (machines[1] / "run").exists()
    refused_together(
        on_two_machines(machines, *flags, "--resume"),
        r'starts from "step 4, [0-9a-f]{8}" on rank 0, "the beginning" on rank 1; every machine needs',
    )
    shutil.copytree(machines[0] / "run" / "checkpoints", machines[1] / "run" / "checkpoints")
    ended = on_two_machines(machines, *flags, "--resume")
    assert [done.returncode for done in ended] == [0, 0], ended
    same(alone, machines[0] / "run")


@pytest.mark.ci
def test_machines_with_other_data_are_refused(tmp_path: Path) -> None:
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        shutil.copytree(sample_directory().data, machine / "data")
    path = machines[1] / "data" / "ids-sst-train.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    refused_together(
        on_two_machines(machines, "--max-steps", "2", "--data", "data", "--output", "run"),
        r"data\.train\.sentiment\.rows 2000 on rank 0, 1999 on rank 1; ",
    )
    assert not (machines[0] / "run" / "metrics.jsonl").exists()


def test_ranks_with_other_flags_are_refused(zygote: Zygote, tmp_path: Path) -> None:
    """They waited for each other, at a message that only some of them sent."""
    own = ["--max-steps 2 --stop-after 1", "--max-steps 3 --set training.shard=true --set checkpoint.every=1"]
    told = [
        "--stop-after 1 on rank 0, null on rank 1",
        "recipe.training.max_steps 2 on rank 0, 3 on rank 1",
        "recipe.training.shard false on rank 0, true on rank 1",
        "recipe.checkpoint.every 0 on rank 0, 1 on rank 1",
    ]
    refused(zygote, tmp_path, "", own, "; ".join(map(re.escape, told)))


def refused(zygote: Zygote, folder: Path, flags: str, own: list[str], reason: str) -> None:
    """Two ranks end at once, and both say why they cannot train together."""
    common = [*COMMON, "--data", str(small_data(folder / "data")), "--precision", "fp32", "--output", "run"]
    pids = zygote.start([*common, *flags.split()], 2, folder, [more.split() for more in own])
    with ended_after(60, pids):
        assert all(zygote.wait())
    for log in sorted(folder.glob("rank-*.log")):
        assert re.search(f"(?m)^error: cannot train together: {reason}", log.read_text()), log.read_text()


@contextmanager
def ended_after(seconds: float, pids: Sequence[int]) -> Iterator[None]:
    """Kills processes that have not ended by then: a test fails and does not hang."""

    def kill() -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Timer(seconds, kill)
    killer.start()
    try:
        yield
    finally:
        killer.cancel()
        killer.join()


def test_a_rank_without_the_heads_of_the_model_is_refused(alone: Path, zygote: Zygote, tmp_path: Path) -> None:
    """Its heads began anew, and it trained other ones than rank 0."""
    bare = shutil.copytree(alone / "last", tmp_path / "bare")
    (bare / "heads.safetensors").unlink()
    own = [f"--model {alone / 'last'}", f"--model {bare}"]
    refused(zygote, tmp_path, "--max-steps 2", own, r'model\.heads "[0-9a-f]+" on rank 0, "[0-9a-f]+" on rank 1; ')


@pytest.mark.ci
def test_a_rank_without_the_flag_resume_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    data = ["--data", str(small_data(tmp_path / "data"))]
    succeed(
        zygote, 1, tmp_path, *data, "--max-steps", "4", "--stop-after", "2", "--precision", "fp32", "--output", "run"
    )
    refused(
        zygote, tmp_path, "--max-steps 4", ["--resume", ""], 'starts from "step 2, .*" on rank 0, "the beginning" on'
    )


@pytest.mark.ci
def test_ranks_hide_the_words_that_one_process_hides(zygote: Zygote, tmp_path: Path) -> None:
    """Masked words are a mean over words, next sentences over pairs; the word embedding's gradient is dense."""
    flags = ["--recipe", "enhancing-mlm-nsp", "--stop-after", "5", "--precision", "fp32"]  # within the first stage
    succeed(zygote, 1, tmp_path, *flags, "--output", "alone")
    for name, shard in (("whole", "false"), ("parts", "true")):
        succeed(zygote, 2, tmp_path, *flags, "--output", name, "--set", f"training.shard={shard}")
        same(tmp_path / "alone", tmp_path / name, ("mlm", "nsp"))


@pytest.mark.ci
def test_bf16_and_plain_sums_train_too(zygote: Zygote, tmp_path: Path) -> None:
    succeed(zygote, 2, tmp_path, "--max-steps", "4", "--precision", "bf16", "--surgery", "none", "--output", "run")
    assert np.isfinite(losses(tmp_path / "run")).all()


def start(folder: Path) -> subprocess.Popen[str]:
    flags = ["--epochs", "50", "--precision", "fp32", "--output", "run", "--set", "checkpoint.every=5"]
    begun = subprocess.Popen(
        command(2, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(folder),
        cwd=folder,
    )
    deadline = time.monotonic() + 120
    while not list((folder / "run" / "checkpoints").glob("step-*")):  # then every rank is in its loop
        assert begun.poll() is None, begun.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return begun


def workers(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


@pytest.mark.ci
def test_a_killed_rank_ends_the_run_which_goes_on_later(zygote: Zygote, tmp_path: Path) -> None:
    begun = start(tmp_path)
    os.kill(max(workers(begun.pid)), signal.SIGKILL)
    killed = time.monotonic()
    _, error = begun.communicate(timeout=90)
    assert begun.returncode != 0
    assert time.monotonic() - killed < 60
    assert "SIGKILL" in error or "lost another process" in error
    succeed(
        zygote, 1, tmp_path, "--epochs", "50", "--precision", "fp32", "--output", "run", "--resume", "--stop-after", "1"
    )


@pytest.mark.ci
def test_a_signal_to_one_rank_stops_all_after_the_step(tmp_path: Path) -> None:
    begun = start(tmp_path)
    os.kill(max(workers(begun.pid)), signal.SIGTERM)
    _, error = begun.communicate(timeout=90)
    assert begun.returncode != 0
    assert "SIGTERM: stopped after step" in error
    assert error.count("--resume --output run\n") == 2  # not the other rank's temporary directory
    assert "Traceback (most recent call last):\n  File" not in error.split("stopped after step")[0]


@pytest.mark.ci
def test_the_reference_backend_is_for_one_process(tmp_path: Path) -> None:
    done = run(2, tmp_path, "--backend", "reference", "--output", "run", "--max-steps", "1")
    assert done.returncode != 0
    assert "trains in one process, not in 2" in done.stderr


def test_shares_make_up_the_whole_step() -> None:
    sample = sample_directory()
    tokenizer = Tokenizer.from_pretrained(sample.model)
    files: dict[str, Any] = {"sentiment": "ids-sst-train.csv", "paraphrase": "quora-train.csv"}
    tables = {task: tokenize_table(read_table(sample.data / name, task), tokenizer) for task, name in files.items()}
    rows = Sampler.from_tables(tables, 5).rows(0)
    kinds: tuple[Encoder, ...] = ("bi", "cross", "both")
    for together in ({"paraphrase": kind} for kind in kinds):
        whole = Collator(tables, 64, together)(rows)
        parts = [Collator(tables, 64, together, rank=rank, ranks=3)(rows) for rank in range(3)]
        assert sum(part.packed.num_tokens for part in parts) == whole.packed.num_tokens
        for task in tables:
            assert sum(part.loss_fraction(task) for part in parts) == pytest.approx(1)
            assert sorted(r for part in parts for r in part.rows[task]) == sorted(rows[task])
        words = whole.packed.word_ids[: whole.packed.num_words]
        counted = torch.zeros(len(words), dtype=torch.int64)
        for part in parts:
            assert torch.equal(part.packed.word_ids[: part.packed.num_words], words)
            counted += part.packed.word_offsets.diff()[: len(words)]
        assert torch.equal(counted, whole.packed.word_offsets.diff()[: len(words)].long())


def test_a_world_of_one_exchanges_nothing() -> None:
    world, tensor = World(), torch.ones(3)
    world.reduce(tensor)
    world.wait()
    assert torch.equal(tensor, torch.ones(3))
    agreed = Agreement(world)
    assert [agreed(None), agreed(15)] == [None, 15]
    assert world.from_main(lambda: 7) == 7


def speak(rank: int, size: int, port: int, again: int, told: Path) -> None:
    """One of `size` processes: every kind of message, through gloo."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    with joined(torch.device("cpu")) as (world, _):
        J = torch.arange(12.0).view(2, 6) + rank
        world.finish([world.begin_sum([J[0, 1:3], J[1, 1:3], J[1, 4:5], J[:, :0]]), world.begin_sum([J[:, :0]])])
        whole = (torch.arange(2.0 * 2 * size).view(2, 2 * size) + rank).bfloat16()
        shares = torch.zeros(2, 2, dtype=torch.bfloat16)
        world.finish([world.begin_share(list(whole), list(shares))])
        agreed = Agreement(world)
        heard = [agreed(15 if (call, rank) == (1, size - 1) else None) for call in range(4)]
        found = {"J": J.tolist(), "shares": shares.tolist(), "heard": heard, "main": world.from_main(lambda: "hello")}
        found["apart"] = surgery_apart(rank, size)
        found["stopped"] = stopped_by(world)
    os.environ["MASTER_PORT"] = str(again)  # the first store may still listen
    os.chdir(told)  # where each rank chooses the run's directory
    data, training = small_data(told / str(rank)), {"max_steps": 1, "precision": "fp32", "evaluate_untrained": False}
    result = fit({"training": training, "data": {"cache": str(told)}}, data=data)
    (told / f"{rank}.json").write_text(
        json.dumps(found | {"fit": str(result.output), "score": result.metrics["score"]})
    )


def stopped_by(world: World) -> int | None:
    """The signal that ends this process where one reaches rank 0 alone, in the middle of work for all."""

    def interrupted() -> None:
        raise InterruptError(signal.SIGTERM, "interrupted")

    try:
        world.from_main(interrupted)
    except InterruptError as stop:
        return stop.number
    return None


def surgery_apart(rank: int, size: int) -> float:
    """How far `PCGrad` with shares of the examples is from `PCGrad` with all of them, for a DistributedDataParallel."""
    torch.manual_seed(3)
    x, trunk = torch.randn(2 * size, 6), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def losses(model: nn.Module, examples: Tensor) -> list[Tensor]:
        output = model(examples)
        return [(output[:, task] - (-3.0) ** task).square().mean() for task in range(3)]

    alone, shared = copy.deepcopy(trunk), nn.parallel.DistributedDataParallel(trunk)
    torch.manual_seed(50 + rank)
    own = PCGrad(torch.optim.SGD(shared.parameters(), lr=0.1), process_group=True)
    with shared.no_sync():
        own.pc_backward(losses(shared, x[rank::size]))
    PCGrad(torch.optim.SGD(alone.parameters(), lr=0.1), generator=torch.Generator().manual_seed(50)).pc_backward(
        losses(alone, x)
    )
    pairs = zip(shared.parameters(), alone.parameters(), strict=True)
    return max(float((p.grad - q.grad).abs().max()) for p, q in pairs)  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.ci)])
def test_messages_between_processes(size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(speak, (size, free_port(), free_port(), tmp_path), size)
    for rank in range(size):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        plain, total = torch.arange(12.0).view(2, 6), size * (size - 1) / 2
        expected = plain + rank
        for row, columns in ((0, slice(1, 3)), (1, slice(1, 3)), (1, slice(4, 5))):
            expected[row, columns] = size * plain[row, columns] + total
        assert found["J"] == expected.tolist()
        own = torch.arange(4.0 * size).view(2, 2 * size)[:, 2 * rank : 2 * rank + 2]
        assert found["shares"] == (size * own + total).tolist()
        assert found["heard"] == [None, None, 15, None]  # one call late, in every process
        assert found["main"] == "hello"
        assert found["apart"] < 1e-6
        assert found["stopped"] == signal.SIGTERM
        assert found["fit"] == "runs/default"
        assert found["score"] > 0  # rank 0 has written it before any rank returns


@pytest.mark.ci
@pytest.mark.parametrize(
    ("method", "shard"), [("torchjd:PCGrad", "false"), pytest.param("gradvac", "true", marks=pytest.mark.slow)]
)
def test_three_ranks_draw_the_same_orders_and_weigh_alike(
    zygote: Zygote, method: str, shard: str, tmp_path: Path
) -> None:
    """Each rank's own random numbers (dropout) must not reach the method; famo needs the losses of the whole step."""
    if method.startswith("torchjd:"):
        pytest.importorskip("torchjd.aggregation")
    flags = ["--max-steps", "4", "--precision", "fp32", "--surgery", method, "--set", "weighting.method=famo"]
    succeed(zygote, 1, tmp_path, *flags, "--output", "alone")
    succeed(zygote, 3, tmp_path, *flags, "--output", "three", "--set", f"training.shard={shard}")
    same(tmp_path / "alone", tmp_path / "three")


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2 GiB", "Cuda failure 2 'out of memory'"])
def test_memory_that_runs_out_in_a_message_is_reported_as_such(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as another process that was lost: `batch_size` can help, a look at the other machines cannot."""

    def full(*arguments: object, **options: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(torch.distributed, "all_reduce", full)
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        World(0, 2).begin_largest(torch.zeros(1))
    assert is_out_of_memory(raised.value)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("reset")))
    with pytest.raises(RunError, match=r"rank 0 of 2 lost another process \(reset\)"):
        World(0, 2).begin_largest(torch.zeros(1))


def test_the_observer_keeps_no_batches() -> None:
    """On a GPU the results of many steps wait for the next log line; their batches must not."""
    step, batch = make_step_of(0, 1)
    observer = Observer()
    observer.add(1, batch, step(batch, 1.0))
    names, tokens = batch.tasks, weakref.ref(batch.packed.tokens)
    del batch
    gc.collect()
    assert tokens() is None
    (seen,) = observer.fetch()
    assert seen.losses.keys() == set(names)


# ---- One process's side of it, with nobody to talk to -----------------------------------------------------------------


class Alone(World):
    """One of several processes whose messages nobody answers: it notes how many elements it sent, and when."""

    sent: ClassVar[list[tuple[int, bool]]] = []  # elements, and whether a backward was under way

    def begin_sum(self, tensors: Sequence[Tensor]) -> None:
        assert all(tensor.is_contiguous() for tensor in tensors)
        self.sent.append((sum(t.numel() for t in tensors), torch._C._current_graph_task_id() >= 0))

    def begin_share(self, tensors: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
        self.begin_sum(tensors)
        for tensor, share in zip(tensors, shares, strict=True):
            share.copy_(tensor.chunk(self.size)[self.rank])

    def begin_union(self, share: Tensor, tensor: Tensor) -> None:
        tensor.copy_(share.repeat(self.size))


def make_step_of(rank: int, ranks: int, **values: Any) -> tuple[OnePassStep, MultitaskBatch]:
    chosen = recipe(surgery={"method": "pcgrad"}, **values)
    model = make_model(chosen)
    connected = connect(Alone(rank, ranks), chosen.training.shard)
    return OnePassStep(model, chosen, torch.float32, connected), make_batch(model, SIZES)


def exchange_of(step: OnePassStep) -> AllReduce:
    return next(hook for hook in step.hooks if isinstance(hook, AllReduce))


@pytest.mark.parametrize("shard", [False, True])
def test_layers_are_sent_while_the_backward_goes_on(shard: bool) -> None:
    step, batch = make_step_of(0, 2, training={"shard": shard})
    Alone.sent.clear()
    step(batch, 1.0)
    layers, rest = len(exchange_of(step).spans) - 1, 1  # one message each, for all tasks
    assert all(during for _, during in Alone.sent[:layers])
    assert not any(during for _, during in Alone.sent[layers:])
    _words, _heads, losses, *more = Alone.sent[layers + rest :]
    assert losses[0] == len(batch.tasks)
    assert (len(more) == 1) == shard  # the Gram matrix, where J is in parts
    if not shard:
        assert sum(n for n, _ in Alone.sent[: layers + rest]) == step.gradients.J.numel()


class Message:
    """A message under way."""

    arrived = False

    def wait(self) -> None:
        self.arrived = True


class Slow(Alone):
    """Its messages arrive when they are waited for."""

    begun: ClassVar[list[Message]] = []

    def begin_sum(self, tensors: Sequence[Tensor]) -> Message:  # type: ignore[override]
        self.begun.append(Message())
        return self.begun[-1]

    def begin_share(self, tensors: Sequence[Tensor], shares: Sequence[Tensor]) -> Message:  # type: ignore[override]
        if (
            torch._C._current_graph_task_id() >= 0
        ):  # the backward has filled this scratch memory and goes on in the other
            assert all(message.arrived for message in self.begun[:-1])
        return self.begin_sum(tensors)


@pytest.mark.parametrize("shard", [False, True])
def test_a_step_waits_for_all_its_messages(shard: bool) -> None:
    """For those of two layers that share scratch memory before the second one is written."""
    Slow.begun.clear()
    chosen = recipe(surgery={"method": "pcgrad"}, training={"shard": shard})
    encoder = BertModel(replace(CONFIG, num_hidden_layers=4))
    model = MultitaskModel(encoder, build_tasks(chosen), chosen.model.pooling)
    step = OnePassStep(model, chosen, torch.float32, connect(Slow(0, 2), shard))
    step(make_batch(model, SIZES), 1.0)
    assert all(message.arrived for message in Slow.begun)
    if isinstance(step.gradients, ShardedGradients):
        starts = [scratch.data_ptr() for scratch in step.gradients.scratch]
        assert all(a != b for a, b in itertools.pairwise(starts))


def test_a_shard_in_bf16_copies_the_parameters_of_others_too() -> None:
    """Products would use weights of the step before, but for the rank's own part."""
    chosen = recipe(training={"shard": True})
    model = make_model(chosen)
    step = OnePassStep(model, chosen, torch.bfloat16, connect(Alone(0, 2), shard=True))
    step(make_batch(model, SIZES), 1.0)
    assert torch.equal(step.flat.compute, step.flat.data.bfloat16())


def test_each_rank_draws_dropout_of_its_own() -> None:
    """From one seed the ranks would drop the same elements of their first rows."""
    seeds = [make_step_of(rank, 3)[0].seed_base for rank in range(3)]
    assert len(set(seeds)) == 3
    assert seeds[0] == OnePassStep(make_model(recipe()), recipe(), torch.float32).seed_base


def test_weights_that_follow_losses_see_those_of_the_whole_step() -> None:
    """Before and after the update: each process has its part of them alone."""

    def work(world: World) -> list[Tensor]:
        chosen = recipe()
        exchange = exchange_of(OnePassStep(make_model(chosen), chosen, torch.float32, connect(world, False)))
        before, after = torch.tensor([1.0, 2.0]) * (world.rank + 1), torch.tensor([3.0, 5.0]) * (world.rank + 1)
        exchange.before_weights(before, ())
        exchange.remeasured(after, (), torch.tensor(False))
        return [before, after]

    for found in side_by_side(2, work):
        assert [losses.tolist() for losses in found] == [[3.0, 6.0], [9.0, 15.0]]


@pytest.mark.parametrize("decay_all", [True, False])
def test_spans_cover_the_shared_region_once(decay_all: bool) -> None:
    optimizer = {"weight_decay": 0.01, "decay_all": decay_all, "layer_decay": 0.9}
    step, _ = make_step_of(0, 2, optimizer=optimizer)
    cut = sorted((span.begin, span.end) for group in exchange_of(step).spans for span in group)
    assert cut[0][0] == 0
    assert cut[-1][1] == step.flat.shared_end
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cut))
    for group in exchange_of(step).spans:
        assert all(span.group.begin <= span.begin < span.end <= span.group.end for span in group)


@pytest.mark.parametrize("decay_all", [True, False])
def test_shards_are_disjoint_whole_and_small(decay_all: bool) -> None:
    ranks = 4
    steps = [
        make_step_of(rank, ranks, training={"shard": True}, optimizer={"decay_all": decay_all}) for rank in range(4)
    ]
    owned = torch.zeros(steps[0][0].flat.trainable_end, dtype=torch.int32)
    for step, _ in steps:
        for piece in step.optimizer.ranges:
            owned[piece.begin : piece.end] += 1
        kept = sorted((piece.kept.start, piece.kept.stop) for piece in step.optimizer.ranges)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(kept)), "moments of two ranges overlap"
    flat = steps[0][0].flat
    words = flat.placement(flat.words).end if flat.words is not None else 0
    assert (owned[:words] == 1).all()
    assert (owned[flat.words_end :] == ranks).all()  # heads are everyone's
    whole = OnePassStep(steps[0][0].model, recipe(surgery={"method": "pcgrad"}), torch.float32)
    small = steps[0][0]
    assert small.gradients.J.numel() < 0.35 * whole.gradients.J.numel()
    assert small.optimizer.exp_avg.numel() < 0.4 * whole.optimizer.exp_avg.numel()
