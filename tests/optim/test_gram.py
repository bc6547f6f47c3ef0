from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muonscale.optim.newton_schulz.coefficients import Coefficients, resolve
from muonscale.optim.newton_schulz.gram import make_workspace, newton_schulz_

SEGMENTS = [(1, 1, 1, 1), (4,), (2, 2), (1, 3), (3, 1), (1, 2, 1)]


def matrix(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def expected(X: Tensor, coefficients: Coefficients) -> Tensor:
    for a, b, c in coefficients.triples:
        A = X @ X.mT
        X = a * X + b * A @ X + c * A @ A @ X
    return X


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("shape", [(3, 6, 15), (3, 15, 6), (1, 7, 7)])
def test_a_normalised_matrix_is_taken_as_it_is(
    segments: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    # Neither 1 nor anything the normalisation would leave.
    X = matrix(*shape) / (3 * matrix(*shape).norm())
    before = X.clone()
    coefficients = resolve("you5", 5)
    coefficients = Coefficients(triples=coefficients.triples[:4], margin=1.5)
    found = torch.full_like(X, torch.nan)
    room = make_workspace(found, segments, panel=4)
    newton_schulz_(found, X, coefficients, segments, room, normalized=True)
    torch.testing.assert_close(found, expected(X, coefficients), rtol=1e-12, atol=1e-14)
    assert torch.equal(X, before)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_a_workspace_can_be_used_again_and_for_fewer(segments: tuple[int, ...]) -> None:
    coefficients = Coefficients(triples=resolve("you5", 5).triples[:4])
    X = matrix(5, 6, 9)
    room = make_workspace(X[:3], segments, panel=6)
    found = torch.empty_like(X)
    for part in (slice(0, 3), slice(3, 5)):
        newton_schulz_(found[part], X[part], coefficients, segments, room, normalized=False)
    unit = X / X.norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(found, expected(unit, coefficients), rtol=1e-12, atol=1e-13)


def test_one_segment_needs_no_second_place_for_the_matrix() -> None:
    assert make_workspace(matrix(2, 6, 9), (5,), panel=6).X_NMK.numel() == 0
    assert make_workspace(matrix(2, 6, 9), (3, 2), panel=6).X_NMK.shape == (2, 6, 9)
