from __future__ import annotations

import numpy as np
import pytest

from muonscale.errors import ConfigError
from muonscale.lab.models.moe.gate_scale import gate_scale


@pytest.mark.parametrize(
    ("experts", "k", "expected"), [(64, 6, 2.446), (256, 8, 2.827), (8, 2, 1.409), (16, 4, 1.991)]
)
def test_the_scale_is_the_published_one(experts: int, k: int, expected: float) -> None:
    # Moonlight's and DeepSeek-V3's shapes; arXiv 2502.16982, appendix C, says 2.446 for the first
    assert round(gate_scale(experts, k), 3) == expected


def test_one_expert_keeps_its_size() -> None:
    assert gate_scale(8, 1) == pytest.approx(1, abs=1e-12)


def test_two_of_two_is_the_integral() -> None:
    """Gauss-Hermite quadrature over both logits."""
    z, weight = np.polynomial.hermite_e.hermegauss(80)
    gate = 1 / (1 + np.exp(-z))
    p = gate[:, None] / (gate[:, None] + gate[None, :])
    values = 1 / np.sqrt(p**2 + (1 - p) ** 2)
    expected = (weight[:, None] * weight[None, :] * values).sum() / weight.sum() ** 2
    assert gate_scale(2, 2) == pytest.approx(expected, abs=2e-3)  # 4 standard deviations


def test_the_same_arguments_give_the_same_number() -> None:
    assert gate_scale(16, 4) == gate_scale(16, 4)


@pytest.mark.parametrize(("experts", "k"), [(8, 0), (8, 9), (0, 0), (4, -1)])
def test_k_is_within_the_experts(experts: int, k: int) -> None:
    with pytest.raises(ConfigError, match=f"k={k} .* {experts}"):
        gate_scale(experts, k)
