"""Work that is divided among threads, one per core."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from muonscale.optim.newton_schulz.kernels.cpu import run_side_by_side
from muonscale.optim.newton_schulz.orthogonalize import exact_polar, orthogonalize


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def lists_of(parts: list[int]) -> tuple[list[list[int]], list[str], list[int]]:
    lists, names, threads = [], [], []

    def work(own: list[int]) -> None:
        torch.ones(200, 200) @ torch.ones(200, 200)  # what a thread starts with is set by now
        lists.append(own)
        names.append(threading.current_thread().name)
        threads.append(torch.get_num_threads())

    run_side_by_side(work, parts)
    return lists, names, threads


def test_every_part_is_worked_on_once_and_the_rest_gets_all_threads() -> None:
    lists, names, threads = lists_of([0, 1, 2, 3, 4])
    assert sorted(lists[:2]) == [[0, 2], [1, 3]]
    assert lists[2] == [4]
    assert all(name.startswith("muonscale") for name in names[:2])
    assert threads == [1, 1, 2]
    assert torch.get_num_threads() == 2


def test_one_thread_works_on_all_parts_itself() -> None:
    torch.set_num_threads(1)
    lists, names, _ = lists_of([0, 1, 2])
    assert lists == [[0, 1, 2]]
    assert names == [threading.current_thread().name]


def test_work_stays_where_a_dispatch_mode_sees_it() -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(8, 300, 300), form="direct", dtype="float32")
    assert counter.get_total_flops() > 0


def test_an_error_in_a_worker_is_raised() -> None:
    def work(parts: list[int]) -> None:
        raise ValueError(f"part {parts[0]}")

    with pytest.raises(ValueError, match="part 0"):
        run_side_by_side(work, [0, 1])


def test_threads_that_begin_later_have_the_count_that_was_set() -> None:
    lists_of([0, 1])
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]


@pytest.mark.parametrize("count", [1, 2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_every_matrix_of_a_batch_comes_out_orthogonal(count: int) -> None:
    X = torch.randn(count, 260, 300)
    polar = orthogonalize(X, [(1.875, -1.25, 0.375)], 25, dtype="float32")
    torch.testing.assert_close(polar, exact_polar(X).float(), atol=1e-4, rtol=0)
    again = orthogonalize(X, [(1.875, -1.25, 0.375)], 25, dtype="float32")
    assert torch.equal(polar, again)
