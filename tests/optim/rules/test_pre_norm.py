from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon
from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.orthogonalize import exact_polar
from muonscale.optim.rules.muon import MUON
from muonscale.optim.rules.pre_norm import PRE_NORMS, PreNormContext, resolve_pre_norm

SHAPES = [(8, 32), (32, 8), (16, 16)]


def applied(name: str, N_NMK: Tensor) -> Tensor:
    def polar(X_NMK: Tensor) -> Tensor:
        return exact_polar(X_NMK).to(X_NMK.dtype)

    shape = N_NMK.shape[1], N_NMK.shape[2]
    return PRE_NORMS[name].apply(N_NMK, PreNormContext(shape=shape, polar=polar))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dim"), [("row", -1), ("col", -2)])
@pytest.mark.parametrize("length", [1e-30, 1.0, 1e30])
def test_lengths_are_equal_afterwards_whatever_they_were(name, dim, shape, length) -> None:
    N_NMK = torch.randn(3, *shape) * torch.rand(3, shape[0], 1) * length
    lengths = applied(name, N_NMK).norm(dim=dim)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-5, atol=1e-5)


def test_both_are_taken_before_either_division() -> None:
    N_NMK = torch.randn(2, 5, 7, dtype=torch.float64)
    rows, columns = N_NMK.norm(dim=2, keepdim=True), N_NMK.norm(dim=1, keepdim=True)
    expected = N_NMK / rows / columns * N_NMK.norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(applied("row_col", N_NMK), expected)
    assert not torch.allclose(applied("row_col", N_NMK), applied("col", applied("row", N_NMK)))


@pytest.mark.parametrize(("shape", "dim"), [((32, 8), -1), ((8, 32), -2)])
def test_aurora_levels_the_long_side_of_a_polar_factor(shape, dim: int) -> None:
    torch.manual_seed(0)
    N_NMK = torch.randn(3, *shape, dtype=torch.float64) * torch.rand(3, *shape[:1], 1)

    def spread(O_NMK: Tensor) -> float:
        lengths = O_NMK.norm(dim=dim)
        return float((lengths.std(-1) / lengths.mean(-1)).max())

    by_length = spread(exact_polar(applied("row" if dim == -1 else "col", N_NMK)))
    aurora = exact_polar(applied("aurora", N_NMK))
    assert spread(aurora) < 0.5 * by_length < spread(exact_polar(N_NMK))
    assert aurora.norm(dim=dim).mean() == pytest.approx(0.5, rel=1e-2)  # sqrt(8/32)


def test_aurora_leaves_a_square_matrix_as_it_is_and_counts_its_operations() -> None:
    N_NMK = torch.randn(2, 6, 6)
    assert torch.equal(applied("aurora", N_NMK), N_NMK)
    flops = {}
    for name in (None, "aurora"):
        options = Muon([nn.Parameter(torch.ones(4, 4))], pre_norm=name).param_groups[0]
        update = MUON.matrix_update(options)
        shapes = ((8, 8), (8, 16))
        flops[name] = [update.flops(shape, torch.float32, "cpu") for shape in shapes]
    assert flops["aurora"] == [flops[None][0], 2 * flops[None][1]]


@pytest.mark.parametrize("name", PRE_NORMS)
def test_what_is_zero_stays_zero(name: str) -> None:
    N_NMK = torch.randn(1, 4, 6)
    N_NMK[:, 1] = 0
    N_NMK[:, :, 2] = 0
    found = applied(name, N_NMK)
    assert found.isfinite().all()
    assert not found[:, 1].any() and not found[:, :, 2].any() and found[:, 0, 0].all()
    assert torch.equal(applied(name, torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


@pytest.mark.parametrize("name", PRE_NORMS)
@pytest.mark.parametrize("length", [1e-20, 1e20])
def test_a_step_does_not_depend_on_the_length_of_the_gradient(name: str, length: float) -> None:
    G, updates = torch.randn(6, 9), []
    for factor in (1.0, length):
        W = nn.Parameter(torch.zeros(6, 9))
        W.grad = G * factor
        Muon([W], lr=1.0, pre_norm=name, ns_dtype="float64").step()
        updates.append(W.detach())
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-4, atol=1e-6)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="row_col"):
        resolve_pre_norm("rowcol")
