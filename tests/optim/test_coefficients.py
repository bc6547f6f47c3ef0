from __future__ import annotations

import pytest
import torch

from muonscale.errors import ConfigError
from muonscale.optim.coefficients import SCHEDULES, resolve_triples


def mapped(sigma: float, steps: int) -> float:
    s = torch.tensor(sigma, dtype=torch.float64)
    for a, b, c in resolve_triples("jordan", steps):
        s = a * s + b * s**3 + c * s**5
    return float(s)


@pytest.mark.parametrize(
    ("steps", "sigma", "expected"),
    [
        (5, 1e-4, 0.0485),
        (5, 1e-3, 0.4705),
        (5, 1e-2, 0.6989),
        (5, 1.0, 0.6964),
        (10, 1e-4, 0.7547),
        (10, 1e-3, 0.9881),
        (10, 1e-2, 1.1219),
        (10, 1.0, 1.1253),
    ],
)
def test_jordan_maps_singular_values_as_published(
    steps: int, sigma: float, expected: float
) -> None:
    assert mapped(sigma, steps) == pytest.approx(expected, abs=6e-5)


def test_jordan_stays_in_its_range_and_has_its_slope() -> None:
    values = [mapped(s, 5) for s in torch.logspace(-2, 0, 4001, dtype=torch.float64).tolist()]
    assert min(values) == pytest.approx(0.6818, abs=2e-4)
    assert max(values) == pytest.approx(1.1344, abs=2e-4)
    assert pytest.approx(484.9, abs=0.05) == 3.4445**5


def test_every_schedule_names_its_source() -> None:
    assert all(len(row.source) > 20 and row.triples for row in SCHEDULES.values())


def test_a_list_is_used_in_order_and_its_last_triple_repeated() -> None:
    first, last = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    assert resolve_triples([first, last], 4) == (first, last, last, last)
    assert resolve_triples([first, last], 1) == (first,)
    assert resolve_triples(first, 2) == (first, first)


@pytest.mark.parametrize("wrong", ["jordon", [], [(1.0, 2.0)], (1.0, 2.0)])
def test_unusable_coefficients_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError):
        resolve_triples(wrong, 5)  # type: ignore[arg-type]


def test_a_misspelt_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="jordan"):
        resolve_triples("jordon", 5)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        resolve_triples("jordan", 0)
