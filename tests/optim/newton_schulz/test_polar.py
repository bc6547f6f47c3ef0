from __future__ import annotations

import torch

from muonscale.optim.newton_schulz.orthogonalize import exact_polar


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_the_exact_polar_factor_is_orthogonal_and_nearest() -> None:
    G = matrix(5, 9)
    P = exact_polar(G)
    torch.testing.assert_close(P @ P.T, torch.eye(5, dtype=torch.float64))
    # O^T G is the positive semidefinite factor
    assert torch.linalg.eigvalsh(P @ G.T).min() > 0


def test_the_exact_polar_factor_leaves_the_null_space_alone() -> None:
    G = matrix(6, 2) @ matrix(2, 8, seed=1)
    values = torch.linalg.svdvals(exact_polar(G))
    expected = torch.tensor([1.0, 1.0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(values, expected)
    assert torch.equal(exact_polar(torch.zeros(3, 4)), torch.zeros(3, 4, dtype=torch.float64))


def test_its_rms_is_one_over_the_root_of_the_longer_side() -> None:
    # Liu et al., arXiv 2502.16982, lemma 1.
    for shape in ((12, 40), (40, 12), (16, 16)):
        rms = exact_polar(matrix(*shape)).square().mean().sqrt()
        torch.testing.assert_close(rms, torch.tensor(max(shape) ** -0.5, dtype=torch.float64))
