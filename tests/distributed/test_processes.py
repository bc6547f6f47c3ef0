"""What processes say to each other besides gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from muonscale.errors import CheckpointError
from muonscale.lab.files import UnusualFileError
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import parse_layout
from muonscale.lab.training.signals import StopRequest
from muonscale.lab.training.step import seed_step


def processes(layout: str, name: str) -> Processes:
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    rank = dist.get_rank()
    return Processes(parse_layout(layout), rank, rank % 2, torch.device("cpu"), store)


def sums(layout: str) -> Any:
    own = processes(layout, "sums")
    return own.sum(float(own.data_rank + 1), torch.tensor(2.0)), own.gather(own.rank)


def test_sums_are_over_the_data_and_count_no_rank_twice(world) -> None:
    assert world(4).run(sums, "fsdp=4") == [([10.0, 8.0], [0, 1, 2, 3])] * 4
    assert world(4).run(sums, "fsdp=2,tp=2") == [([3.0, 4.0], [0, 1, 2, 3])] * 4


def stopped_by(rank: int | None) -> int | None:
    stop = StopRequest(processes("ddp=3", "stop").max_flag)
    if dist.get_rank() == rank:
        stop.signum = 15
    return stop.requested()


@pytest.mark.parametrize(("rank", "expected"), [(None, None), (0, 15), (2, 15)])
def test_a_signal_to_any_rank_is_known_to_all(world, rank: int | None, expected: int) -> None:
    assert world(3).run(stopped_by, rank) == [expected] * 3


def alone(name: str) -> tuple[int, list[int]]:
    own = processes("ddp=4", name)
    done: list[int] = []

    def work() -> int:
        done.append(own.rank)
        return 40 + own.rank

    return own.on_first(work), done


def test_the_first_rank_works_and_all_have_the_result(world) -> None:
    assert world(4).run(alone, "alone") == [(40, [0]), (40, []), (40, []), (40, [])]


def per_machine(name: str) -> tuple[list[str], list[str]]:
    """Two machines of two ranks each; the order of events on each."""
    own = processes("ddp=4", name)
    store = dist.PrefixStore(f"{name} events", dist.distributed_c10d._get_default_store())

    def work() -> str:
        machine = own.rank // 2
        return str(store.add(f"machine {machine}", 1))

    return [own.first_on_machine(work)], []


def test_the_first_rank_of_every_machine_goes_ahead(world) -> None:
    assert [order for order, _ in world(4).run(per_machine, "ahead")] == [
        ["1"],
        ["2"],
        ["1"],
        ["2"],
    ]


def refused(name: str) -> str:
    def work() -> None:
        raise CheckpointError("the folder is full")

    try:
        processes("ddp=2", name).on_first(work)
    except CheckpointError as error:
        return str(error)
    return ""


def test_an_error_of_the_first_rank_is_raised_on_all(world) -> None:
    assert world(2).run(refused, "refused") == ["the folder is full"] * 2


class NotPickled(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def refused_with(error: Exception, name: str) -> str:
    def work() -> None:
        raise error

    try:
        processes("ddp=2", name).on_first(work)
    except Exception as found:
        return str(found)
    return ""


def test_errors_of_any_class_reach_all_ranks(world) -> None:
    pipe = UnusualFileError("is a pipe", Path("/some/file"))
    assert world(2).run(refused_with, pipe, "pipe") == ["/some/file is a pipe"] * 2
    first, second = world(2).run(refused_foreign, "foreign")
    assert first == "no network" and second == "NotPickled: no network"


def refused_foreign(name: str) -> str:
    return refused_with(NotPickled("no", "network"), name)


def test_random_numbers_follow_from_seed_step_and_share() -> None:
    def drawn(*position: int) -> list[float]:
        seed_step(*position)
        return torch.rand(4).tolist()

    first = drawn(0, 5, 1)
    assert drawn(0, 5, 1) == first
    others = [drawn(1, 5, 1), drawn(0, 6, 1), drawn(0, 5, 2)]
    assert len(np.unique([first, *others])) == 16
