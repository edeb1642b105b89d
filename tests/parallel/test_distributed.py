# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one does: the same losses and weights, one output, resumed with any number, ended together."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import multiprocessing
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
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minbert_fast import BertModel, PCGrad, fit, train
from minbert_fast.common import cli
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
from tests.small import read_records, small_data
from tests.step.test_step import CONFIG, SIZES, make_batch, make_model, recipe
from tests.zygote import Zygote, free_port

FORK = multiprocessing.get_context("forkserver")  # a new process without a new import of torch
FORK.set_forkserver_preload([__name__, "torch.fx.experimental.symbolic_shapes"])  # the latter by a backward
WITHOUT_DROPOUT = ["--dropout", "0", "--set", "tasks.sentiment.dropout=0.0", "--set", "tasks.paraphrase.dropout=0.0"]
COMMON = [
    "--recipe", "default", "--lr", "1e-3", "--surgery", "pcgrad", "--batch-size", "7", *WITHOUT_DROPOUT,
    "--set", "training.evaluate_untrained=false", "--set", "logging.every=1",
]  # fmt: skip


def flags_in(folder: Path, *flags: str) -> list[str]:
    """Flags of a run in `folder` on a part of the sample data: six steps an epoch."""
    return [*COMMON, "--data", str(small_data(folder / "data")), "--precision", "fp32", "--output", "run", *flags]


def succeed(zygote: Zygote, ranks: int, folder: Path, *flags: str) -> None:
    zygote.start(flags_in(folder, *flags), ranks, folder)
    assert zygote.wait() == [0] * ranks, logs(folder)


def logs(folder: Path) -> list[str]:
    return [log.read_text() for log in sorted(folder.glob("rank-*.log"))]


def losses(output: Path, tasks: tuple[str, ...] = ("sentiment", "paraphrase", "similarity")) -> list[list[float]]:
    return [[line[f"loss/{task}"] for task in tasks] for line in read_records(output)]


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
    succeed(zygote, 1, folder, "--max-steps", "12")
    return folder / "run"


def trained_as_alone(alone: Path, run: Path) -> None:
    same(alone, run)
    a, b = (json.loads((each / "summary.json").read_text()) for each in (alone, run))
    assert a["tokens"] == b["tokens"]
    assert a["dev"]["score"] == pytest.approx(b["dev"]["score"], abs=0.01)


def test_torchruns_ranks_with_shares_train_as_one_process_does(alone: Path, tmp_path: Path) -> None:
    """Seven examples a task: no number of ranks here divides it."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*start, "-m", "minbert_fast.train", *flags_in(tmp_path, "--max-steps", "12")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained_as_alone(alone, tmp_path / "run")


@pytest.mark.parametrize(
    ("ranks", "shard"), [(2, "true"), *(pytest.param(4, shard, marks=pytest.mark.slow) for shard in ("true", "false"))]
)
def test_ranks_with_shares_train_as_one_process_does(
    ranks: int, shard: str, zygote: Zygote, alone: Path, tmp_path: Path
) -> None:
    succeed(zygote, ranks, tmp_path, "--max-steps", "12", "--set", f"training.shard={shard}")
    trained_as_alone(alone, tmp_path / "run")


@pytest.mark.ci
def test_a_run_of_two_goes_on_as_one_and_one_as_two(zygote: Zygote, alone: Path, tmp_path: Path) -> None:
    flags = ["--max-steps", "12", "--set", "checkpoint.every=4"]
    succeed(zygote, 2, tmp_path, "--stop-after", "4", *flags)
    succeed(zygote, 1, tmp_path, "--stop-after", "8", *flags, "--resume")
    succeed(zygote, 2, tmp_path, "--stop-after", "10", *flags, "--resume", "--set", "training.shard=true")
    succeed(zygote, 2, tmp_path, *flags, "--resume")
    same(alone, tmp_path / "run")


def machine(rank: int, port: int, folder: Path, flags: Sequence[str]) -> None:
    """One of two machines, with a folder and a cache of its own: its only rank."""
    os.chdir(folder)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": "0", "XDG_CACHE_HOME": str(folder / "cache")}
    with Path("rank-0.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        status = cli.run(train.main, flags)
    sys.exit(status)


def on_two_machines(folders: Sequence[Path], *flags: str) -> list[int | None]:
    """The exit statuses of a run."""
    port = free_port()
    processes = [
        FORK.Process(target=machine, args=(*each, flags)) for each in zip((0, 1), (port, port), folders, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.ci
def test_two_machines_train_as_one_process_and_go_on_from_the_same_checkpoint(alone: Path, tmp_path: Path) -> None:
    machines = [tmp_path / "first", tmp_path / "second"]
    for folder in machines:
        flags = flags_in(folder, "--max-steps", "12", "--data", "data")
    assert on_two_machines(machines, *flags, "--stop-after", "4") == [0, 0], [*map(logs, machines)]
    assert not (machines[1] / "run").exists()
    assert all(on_two_machines(machines, *flags, "--resume"))
    reason = 'starts from "step 4, [0-9a-f]{8}" on rank 0, "the beginning" on rank 1; every machine needs'
    for folder in machines:
        assert re.search(f"(?m)^error: cannot train together: {reason}", *logs(folder)), logs(folder)
    shutil.copytree(machines[0] / "run" / "checkpoints", machines[1] / "run" / "checkpoints")
    assert on_two_machines(machines, *flags, "--resume") == [0, 0], [*map(logs, machines)]
    same(alone, machines[0] / "run")


@pytest.mark.ci
def test_machines_with_other_data_are_refused(zygote: Zygote, tmp_path: Path) -> None:
    path = small_data(tmp_path / "shorter") / "ids-sst-train.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    reason = r"data\.train\.sentiment\.rows 40 on rank 0, 39 on rank 1; "
    refused(zygote, tmp_path, "--max-steps 2", ["", "--data shorter"], reason)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


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
    pids = zygote.start(flags_in(folder, *flags.split()), 2, folder, [more.split() for more in own])
    with ended_after(60, pids):
        assert all(zygote.wait())
    for log in logs(folder):
        assert re.search(f"(?m)^error: cannot train together: {reason}", log), log


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
    succeed(zygote, 1, tmp_path, "--max-steps", "4", "--stop-after", "2")
    refused(
        zygote, tmp_path, "--max-steps 4", ["--resume", ""], 'starts from "step 2, .*" on rank 0, "the beginning" on'
    )


@pytest.mark.ci
def test_ranks_hide_the_words_that_one_process_hides(zygote: Zygote, tmp_path: Path) -> None:
    """Masked words are a mean over words, next sentences over pairs; the word embedding's gradient is dense."""
    flags = ["--recipe", "enhancing-mlm-nsp", "--stop-after", "5"]  # within the first stage
    succeed(zygote, 1, tmp_path, *flags, "--output", "alone")
    for name, shard in (("whole", "false"), ("parts", "true")):
        succeed(zygote, 2, tmp_path, *flags, "--output", name, "--set", f"training.shard={shard}")
        same(tmp_path / "alone", tmp_path / name, ("mlm", "nsp"))


