"""The environment that torchrun sets, where something else has set a part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from muonscale.cli import is_first_process
from muonscale.errors import ConfigError, MuonscaleError
from muonscale.lab.config.sections import ParallelSection
from muonscale.lab.parallel.processes import (
    Processes,
    check_alone,
    init_processes,
    is_lost_peer,
    was_restarted,
)
from muonscale.lab.training.checkpoint import save_checkpoint

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, ("RANK", "WORLD_SIZE", "'2'", "torchrun")),
        ({"WORLD_SIZE": "x"}, ("WORLD_SIZE", "'x'", "torchrun")),
        ({"WORLD_SIZE": ""}, ("WORLD_SIZE", "''")),
        ({"WORLD_SIZE": "-1"}, ("WORLD_SIZE", "'-1'")),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ("MASTER_PORT",)),
        ({"WORLD_SIZE": "2", "RANK": "q"}, ("RANK", "'q'")),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_PORT": "1"}, ("RANK is 2", "WORLD_SIZE is 2")),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "?"}, ("LOCAL_RANK", "'?'")),
    ],
    ids=str,
)
def test_a_part_of_the_environment_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    block = init_processes(ParallelSection(), torch.device("cpu"))
    with pytest.raises(ConfigError) as error, block:
        pass
    for word in words:
        assert word in str(error.value)
    is_first_process()  # answers, so that the message is printed


def test_other_readers_of_the_environment_refuse_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        check_alone("eval runs in one process")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "x")
    with pytest.raises(ConfigError, match="TORCHELASTIC_RESTART_COUNT"):
        was_restarted()


def test_a_lost_peer_is_told_from_a_full_disk() -> None:
    lost, full = RuntimeError("Connection closed by peer [::1]:1"), OSError(28, "No space left")
    assert is_lost_peer(lost)
    assert is_lost_peer(CheckpointException("", {1: (lost, None)}))  # type: ignore[dict-item]
    assert not is_lost_peer(full)
    assert not is_lost_peer(CheckpointException("", {0: (full, None)}))  # type: ignore[dict-item]


class _LostPeer(Processes):
    """Another process ends while files are being hashed."""

    def gather(self, value: object) -> list[object]:
        raise RuntimeError("[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


def test_a_peer_that_is_lost_while_saving_is_no_disk_problem(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"w": torch.ones(2)}, {"step": 1}, Processes(), keep=2)
    with pytest.raises(MuonscaleError, match="another process of the job is gone") as error:
        save_checkpoint(tmp_path, 2, {"w": torch.ones(2)}, {"step": 2}, _LostPeer(), keep=2)
    assert "bytes are free" not in str(error.value)
    assert "step 1" in str(error.value) and "--resume" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
