from __future__ import annotations

import pytest
import torch

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.coefficients import SCHEDULES
from muonscale.optim.newton_schulz.polar_express import apply_safety, minimax_quintic, polar_express

PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def test_the_generator_gives_the_published_table() -> None:
    for step, (found, expected) in enumerate(zip(polar_express(8), PUBLISHED, strict=True)):
        # From the seventh row on the interval is so narrow that the system is hard to solve.
        assert found == pytest.approx(expected, rel=1e-13 if step < 6 else 1e-8)


def test_the_generator_gives_nanochats_table() -> None:
    found = polar_express(5, cushion=0.02, safety=1.02)
    for row, expected in zip(found, SCHEDULES["polar_express_nanochat"].triples, strict=True):
        assert row == pytest.approx(expected, rel=1e-13)


def test_the_generator_gives_the_table_of_gram_newton_schulz() -> None:
    found = [apply_safety(triple, 1.05) for triple in polar_express(5)]
    for row, expected in zip(found, SCHEDULES["gram_ns"].triples, strict=True):
        assert row == pytest.approx(expected, rel=1e-13)


def test_the_generator_gives_the_first_coefficients_of_the_authors_newer_defaults() -> None:
    found = [a for a, _, _ in polar_express(6, cushion=0.02, safety=1.01, safe_last=True)]
    expected = [8.23731, 4.08244, 3.92635, 3.29822, 2.29704, 1.87638]
    assert found == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize(("low", "high"), [(0.001, 1.0), (0.1, 1.0), (0.3, 1.7)])
def test_no_quintic_near_it_is_nearer_to_one(low: float, high: float) -> None:
    x = torch.linspace(low, high, 4001, dtype=torch.float64)
    powers = torch.stack([x, x**3, x**5])

    def worst(triple: torch.Tensor) -> float:
        return float((triple @ powers - 1).abs().max())

    best = torch.tensor(minimax_quintic(low, high), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        nudge = 1e-3 * torch.randn(3, generator=generator, dtype=torch.float64)
        assert worst(best + nudge) > worst(best) - 1e-9


def test_every_step_narrows_the_interval_it_was_made_for() -> None:
    low, high = 0.001, 1.0
    for a, b, c in polar_express(7, cushion=0.0):
        x = torch.linspace(low, high, 20001, dtype=torch.float64)
        values = a * x + b * x**3 + c * x**5
        assert float(values.min() / values.max()) > low / high
        low, high = float(values.min()), float(values.max())
    assert low > 1 - 1e-9


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"lower": 0.0}, {"lower": 1.0}, {"cushion": 1.0}, {"safety": 0.9}],
)
def test_numbers_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        polar_express(**{"steps": 5, **wrong})  # type: ignore[arg-type]