@pytest.mark.ci
def test_bf16_and_plain_sums_train_too(zygote: Zygote, tmp_path: Path) -> None:
    succeed(zygote, 2, tmp_path, "--max-steps", "4", "--precision", "bf16", "--surgery", "none")
    assert np.isfinite(losses(tmp_path / "run")).all()


def start(zygote: Zygote, folder: Path) -> list[int]:
    """Two ranks in the middle of their training."""
    pids = zygote.start(flags_in(folder, "--epochs", "50", "--set", "checkpoint.every=5"), 2, folder)
    deadline = time.monotonic() + 120
    while not list((folder / "run" / "checkpoints").glob("step-*")):  # then every rank is in its loop
        assert time.monotonic() < deadline, logs(folder)
        time.sleep(0.02)
    return pids


@pytest.mark.ci
def test_a_killed_rank_ends_the_run_which_goes_on_later(zygote: Zygote, tmp_path: Path) -> None:
    pids = start(zygote, tmp_path)
    with ended_after(60, pids):
        os.kill(pids[1], signal.SIGKILL)
        assert zygote.wait() == [1, -signal.SIGKILL]
    assert re.search("(?m)^error: rank 0 of 2 lost another process", logs(tmp_path)[0])
    succeed(zygote, 1, tmp_path, "--epochs", "50", "--set", "checkpoint.every=5", "--resume", "--stop-after", "1")


@pytest.mark.ci
def test_a_signal_to_one_rank_stops_all_after_the_step(zygote: Zygote, tmp_path: Path) -> None:
    pids = start(zygote, tmp_path)
    with ended_after(60, pids):
        os.kill(pids[1], signal.SIGTERM)
        assert zygote.wait() == [128 + signal.SIGTERM] * 2
    for log in logs(tmp_path):
        assert "SIGTERM: stopped after step" in log
        assert "--resume --output run\n" in log  # not rank 1's temporary directory
        assert "Traceback" not in log


@pytest.mark.ci
def test_the_reference_backend_is_for_one_process(zygote: Zygote, tmp_path: Path) -> None:
    zygote.start(flags_in(tmp_path, "--backend", "reference", "--max-steps", "1"), 2, tmp_path)
    assert all(zygote.wait())
    assert any("trains in one process, not in 2" in log for log in logs(tmp_path))


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


def test_messages_between_processes(tmp_path: Path) -> None:
    size = 3
    arguments = (size, free_port(), free_port(), tmp_path)
    torch.multiprocessing.start_processes(speak, arguments, size, start_method="forkserver")
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
    ("method", "shard"), [("torchjd:Random", "false"), pytest.param("gradvac", "true", marks=pytest.mark.slow)]
)
def test_three_ranks_draw_the_same_numbers_and_weigh_alike(
    zygote: Zygote, method: str, shard: str, tmp_path: Path
) -> None:
    """Each rank's own random numbers (dropout) must not reach the method; famo needs the losses of the whole step."""
    if method.startswith("torchjd:"):
        pytest.importorskip("torchjd.aggregation")
    flags = ["--max-steps", "4", "--surgery", method, "--set", "weighting.method=famo"]
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
