from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from muonscale.optim.diagnostics.telemetry import (
    measure,
    orthogonality_error,
    recover_update,
    rms,
    snapshot,
    spectral_norm,
    squared_singular_values,
    stable_rank,
    svd_entropy,
)
from muonscale.optim.matrices.spec import MatrixSpec
from muonscale.optim.muon import Muon
from muonscale.optim.parameters.groups import parameter_groups

SetGradients = Callable[[nn.Module, int], None]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 12), (12, 40), (40, 12), (1, 9), (9, 1), (1, 1)])
def test_figures_agree_with_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    X = random(*shape) * torch.linspace(0.1, 3, shape[1])
    squares = squared_singular_values(X)
    exact = torch.linalg.svdvals(X.double()).flip(0)
    torch.testing.assert_close(squares.double(), exact**2, rtol=1e-5, atol=1e-4)
    q = exact**2 / (exact**2).sum()
    entropy = -(q * q.log()).sum() / math.log(len(q)) if len(q) > 1 else torch.tensor(1.0)
    assert svd_entropy(squares).item() == pytest.approx(entropy.item(), abs=1e-5)
    assert spectral_norm(squares).item() == pytest.approx(exact.max().item(), rel=1e-5)
    norm = torch.linalg.matrix_norm(X.double()) ** 2
    assert stable_rank(squares).item() == pytest.approx((norm / exact.max() ** 2).item(), rel=1e-5)
    short = X.double() if shape[0] <= shape[1] else X.double().T
    n = min(shape)
    distance = torch.linalg.matrix_norm(short @ short.T / (norm / n) - torch.eye(n)) / math.sqrt(n)
    assert orthogonality_error(squares).item() == pytest.approx(distance.item(), abs=1e-4)


def test_an_orthogonal_matrix_a_rank_one_and_zeros_are_at_the_ends() -> None:
    Q = torch.linalg.qr(random(40, 16))[0] * 0.03
    outer = random(20, 1) @ random(1, 16)
    ends = [
        (Q, 1.0, 16.0, 0.03, 0.0),
        (outer, 0.0, 1.0, outer.norm().item(), math.sqrt(15)),
        (torch.zeros(20, 16), 0.0, 0.0, 0.0, 1.0),
    ]
    for X, entropy, rank, norm, error in ends:
        squares = squared_singular_values(X)
        assert svd_entropy(squares).item() == pytest.approx(entropy, abs=1e-4)
        assert stable_rank(squares).item() == pytest.approx(rank, rel=1e-4)
        assert spectral_norm(squares).item() == pytest.approx(norm, rel=1e-4)
        assert orthogonality_error(squares).item() == pytest.approx(error, abs=1e-4)


def test_figures_are_batched() -> None:
    X = random(3, 2, 5, 8)
    squares = squared_singular_values(X)
    assert squares.shape == (3, 2, 5)
    for figure in (svd_entropy, stable_rank, spectral_norm, orthogonality_error):
        assert figure(squares).shape == (3, 2)
        single = figure(squared_singular_values(X[1, 1]))
        torch.testing.assert_close(figure(squares)[1, 1], single)


def test_rms_is_over_all_elements() -> None:
    assert rms([torch.full((3,), 2.0), torch.zeros(9)]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("cautious", [False, True])
def test_the_applied_update_is_recovered_and_the_decay_left_out(cautious: bool) -> None:
    W, U = random(20, 30).double(), random(20, 30, seed=1).double()
    decayed = W * 0.05 * ((W * U >= 0) if cautious else 1)
    after = W - decayed - 0.1 * U
    found = recover_update(W, after, lr=0.1, rate=0.05, cautious=cautious)
    torch.testing.assert_close(found, U)


def test_what_took_no_step_has_no_update(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1, weight_decay=0.5), nonfinite="skip")
    set_gradients(toy, 0)
    toy.get_parameter("first.weight").grad[0, 0] = math.nan
    before = snapshot(optimizer.param_groups)
    optimizer.step()
    figures = measure(optimizer.param_groups, before)
    assert {group["update_rms"] for group in figures.values()} == {0.0}
    set_gradients(toy, 0)
    toy.get_parameter("tokens.weight").grad = None
    optimizer.step()
    figures = measure(optimizer.param_groups, before)
    assert figures["embedding"]["update_rms"] == 0.0
    assert figures["head"]["update_rms"] == pytest.approx(1.0, rel=1e-3)


OPTIONS: list[dict] = [
    {},
    {"weight_decay": 0.5, "cautious_decay": True},
    {"weight_decay": 0.5, "decay": "independent"},
    {"post_norm": "row"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "cautious", "independent", "row"])
