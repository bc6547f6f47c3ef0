from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from muonscale.lab.studies.telescope.grid import Grid, most_places, points_at, value_at

ZERO = (Fraction(0), Fraction(0))


@pytest.mark.parametrize(
    ("first", "count", "least", "sizes"),
    [
        (8, 2, 1, [8, 5, 3, 1, 1]),  # the paper's grids: 8 x 8, 5 x 5, 3 x 3, 1 x 1
        (8, 2, 3, [8, 5, 3, 3, 3]),  # as it draws the last one
        (9, 1, 1, [9, 3, 1, 1]),  # 2.25 is rounded up to 3, 0.56 to 1
        (8, 3, 1, [8, 7, 5, 3, 3]),  # 5.04, 3.17, 2, 1.26
        (5, 2, 1, [5, 3, 3, 1]),
        (10, 2, 1, [10, 5, 3, 3, 1]),  # 5 is odd already
    ],
)
def test_a_level_has_a_quarter_of_the_points_rounded_up_to_odd(
    first: int, count: int, least: int, sizes: list[int]
) -> None:
    assert [points_at(first, level, count, least) for level in range(len(sizes))] == sizes


def test_a_grid_is_centered_and_its_spacing_halves() -> None:
    assert Grid.around(ZERO, 4, 0).axes[0] == tuple(Fraction(n, 2) for n in (-3, -1, 1, 3))
    finer = Grid.around((Fraction(1, 2), Fraction(-3, 2)), 3, 1)
    assert finer.axes[0] == (Fraction(0), Fraction(1, 2), Fraction(1))
    assert finer.axes[1] == (Fraction(-2), Fraction(-3, 2), Fraction(-1))
    assert len(finer.places) == 9


def test_equal_offsets_are_equal_values_whatever_the_level() -> None:
    assert value_at(0.02, 2, Fraction(3)) == 0.16
    assert value_at(0.02, 4, Fraction(1, 2)) == 0.04
    assert value_at(0.03, 3, Fraction(1, 4)) == pytest.approx(0.03 * 3**0.25, rel=1e-6)
    coarse = Grid.around(ZERO, 5, 0).axes[0]
    fine = Grid.around((Fraction(1, 2), Fraction(0)), 5, 2).axes[0]
    assert {value_at(0.02, 2, o) for o in coarse} & {value_at(0.02, 2, o) for o in fine} == {
        0.02,
        0.04,
    }


def test_ends_and_what_lies_beyond() -> None:
    grid = Grid.around(ZERO, 3, 0)
    one = Fraction(1)
    assert grid.ends(ZERO) == []
    assert grid.ends((one, Fraction(0))) == [(0, 1)]
    assert grid.ends((one, -one)) == [(0, 1), (1, -1)]
    assert grid.extended((0, 1)).axes[0] == (-one, Fraction(0), one, 2 * one)
    assert grid.extended((1, -1)).axes == (grid.axes[0], (-2 * one, *grid.axes[1]))
    assert Grid.around(ZERO, 1, 3).ends(ZERO) == []


def test_lines_and_neighbors() -> None:
    grid = Grid.around(ZERO, 5, 1)
    half = Fraction(1, 2)
    assert grid.line((half, -half), 1) == [(half, n * half) for n in range(-2, 3)]
    assert set(grid.near((2 * half, -half))) == {
        (a * half, b * half) for a in (1, 2) for b in (-2, -1, 0)
    }


@pytest.mark.parametrize("shape", [(3, 3), (8, 8), (3, 5), (5,), (3, 3, 3), (1, 1)])
@pytest.mark.parametrize("lines", [0, 1, 2, 3])
def test_the_most_that_extending_can_make(shape: tuple[int, ...], lines: int) -> None:
    def added(to: tuple[int, ...]) -> int:
        return math.prod(size + to.count(n) if size > 1 else 1 for n, size in enumerate(shape))

    choices = itertools.product(range(len(shape)), repeat=lines)
    assert most_places(shape, lines) == max(added(choice) for choice in choices)
