"""Which conversations share a row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonscale.lab.data.chat.store import pack

LENGTHS = st.integers(5, 40).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))
)


@given(LENGTHS)
def test_every_item_is_in_one_row_and_no_row_is_too_long(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows = pack(np.array(lengths, np.int64), capacity)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths)))
    used = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < size <= capacity for size in used)
    # any two rows together are longer than one: else the later one's items had found room
    assert all(a + b > capacity for a, b in itertools.combinations(used, 2))


def fewest_rows(lengths: list[int], rooms: tuple[int, ...] = ()) -> int:
    """Try everything."""
    if not lengths:
        return len(rooms)
    first, *rest = lengths
    places = {room: at for at, room in enumerate(rooms) if room >= first}
    ways = [
        fewest_rows(rest, (*rooms[:at], room - first, *rooms[at + 1 :]))
        for room, at in places.items()
    ]
    return min([*ways, fewest_rows(rest, (*rooms, 12 - first))])


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_few_items_take_hardly_more_rows_than_the_fewest(lengths: list[int]) -> None:
    assert len(pack(np.array(lengths), 12)) <= 11 / 9 * fewest_rows(lengths) + 2 / 3


@pytest.mark.parametrize("seed", range(5))
def test_many_items_leave_hardly_any_room(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(5.5, 1, 5000).astype(np.int64) + 1, 2049)
    rows = pack(lengths, 2049)
    assert len(rows) <= 1.02 * lengths.sum() / 2049 + 1


def test_the_same_lengths_give_the_same_rows_by_hand() -> None:
    assert pack(np.array([3, 7, 5, 2, 3]), 10) == [[1, 0], [2, 4, 3]]
    assert pack(np.empty(0, np.int64), 10) == []


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_out_of_range_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length}"):
        pack(np.array([3, length]), 10)
