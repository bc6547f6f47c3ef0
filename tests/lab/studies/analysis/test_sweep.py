from __future__ import annotations

import math

import pytest

from muonscale.lab.studies.analysis.sweep import Point, Sweep


def sweep(*losses: list[float]) -> Sweep:
    return Sweep(tuple(Point(2.0**n, dict(enumerate(each))) for n, each in enumerate(losses)))


@pytest.mark.parametrize(
    ("losses", "best", "edge"),
    [
        ([[3.0], [2.0], [4.0]], 1, None),
        ([[1.0], [2.0], [4.0]], 0, "low"),
        ([[3.0], [2.0], [1.0]], 2, "high"),
        ([[3.0, 3.0], [1.0, 4.0], [2.0, 2.5]], 2, "high"),  # by the mean, not by the luckiest
        ([[3.0, 3.0], [2.0], [4.0, 4.0]], 0, "low"),  # a point that lacks a seed is not chosen
        ([[3.0], [2.0], [math.inf]], 1, None),
        ([[math.inf], [math.inf]], None, None),
        ([[], []], None, None),
        ([[2.0]], 0, None),
    ],
)
def test_the_best_point_and_the_edge(
    losses: list[list[float]], best: int | None, edge: str | None
) -> None:
    found = sweep(*losses)
    assert (found.best, found.edge) == (best, edge)


def test_neighbors_that_diverged_are_left_out() -> None:
    found = sweep([3.0], [2.0], [math.inf])
    assert [point.mean for point in found.around] == [3.0, 2.0]
