from __future__ import annotations

import pytest
import torch

from muonscale.errors import ConfigError
from muonscale.optim.orthogonalize import exact_polar, orthogonalize
from muonscale.optim.scale import shape_factor


@pytest.mark.parametrize(
    ("scale", "tall", "wide", "square"),
    [
        ("rms", 0.2 * 8, 0.2 * 8, 0.2 * 4),
        ("spectral", 2.0, 0.5, 1.0),
        ("keller", 2.0, 1.0, 1.0),
        ("none", 1.0, 1.0, 1.0),
        (lambda out, in_: out / in_, 4.0, 0.25, 1.0),
    ],
)
def test_factors_for_tall_wide_and_square(scale, tall: float, wide: float, square: float) -> None:
    shapes = [(64, 16), (16, 64), (16, 16)]
    found = [shape_factor(scale, shape, 0.2) for shape in shapes]
    assert found == pytest.approx([tall, wide, square])


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_rms_is_reached_by_the_exact_polar_factor(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    G = torch.randn(shape)
    factor = shape_factor("rms", shape, 0.2)
    exact = (factor * exact_polar(G)).square().mean().sqrt()
    assert float(exact) == pytest.approx(0.2)
    realised = (factor * orthogonalize(G)).square().mean().sqrt()
    assert 0.15 < float(realised) < 0.21


def test_an_unknown_scale_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="spectral"):
        shape_factor("spektral", (2, 2), 0.2)
