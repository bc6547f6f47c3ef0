from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonscale.lab.studies.search.descent import Descent, Setting, descend, descend_equally

Loss = Callable[[Setting], float]


def bowl(*best: float, tilt: float = 0.0) -> Loss:
    """Return losses with one minimum; with a tilt no axis of the valley is an axis of the grid."""

    def loss(setting: Setting) -> float:
        away = [x - b for x, b in zip(setting, best, strict=True)]
        cross = sum(a * b for a, b in itertools.pairwise(away))
        return 3 + 0.1 * sum(a * a for a in away) + tilt * cross

    return loss


def lowest_of_neighbors(loss: Loss, setting: Setting) -> float:
    return min(
        loss((*setting[:axis], setting[axis] + side, *setting[axis + 1 :]))
        for axis in range(len(setting))
        for side in (-1, 1)
    )


def test_neighbors_along_one_key_then_the_next() -> None:
    found = descend(bowl(0, 0), (0, 0), least=5, most=24)
    assert found.tried == ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
    assert (found.best, found.edges, found.ended, found.tuned) == ((0, 0), (), True, True)


@pytest.mark.parametrize(
    ("loss", "best"),
    [
        (bowl(0.2, -0.3), (0, 0)),
        (bowl(5, -4), (5, -4)),  # far from the start: edges are extended
        (bowl(2, 2, tilt=-0.08), (2, 2)),
        (bowl(-3), (-3,)),
        (bowl(1, 2, 3), (1, 2, 3)),
    ],
)
def test_the_lowest_of_a_valley_is_found(loss: Loss, best: Setting) -> None:
    found = descend(loss, (0,) * len(best), least=1, most=60)
    assert (found.best, found.tuned) == (best, True)
    assert loss(best) < lowest_of_neighbors(loss, best)
    assert len(set(found.tried)) == len(found.tried)


def test_a_valley_between_the_axes_is_found_by_the_settings_that_fill_up() -> None:
    loss = bowl(2, 2, tilt=-0.12)
    assert descend(loss, (0, 0), least=1, most=40).best == (1, 1)  # all four neighbors are higher
    assert descend(loss, (0, 0), least=12, most=40).best == (2, 2)


def test_an_end_with_the_largest_number_is_not_tuned() -> None:
    found = descend(bowl(9, 0), (0, 0), least=5, most=8)
    assert len(found.tried) == 8
    assert (found.ended, found.tuned, found.best) == (True, False, (6, 0))
    assert found.edges == ((0, 1), (1, -1), (1, 1))


def test_a_setting_that_diverged_is_worse_than_any_other() -> None:
    found = descend(lambda s: math.inf if s[0] > 0 else bowl(2, 0)(s), (0, 0), least=1, most=24)
    assert (found.best, found.tuned) == ((0, 0), True)


def test_all_keys_are_lowered_while_every_setting_diverges() -> None:
    found = descend(lambda s: math.inf if s[0] > -2 else bowl(-2, -2)(s), (0, 0), least=1, most=24)
    assert found.tried[:3] == ((0, 0), (-1, -1), (-2, -2))
    assert (found.best, found.tuned) == ((-2, -2), True)


def test_a_neighbor_that_failed_leaves_an_edge() -> None:
    found = descend(lambda s: math.nan if s == (1, 0) else bowl(0, 0)(s), (0, 0), 1, 24)
    assert (found.ended, found.tuned, found.edges) == (True, False, ((0, 1),))


def test_a_search_whose_runs_all_fail_ends() -> None:
    found = descend_equally(
        {"broken": lambda _: math.nan, "good": bowl(0, 0)}, dict.fromkeys(("broken", "good"), (0, 0)),
        least=9, most=24,
    )  # fmt: skip
    assert found["broken"] == Descent(((0, 0),), True, None, ())
    assert (len(found["good"].tried), found["good"].tuned) == (9, True)


def test_a_search_that_ends_early_goes_on_near_its_best() -> None:
    square = {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert set(descend(bowl(0, 0), (0, 0), least=9, most=24).tried) == square
    line = descend(bowl(0), (0,), least=9, most=24)  # a single key has enough settings too
    assert set(line.tried) == {(x,) for x in range(-4, 5)}


def test_all_try_equal_numbers_of_settings() -> None:
    losses: dict[str, Loss] = {"near": bowl(0, 0), "far": bowl(4, 4), "one": bowl(1)}
    found = descend_equally(losses, {"near": (0, 0), "far": (0, 0), "one": (0,)}, 9, 40)
    (number,) = {len(search.tried) for search in found.values()}
    assert number == len(descend(losses["far"], (0, 0), 9, 40).tried) > 9
    assert all(search.tuned for search in found.values())


def test_a_better_setting_among_those_that_fill_up_is_followed() -> None:
    def two(setting: Setting) -> float:  # no neighbor of (0, 0) leads to the lower valley
        return min(bowl(0, 0)(setting), 0.5 + bowl(3, 3)(setting) - 1.5)

    assert descend(two, (0, 0), least=5, most=40).best == (0, 0)
    found = descend_equally({"two": two, "far": bowl(6, 0)}, {"two": (0, 0), "far": (0, 0)}, 9, 40)
    assert found["two"].best == (3, 3)
    assert len(found["two"].tried) == len(found["far"].tried)
    assert found["two"].tuned and found["far"].tuned


def test_no_search_has_ended_before_all_have() -> None:
    known: dict[str, Callable[[Setting], float | None]] = {
        "done": bowl(0, 0),
        "waiting": lambda _: None,
    }
    found = descend_equally(known, {"done": (0, 0), "waiting": (0, 0)}, 5, 24)
    assert not found["done"].ended and not found["done"].tuned
    assert found["done"].best == (0, 0)


VALUES = st.one_of(st.integers(0, 9).map(float), st.sampled_from([math.inf, math.nan]))


@settings(max_examples=40, deadline=None)
@given(
    tables=st.fixed_dictionaries(
        {name: st.lists(VALUES, min_size=49, max_size=49) for name in ("a", "b")}
    ),
    picks=st.lists(st.integers(0, 10**6), min_size=60, max_size=60),
    least=st.integers(1, 9),
)
def test_settings_are_added_and_never_dropped_whatever_ends_first(
    tables: Mapping[str, list[float]], picks: list[int], least: int
) -> None:
    starts = {"a": (0, 0), "b": (0,)}

    def loss_of(name: str, setting: Setting) -> float:
        return tables[name][sum((x % 7) * 7**n for n, x in enumerate(setting))]

    def search(known: set[tuple[str, Setting]] | None) -> dict[str, Descent]:
        return descend_equally(
            {
                name: lambda s, name=name: (
                    loss_of(name, s) if known is None or (name, s) in known else None
                )
                for name in starts
            },
            starts,
            least,
            12,
        )

    known: set[tuple[str, Setting]] = set()
    planned: dict[str, tuple[Setting, ...]] = dict.fromkeys(starts, ())
    for pick in picks:
        now = search(known)
        for name, found in now.items():
            assert found.tried[: len(planned[name])] == planned[name]
            planned[name] = found.tried
        waiting = sorted((n, s) for n in starts for s in planned[n] if (n, s) not in known)
        assert bool(waiting) != all(found.ended for found in now.values())
        if not waiting:
            break
        known.add(waiting[pick % len(waiting)])
    assert repr(search(known)) == repr(search(None))