def test_the_update_rms_is_the_one_that_the_optimizer_reports(
    options: dict, toy: nn.Module, set_gradients: SetGradients
) -> None:
    groups = parameter_groups(toy, lr=0.02, overrides={"hidden": options})
    optimizer = Muon(groups)
    set_gradients(toy, 0)
    before = snapshot(optimizer.param_groups)
    optimizer.step()
    figures = measure(optimizer.param_groups, before)
    hidden = figures["hidden"]
    assert hidden["update_rms"] == pytest.approx(float(optimizer.stats()["update_rms"]), rel=1e-4)
    weights = torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]])
    assert hidden["weight_rms"] == pytest.approx(weights.square().mean().sqrt().item(), rel=1e-5)
    ratio = 0.02 * hidden["update_rms"] / hidden["weight_rms"]
    assert hidden["update_to_weight"] == pytest.approx(ratio, rel=1e-5)
    assert hidden["measured"] == 4
    # the first step of AdamW is one in every place
    assert figures["norm"]["update_rms"] == pytest.approx(1.0, rel=1e-3)
    assert "update_svd_entropy" not in figures["norm"]


def test_under_a_fixed_norm_the_update_is_lr_times_the_weight(
    toy: nn.Module, set_gradients: SetGradients
) -> None:
    """Measured without the decay that a fixed norm leaves out."""
    overrides = {"hidden": {"constraint": "weight_norm", "weight_decay": 20.0}}
    optimizer = Muon(parameter_groups(toy, lr=0.02, overrides=overrides))
    set_gradients(toy, 0)
    before = snapshot(optimizer.param_groups)
    optimizer.step()
    hidden = measure(optimizer.param_groups, before)["hidden"]
    assert hidden["update_to_weight"] == pytest.approx(0.02, rel=0.02)


def test_an_orthogonalized_update_is_orthogonal_and_one_of_adamw_is_not(
    toy: nn.Module, set_gradients: SetGradients
) -> None:
    errors = {}
    for rule in ("muon", "adamw"):
        model = copy.deepcopy(toy)
        precise = {"ns_coefficients": "polar_express", "ns_steps": 10}
        overrides = {"hidden": precise} if rule == "muon" else {}
        optimizer = Muon(parameter_groups(model, lr=0.01, rule=rule, overrides=overrides))
        set_gradients(model, 0)
        before = snapshot(optimizer.param_groups)
        optimizer.step()
        hidden = measure(optimizer.param_groups, before)["hidden"]
        errors[rule] = hidden["update_orthogonality_error"]
        assert hidden["measured"] == 4
    assert errors["muon"] < 0.05 < 0.5 < errors["adamw"]


def test_logical_matrices_are_looked_at_not_stored_ones() -> None:
    parts = [torch.linalg.qr(random(8, 8, seed=i))[0] * 10**i for i in range(3)]
    W = nn.Parameter(torch.cat(parts))
    group = {"params": [W], "param_names": ["w"], "name": "hidden", "rule": "muon"}
    group["matrices"] = {"w": MatrixSpec(splits=(8, 8, 8))}
    optimizer = Muon([group], lr=0.0)
    figures = measure(optimizer.param_groups, snapshot(optimizer.param_groups))["hidden"]
    assert figures["measured"] == 3
    assert figures["weight_svd_entropy"] == pytest.approx(1.0, abs=1e-5)
    assert figures["weight_spectral_norm"] == pytest.approx((1 + 10 + 100) / 3, rel=1e-5)
    assert not [name for name in figures if name.startswith("update")]  # lr is 0


@pytest.mark.parametrize(("matrices", "expected"), [(1, [4]), (3, [1, 4, 7]), (100, range(9))])
def test_the_sample_is_spread_over_the_matrices(matrices: int, expected: list[int]) -> None:
    stack = torch.stack([torch.eye(4) * (i + 1) for i in range(9)])
    group = {"params": [nn.Parameter(stack)], "param_names": ["w"], "name": "experts"}
    optimizer = Muon([group | {"matrices": {"w": MatrixSpec()}}], lr=0.1)
    groups = optimizer.param_groups
    figures = measure(groups, snapshot(groups), matrices=matrices)["experts"]
    mean = sum(i + 1 for i in expected) / len(expected)
    assert figures["measured"] == len(expected)
    assert figures["weight_spectral_norm"] == pytest.approx(mean, rel=1e-5)


def test_no_matrices_are_measured_where_none_are_asked_for(toy: nn.Module) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1))
    figures = measure(optimizer.param_groups, snapshot(optimizer.param_groups), matrices=0)
    assert set(figures["hidden"]) == {"weight_rms", "update_rms", "update_to_weight"}


def test_measuring_writes_nothing(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1))
    set_gradients(toy, 0)
    optimizer.step()
    weights = copy.deepcopy(toy.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    measure(optimizer.param_groups, snapshot(optimizer.param_groups))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(weights[k], v) for k, v in toy.state_dict().items())
    for number, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state["state"][number][k], v) for k, v in values.items())
