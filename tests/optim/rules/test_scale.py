from __future__ import annotations

import math

import pytest
import torch

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.orthogonalize import exact_polar, orthogonalize
from muonscale.optim.rules.scale import ALIASES, FACTORS, exact_factor, shape_factor

SHAPES = [(64, 16), (16, 64), (16, 16)]


@pytest.mark.parametrize(
    ("scale", "tall", "wide", "square"),
    [
        ("rms", 0.2 * 8, 0.2 * 8, 0.2 * 4),
        ("rms_exact", 0.2 * 8, 0.2 * 8, 0.2 * 4),
        ("spectral", 2.0, 0.5, 1.0),
        ("keller", 2.0, 1.0, 1.0),
        ("none", 1.0, 1.0, 1.0),
        (lambda out, in_: out / in_, 4.0, 0.25, 1.0),
        # other projects, by their own formulas
        ("original", 2.0, 1.0, 1.0),
        ("torch:original", 2.0, 1.0, 1.0),
        ("timm:original", 2.0, 1.0, 1.0),
        ("shape_scaling", 2.0, 1.0, 1.0),
        ("nvidia:shape_scaling", 2.0, 1.0, 1.0),
        ("match_rms_adamw", 1.6, 1.6, 0.8),
        ("torch:match_rms_adamw", 1.6, 1.6, 0.8),
        ("timm:match_rms_adamw", 1.6, 1.6, 0.8),
        ("rms_norm", 1.6, 1.6, 0.8),
        ("dion:rms_norm", 1.6, 1.6, 0.8),
        ("consistent_rms", 1.6, 1.6, 0.8),
        ("optax:consistent_rms", 1.6, 1.6, 0.8),
        ("spectral_unclamped", 2.0, 0.5, 1.0),
        ("torch:spectral_unclamped", 2.0, 0.5, 1.0),
        ("spectral_norm", 2.0, 0.5, 1.0),
        ("dion:spectral_norm", 2.0, 0.5, 1.0),
        ("unit_rms_norm", 2.0, 0.5, 1.0),
        ("nvidia:unit_rms_norm", 2.0, 0.5, 1.0),
        ("rms_to_rms", 2.0, 0.5, 1.0),
        ("timm:rms_to_rms", 2.0, 0.5, 1.0),
        ("nvidia:spectral", 8.0, 8.0, 4.0),
    ],
)
def test_factors_for_tall_wide_and_square(scale, tall: float, wide: float, square: float) -> None:
    found = [shape_factor(scale, shape, 0.2) for shape in SHAPES]
    assert found == pytest.approx([tall, wide, square])


@pytest.mark.parametrize("name", [*FACTORS, *ALIASES])
def test_every_written_formula_is_the_factor(name: str) -> None:
    factor = (FACTORS | ALIASES)[name]
    written = factor.formula.replace("in", "in_")
    for out, in_ in SHAPES:
        value = eval(written, {"sqrt": math.sqrt, "max": max}, {"out": out, "in_": in_})
        assert shape_factor(name, (out, in_), 0.7) == pytest.approx(value)


def test_a_word_with_two_meanings_is_ours_unless_the_project_is_named() -> None:
    shape = (1024, 4096)
    assert shape_factor("spectral", shape, 0.2) == 0.5
    assert shape_factor("nvidia:spectral", shape, 0.2) == 64.0


def test_only_rms_allows_for_what_came_last() -> None:
    shape = (16, 64)
    assert shape_factor("rms", shape, 0.2, "row") == pytest.approx(0.2 * 8)
    assert shape_factor("rms", shape, 0.2, "col") == pytest.approx(0.2 * 4)
    for literal in ("match_rms_adamw", "spectral", "keller", "none"):
        assert shape_factor(literal, shape, 0.2, "col") == shape_factor(literal, shape, 0.2)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_rms_is_reached_by_the_exact_polar_factor(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    G = torch.randn(shape)
    factor = shape_factor("rms", shape, 0.2)
    exact = (factor * exact_polar(G)).square().mean().sqrt()
    assert float(exact) == pytest.approx(0.2)
    realised = (factor * orthogonalize(G)).square().mean().sqrt()
    assert 0.15 < float(realised) < 0.21


def test_rms_exact_reaches_its_target_where_rms_is_nominal() -> None:
    """A gradient of rank 16 leaves most singular values at zero."""
    torch.manual_seed(0)
    G = torch.randn(1, 256, 16) @ torch.randn(1, 16, 256)
    O_NMK = orthogonalize(G)
    nominal = (shape_factor("rms", (256, 256), 0.2) * O_NMK).square().mean().sqrt()
    assert float(nominal) < 0.06
    factor = exact_factor(O_NMK.square().sum((-2, -1), keepdim=True), (256, 256), 0.2)
    assert float((factor * O_NMK).square().mean().sqrt()) == pytest.approx(0.2)
    zero = exact_factor(torch.zeros(1, 1, 1), (4, 4), 0.2)
    assert zero.isfinite().all()


def test_an_unknown_scale_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="spectral"):
        shape_factor("spektral", (2, 2), 0.2)
    with pytest.raises(ConfigError, match="nvidia:spectral"):
        shape_factor("nvidia:spektral", (2, 2), 0.2)
