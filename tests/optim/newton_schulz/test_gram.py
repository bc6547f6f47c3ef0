from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muonscale.optim.newton_schulz import kernels
from muonscale.optim.newton_schulz import orthogonalize as module
from muonscale.optim.newton_schulz.coefficients import Coefficients, resolve
from muonscale.optim.newton_schulz.orthogonalize import newton_schulz_

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
def test_a_normalized_matrix_is_taken_as_it_is(
    segments: tuple[int, ...], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither 1 nor anything the normalization would leave.
    X = matrix(*shape) / (3 * matrix(*shape).norm())
    before = X.clone()
    coefficients = resolve("you5", 5)
    coefficients = Coefficients(triples=coefficients.triples[:4], margin=1.5)
    found = torch.full_like(X, torch.nan)
    monkeypatch.setattr(module, "_prepare", lambda X, *rest: (X, True))
    monkeypatch.setattr(kernels, "panel_rows", lambda *of: 4)
    newton_schulz_([(found, X, None)], coefficients, segments)
    torch.testing.assert_close(found, expected(X, coefficients), rtol=1e-12, atol=1e-14)
    assert torch.equal(X, before)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_a_later_batch_may_have_fewer_matrices(segments: tuple[int, ...]) -> None:
    coefficients = Coefficients(triples=resolve("you5", 5).triples[:4])
    X = matrix(5, 6, 9)
    found = torch.empty_like(X)
    batches = [(out, part, None) for out, part in zip(found.split(3), X.split(3), strict=True)]
    newton_schulz_(batches, coefficients, segments)
    unit = X / X.norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(found, expected(unit, coefficients), rtol=1e-12, atol=1e-13)
