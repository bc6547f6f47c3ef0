"""Grids of several hyper-parameters, as the telescope refines them (arXiv 2505.02222, section 3.2).

A place has an offset for every hyper-parameter: how many steps of the first grid, on a logarithmic
scale, a value is above the first center. Offsets are fractions of a power of two, so places of
different grids are equal exactly if their values are.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

Place = tuple[Fraction, ...]
"""An offset for every hyper-parameter."""
End = tuple[int, int]
"""The index of a hyper-parameter, and -1 for its lowest or 1 for its highest value."""


def points_at(first: int, level: int, count: int, least: int = 1) -> int:
    """Return the points per hyper-parameter of a level: m * 4^(-l/k), rounded up to an odd number.

    An odd number has the optimum of the level before in its middle. Level 0 has m points, even or
    odd.

    Args:
        first: m, the points of level 0.
        level: l, counted from 0; the width doubles from one to the next.
        count: k, the number of hyper-parameters.
        least: fewest points, an odd number.

    Examples:
        >>> [points_at(8, level, 2) for level in range(4)]
        [8, 5, 3, 1]
    """
    if level == 0:
        return first
    exact = first * 4 ** (-level / count)
    return max(least, math.ceil(exact - 1e-9) | 1)


def value_at(center: float, ratio: float, offset: Fraction) -> float:
    """Return the value of a hyper-parameter, to six digits.

    Args:
        center: value at offset 0.
        ratio: ratio of neighboring values of the first grid.
        offset: offset of the place.
    """
    return float(f"{center * ratio ** float(offset):.6g}")


@dataclass(frozen=True)
class Grid:
    """All combinations of the offsets of every hyper-parameter."""

    axes: tuple[tuple[Fraction, ...], ...]
    """Offsets of each hyper-parameter, evenly spaced, in rising order."""
    step: Fraction
    """Distance of neighboring offsets."""

    @classmethod
    def around(cls, center: Place, points: int, level: int) -> Grid:
        """Return the grid of a level: `points` for every hyper-parameter, 2^-level steps apart."""
        step = Fraction(1, 2**level)
        shifts = [step * Fraction(2 * n - points + 1, 2) for n in range(points)]
        return cls(tuple(tuple(middle + shift for shift in shifts) for middle in center), step)

    @property
    def shape(self) -> tuple[int, ...]:
        """Points of every hyper-parameter."""
        return tuple(map(len, self.axes))

    @property
    def places(self) -> list[Place]:
        """All places, the last hyper-parameter changing fastest."""
        return list(itertools.product(*self.axes))

    def ends(self, place: Place) -> list[End]:
        """Return the ends of the grid at which a place is; a single point has none."""
        found = []
        for number, axis in enumerate(self.axes):
            if len(axis) > 1 and place[number] in (axis[0], axis[-1]):
                found.append((number, 1 if place[number] == axis[-1] else -1))
        return found

    def extended(self, end: End) -> Grid:
        """Return the grid with one more value beyond an end."""
        number, side = end
        axis = self.axes[number]
        longer = (*axis, axis[-1] + self.step) if side > 0 else (axis[0] - self.step, *axis)
        return Grid((*self.axes[:number], longer, *self.axes[number + 1 :]), self.step)

    def line(self, place: Place, number: int) -> list[Place]:
        """Return the places that differ from `place` in one hyper-parameter, in rising order."""
        return [(*place[:number], offset, *place[number + 1 :]) for offset in self.axes[number]]

    def near(self, place: Place) -> list[Place]:
        """Return a place and its neighbors, diagonal ones included."""
        return [
            other
            for other in self.places
            if all(abs(a - b) <= self.step for a, b in zip(other, place, strict=True))
        ]


def most_places(shape: tuple[int, ...], lines: int) -> int:
    """Return the most places that a grid can have after a number of lines is added.

    The most expensive extension is that of the hyper-parameter with the fewest values.
    """
    sizes = sorted(shape)
    for _ in range(lines):
        extensible = [n for n, size in enumerate(sizes) if size > 1]
        if not extensible:
            break
        sizes[extensible[0]] += 1
        sizes.sort()
    return math.prod(sizes)
