# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact round trip, every kind of damage is reported and skipped, no pickle."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minbert_fast.common import storage
from minbert_fast.common.errors import RunError
from minbert_fast.trainer.checkpoint import CheckpointStore, differences

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {str(dtype): (torch.randn(3, 5, generator=generator) * 9).to(dtype) for dtype in DTYPES}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["strided"] = torch.randn(6, 4, generator=generator).t()
    tensors["view"] = torch.randn(100, generator=generator)[10:30].view(4, 5)
    return tensors


def test_tensors_are_read_back_bit_by_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    digest = storage.write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert digest == storage.file_digest(tmp_path / "x.safetensors")


def test_state_is_read_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    state = {"step": 7, "score": 0.1 + 0.2, "nested": {"list": [1, None, "ü"]}}
    store.save(7, some_tensors(), state)
    found = store.newest(pytest.fail)
    assert found is not None
    assert (found.step, found.state) == (7, state)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path, 2).newest(pytest.fail) is None
    assert CheckpointStore(tmp_path / "absent", 2).newest(pytest.fail) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 5, 100_000_000, 20):
        store.save(step, {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-100000000"]


def test_no_pickle_is_written(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, 1).save(3, some_tensors(), {"a": 1})
    names = sorted(p.name for p in (tmp_path / "step-00000003").iterdir())
    assert names == ["manifest.json", "state.json", "tensors.safetensors"]


def damage_truncate(path: Path) -> None:
    os.truncate(path / "tensors.safetensors", 100)


def damage_bit(path: Path) -> None:
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(content)


def damage_state(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("2", "3"))


def damage_manifest_json(path: Path) -> None:
    (path / "manifest.json").write_text("{")


def damage_manifest_shape(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def damage_manifest_deep(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)


def damage_manifest_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


def damage_absent(path: Path) -> None:
    (path / "state.json").unlink()


def damage_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def damage_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file where a directory was")


def damage_other_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-00000001", path)


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damaged_checkpoints_are_reported_and_skipped(tmp_path: Path, damage: object) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, {"x": torch.full((40,), float(step))}, {"number": 2})
    damage(tmp_path / "step-00000002")  # type: ignore[operator]
    said: list[str] = []
    found = store.newest(said.append)
    assert found is not None
    assert found.step == 1
    assert torch.equal(found.tensors["x"], torch.ones(40))
    assert len(said) == 1
    assert "step-00000002" in said[0]
    assert "\n" not in said[0]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".damaged")] == ["step-00000002.damaged"]


def test_a_process_that_shares_the_folder_leaves_a_damaged_checkpoint_in_place(tmp_path: Path) -> None:
    """Two processes that resumed a run renamed the same directory, and the second one failed."""
    store = CheckpointStore(tmp_path)
    store.save(5, {}, {})
    (tmp_path / "step-00000008").mkdir()
    said: list[str] = []
    found = store.newest(said.append, rename=False)
    assert found is not None
    assert (found.step, len(said)) == (5, 1)
    assert (tmp_path / "step-00000008").is_dir()


def test_damaged_checkpoints_do_not_displace_good_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(5, {}, {})
    for step in (8, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert store.newest(lambda line: None) is not None
    store.save(6, {}, {})
    found = store.newest(pytest.fail)
    assert found is not None
    assert found.step == 6


def test_a_full_disk_gives_a_one_line_error_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"x": torch.ones(3)}, {})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"step-00000002: cannot be written \(No space left on device\)"):
        store.save(2, {"x": torch.ones(3)}, {})
    monkeypatch.undo()
    found = store.newest(pytest.fail)
    assert found is not None
    assert found.step == 1


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(4, {}, {"turn": 1})
    store.save(4, {}, {"turn": 2})
    found = store.newest(pytest.fail)
    assert found is not None
    assert found.state == {"turn": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("moment", range(8))
def test_a_crash_between_any_two_renames_leaves_a_complete_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Stops the writer before its n-th rename or removal; after `sweep` the directory has its old or its new content."""
    target = tmp_path / "best"
    storage.write_directory(target, lambda d: (d / "a").write_text("old") and None)
    calls = 0

    class CrashError(Exception):
        pass

    def counted(original):  # type: ignore[no-untyped-def]
        def call(*arguments, **keywords):  # type: ignore[no-untyped-def]
            nonlocal calls
            if calls == moment:
                raise CrashError
            calls += 1
            return original(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(storage, "remove", counted(storage.remove))
        patch.setattr(storage, "flush_directory", counted(storage.flush_directory))
        try:
            storage.write_directory(target, lambda d: (d / "a").write_text("new") and None)
            crashed = False
        except CrashError:
            crashed = True
    storage.sweep(tmp_path)
    assert (target / "a").read_text() == ("old" if crashed and moment < 5 else "new")
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_directory_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """An export to a full disk left its weights there, under a hidden name."""

    def fill(directory: Path) -> None:
        (directory / "a").write_text("new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        storage.write_directory(tmp_path / "best", fill)
    assert list(tmp_path.iterdir()) == []


def test_differences_are_named_by_key() -> None:
    then = {"optimizer": {"lr": 1e-5, "eps": 1.0}, "tasks": {"sentiment": {}}, "same": [1, 2]}
    now = {"optimizer": {"lr": 2e-5, "eps": 1.0, "clip": 1.0}, "tasks": {}, "same": [1, 2]}
    assert differences(then, now) == [
        "optimizer.lr was 1e-05, now 2e-05",
        "optimizer.clip was absent, now 1.0",
        "tasks.sentiment was {}, now absent",
    ]
    assert differences(then, then) == []
