"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from muonscale.errors import CheckpointError
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.background_save import BackgroundSaver
from muonscale.lab.training.checkpoint import (
    find_damage,
    load_facts,
    load_tensors,
    newest_checkpoint,
    newest_intact_checkpoint,
    saved_steps,
)

write_data: Any = FileSystemWriter.write_data


class Disk:
    """A disk that writes when it is told to."""

    def __init__(self) -> None:
        self.free = Event()
        self.error: Exception | None = None

    def write_data(self, *words: Any, **options: Any) -> Any:
        assert self.free.wait(60)
        if self.error is not None:
            raise self.error
        return write_data(*words, **options)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *w, **o: disk.write_data(*w, **o))
    yield disk
    disk.free.set()


def state(value: float) -> dict[str, Any]:
    whole = torch.full((4, 6), value)
    return {"model": {"w": whole, "view": whole[1:, 2:4]}, "optimizer": {"step": 3, "lr": value}}


def save(saver: BackgroundSaver, root: Path, step: int, keep: int = 9) -> dict[str, Any]:
    tensors = state(float(step))
    saver.save(root, step, tensors, {"step": step}, keep=keep)
    return tensors


def poll_until_complete(saver: BackgroundSaver, root: Path, step: int) -> None:
    end = time.monotonic() + 60
    while step not in saved_steps(root):
        assert time.monotonic() < end
        saver.poll()
        time.sleep(0.01)


def test_a_checkpoint_is_the_state_at_its_step_whatever_training_does(
    disk: Disk, tmp_path: Path
) -> None:
    saver = BackgroundSaver(Processes())
    tensors = save(saver, tmp_path, 3)
    tensors["model"]["w"].fill_(99)
    tensors["optimizer"]["lr"] = 99.0
    saver.poll()
    assert saved_steps(tmp_path) == []  # it is not written yet
    disk.free.set()
    poll_until_complete(saver, tmp_path, 3)
    folder = tmp_path / "step-00000003"
    assert find_damage(folder) is None and load_facts(folder) == {"step": 3}
    got = state(0.0)
    load_tensors(folder, got, Processes())
    assert torch.equal(got["model"]["w"], torch.full((4, 6), 3.0))
    assert torch.equal(got["model"]["view"], torch.full((3, 2), 3.0))
    assert got["optimizer"] == {"step": 3, "lr": 3.0}


def test_what_is_being_written_when_the_process_dies_leaves_the_one_before(
    disk: Disk, tmp_path: Path
) -> None:
    saver = BackgroundSaver(Processes())
    disk.free.set()
    save(saver, tmp_path, 1)
    saver.wait()
    disk.free.clear()
    save(saver, tmp_path, 2)
    assert newest_intact_checkpoint(tmp_path, pytest.fail) == tmp_path / "step-00000001"
    disk.free.set()
    saver.wait()
    assert newest_checkpoint(tmp_path, pytest.fail) == tmp_path / "step-00000002"


def test_the_next_one_waits_for_the_one_before(disk: Disk, tmp_path: Path) -> None:
    saver = BackgroundSaver(Processes())
    disk.free.set()
    for step in range(1, 6):
        save(saver, tmp_path, step, keep=2)
        assert saved_steps(tmp_path) == list(range(step - 1, 0, -1))[:2]
        assert len(list(tmp_path.glob(".writing-*"))) == 1
    saver.wait()
    assert saved_steps(tmp_path) == [5, 4]
    assert {path.name[:5] for path in tmp_path.iterdir()} == {"step-"}


@pytest.mark.parametrize("how", ["poll", "wait", "save"])
def test_an_error_of_the_thread_is_raised_at_the_next_step_and_at_the_end(
    how: str, disk: Disk, tmp_path: Path
) -> None:
    saver = BackgroundSaver(Processes())
    disk.free.set()
    save(saver, tmp_path, 1)
    saver.wait()
    disk.error = OSError(28, "No space left on device")
    save(saver, tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"step 2 .*No space left.* last good one is step 1"):
        if how == "save":
            save(saver, tmp_path, 3)
        while how == "poll":
            saver.poll()
        saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    disk.error = None
    save(saver, tmp_path, 4)
    saver.wait()
    assert saved_steps(tmp_path) == [4, 1]
