from __future__ import annotations

import errno
import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muonscale.errors import CheckpointError
from muonscale.lab import files
from muonscale.lab.files import open_regular
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.checkpoint import (
    find_damage,
    load_facts,
    load_tensors,
    newest_checkpoint,
    newest_intact_checkpoint,
    save_checkpoint,
    saved_steps,
)
from muonscale.lab.training.loop import explain_write_errors


def tensors(value: float, size: int = 8) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((size,), value), "b": torch.full((3,), -value)}}


def save(root: Path, step: int, keep: int = 9) -> None:
    save_checkpoint(root, step, tensors(float(step)), {"step": step}, Processes(), keep=keep)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 3)
    folder = newest_checkpoint(tmp_path, pytest.fail)
    assert folder is not None
    got = tensors(0.0)
    load_tensors(folder, got, Processes())
    assert torch.equal(got["model"]["w"], torch.full((8,), 3.0))
    assert load_facts(folder) == {"step": 3}


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_file_that_cannot_be_read_is_no_misfit(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 3)
    path = tmp_path / "step-00000003" / name
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_tensors(path.parent, tensors(0.0), Processes())
    assert name in str(caught.value) and "does not fit" not in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_run_whose_checkpoints_cannot_be_read_still_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, pattern: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "glob", fail)
    with (
        pytest.raises(CheckpointError, match=r"Permission denied; .* train .* --resume"),
        explain_write_errors(RunFolder(tmp_path)),
    ):
        saved_steps(tmp_path)


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep=2)
    assert saved_steps(tmp_path) == [11, 10]


def test_marked_ones_stay_and_are_not_counted(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_checkpoint(
            tmp_path, step, tensors(1.0), {}, Processes(), keep=2, permanent={1, 3, 6, 99}
        )
    assert saved_steps(tmp_path) == [7, 6, 5, 3, 1]


def test_looking_for_a_whole_one_leaves_what_is_being_written(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    cut(tmp_path / "step-00000002" / "facts.json")
    (tmp_path / ".writing-step-00000003").mkdir()
    said: list[str] = []
    assert newest_intact_checkpoint(tmp_path, said.append) == tmp_path / "step-00000001"
    assert len(said) == 1 and (tmp_path / ".writing-step-00000003").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "facts.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-00000002" / name)
    said: list[str] = []
    folder = newest_checkpoint(tmp_path, said.append)
    assert folder is not None and folder.name == "step-00000001"
    assert len(said) == 1 and "step-00000002 is damaged" in said[0]


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, pytest.fail) is None
    save(tmp_path, 1)
    cut(tmp_path / "step-00000001" / "facts.json")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        newest_checkpoint(tmp_path, lambda text: None)


def test_what_a_killed_writer_left_is_never_read_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".writing-step-00000002").mkdir()
    folder = newest_checkpoint(tmp_path, pytest.fail)
    assert folder is not None and folder.name == "step-00000001"
    assert not (tmp_path / ".writing-step-00000002").exists()


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            CheckpointError,
            match=r"(?s)step 2 cannot be written .*bytes are free.*last good one is step 1",
        ):
            save_checkpoint(tmp_path, 2, tensors(2.0, 100_000), {"step": 2}, Processes(), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert saved_steps(tmp_path) == [1]
    assert find_damage(tmp_path / "step-00000001") is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_tensors(tmp_path / "step-00000001", tensors(0.0, size=9), Processes())
    with pytest.raises(CheckpointError, match="does not fit"):
        load_tensors(tmp_path / "step-00000001", {"model": {"other": torch.zeros(8)}}, Processes())


def test_later_damaged_ones_do_not_push_out_what_is_written_now(tmp_path: Path) -> None:
    for step in (1, 8, 9):
        save(tmp_path, step)
    for step in (8, 9):
        cut(tmp_path / f"step-{step:08d}" / "facts.json")
    save(tmp_path, 2, keep=1)
    assert saved_steps(tmp_path) == [9, 8, 2]
    assert find_damage(tmp_path / "step-00000002") is None


@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_a_link_is_no_checkpoint_and_makes_room(link: bool, tmp_path: Path) -> None:
    save(tmp_path, 1)
    place = tmp_path / "step-00000002"
    place.symlink_to("nowhere") if link else place.write_text("x")
    (tmp_path / "step-abcdefgh").mkdir()
    assert saved_steps(tmp_path) == [1]
    save(tmp_path, 2)
    assert saved_steps(tmp_path) == [2, 1] and find_damage(place) is None


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000007")
    assert find_damage(tmp_path / "step-00000007") == "it contains step 1"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "facts.json"])
def test_a_manifest_that_leaves_out_a_file_is_damage(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[name]
    path.write_text(json.dumps(manifest))
    assert find_damage(path.parent) == f"{name} is not in its manifest"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "facts.json", "manifest.json"])
def test_checkpoints_that_cannot_be_read_now_are_not_given_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def fail(path: Path, *given: Any) -> Any:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_regular(path)

    monkeypatch.setattr(files, "open_regular", fail)
    with pytest.raises(CheckpointError, match="--resume"):
        newest_checkpoint(tmp_path, lambda text: None)
    monkeypatch.undo()
    (tmp_path / "step-00000001" / name).unlink()
    with pytest.raises(CheckpointError, match=r"run\.path=FOLDER"):
        newest_checkpoint(tmp_path, lambda text: None)
