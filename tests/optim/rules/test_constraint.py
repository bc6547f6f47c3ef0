from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from muonscale import Muon
from muonscale.errors import ConfigError
from muonscale.optim.matrices.spec import MatrixSpec, view
from muonscale.optim.rules.base import rate_of
from muonscale.optim.rules.constraint import CONSTRAINTS, MatrixSums, resolve_constraint
from tests.distributed.layouts import SHAPES, make, whole


def norms(parameters: dict) -> dict[str, torch.Tensor]:
    """Return the norm of every logical matrix by the name of its parameter."""
    return {
        name: torch.cat([m.norm(dim=(1, 2)) for m in view(parameters[name].detach(), spec)])
        for name, (_, spec) in SHAPES.items()
    }


def stepped(steps: int = 3, **options):
    parameters, optimizer = make(lambda _, tensor: tensor, **options)
    before = copy.deepcopy({name: p.detach() for name, p in parameters.items()})
    for seed in range(1, steps + 1):
        for name, parameter in parameters.items():
            parameter.grad = whole(name, seed)
        optimizer.step()
    return before, parameters


@pytest.mark.parametrize("scale", ["rms", "none"])
def test_every_matrix_keeps_its_norm_and_goes_by_its_length_times_lr(scale: str) -> None:
    before, after = stepped(1, constraint="weight_norm", scale=scale, lr=1e-3, weight_decay=0.5)
    torch.testing.assert_close(norms(before), norms(after), rtol=1e-5, atol=1e-6)
    change = {name: after[name].detach() - before[name] for name in SHAPES}
    for name, moved in norms(change).items():
        ratio = moved / norms(before)[name]
        # the part of the update along the weight is taken away
        assert ratio.max() < 1.01e-3
        if before[name].numel() > 100:
            assert ratio.min() > 0.5e-3


def test_the_brake_halves_what_the_norm_grows_by_and_nothing_else() -> None:
    options = {"lr": 0.5, "weight_decay": 0.0, "scale": "none"}
    before, free = stepped(1, **options)
    _, braked = stepped(1, **options, constraint="radial_brake", outward_scale=0.25)
    old, grown, held = norms(before), norms(free), norms(braked)
    outward = 0
    for name in SHAPES:
        factor = torch.where(grown[name] > old[name], 0.25, 1.0)
        outward += int((factor < 1).sum())
        torch.testing.assert_close(held[name], old[name] + factor * (grown[name] - old[name]))
    assert outward > 3


def test_zero_weights_and_zero_updates_stay_finite() -> None:
    zero, one = torch.zeros(3), torch.tensor([0.0, 2.0, 0.0])
    for constraint in CONSTRAINTS.values():
        if constraint.by_rows:
            continue
        options = {"lr": 0.1, "outward_scale": 0.5}
        keep, move = constraint.factors(MatrixSums(one, zero, zero), options)
        assert keep.isfinite().all() and move.isfinite().all()
        assert float(keep[1]) == pytest.approx(1)


def test_only_a_kept_norm_leaves_out_weight_decay() -> None:
    for name, rate in (
        (None, 0.05),
        ("radial_brake", 0.05),
        ("weight_norm", 0.0),
        ("row_magnitude", 0.05),
    ):
        W = nn.Parameter(torch.ones(4, 4))
        optimizer = Muon([W], lr=0.1, weight_decay=0.5, constraint=name)
        assert math.isclose(rate_of(optimizer.param_groups[0]), rate)


def test_a_group_can_go_without_it() -> None:
    one, other = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
    before = [float(p.detach().norm()) for p in (one, other)]
    groups = [
        {"params": [("one", one)], "rule": "muon"},
        {"params": [("other", other)], "rule": "muon", "constraint": None},
    ]
    optimizer = Muon(groups, lr=0.1, constraint="weight_norm")
    for parameter in (one, other):
        parameter.grad = torch.randn(6, 6)
    optimizer.step()
    assert float(one.detach().norm()) == pytest.approx(before[0], rel=1e-6)
    assert abs(float(other.detach().norm()) - before[1]) > 1e-4


def test_the_norm_of_a_bf16_weight_is_that_of_its_copy() -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(16, 24).bfloat16())
    optimizer = Muon([W], lr=1e-4, constraint="weight_norm", master="float32")
    norm = float(W.detach().float().norm())
    for _ in range(20):
        W.grad = torch.randn(16, 24).bfloat16()
        optimizer.step()
    assert float(optimizer.state[W]["master"].norm()) == pytest.approx(norm, rel=1e-6)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="weight_norm"):
        resolve_constraint("weightnorm")


def test_a_stack_has_a_norm_for_each_of_its_matrices() -> None:
    W = nn.Parameter(torch.randn(2, 6, 4) * torch.tensor([1.0, 5.0]).view(2, 1, 1))
    before = W.detach().norm(dim=(1, 2))
    group = {"params": [("w", W)], "rule": "muon", "matrices": {"w": MatrixSpec()}}
    optimizer = Muon([group], lr=0.1, constraint="weight_norm")
    W.grad = torch.randn(2, 6, 4)
    optimizer.step()
    torch.testing.assert_close(W.detach().norm(dim=(1, 2)), before)


def test_rows_that_other_code_shortens_keep_their_direction_and_go_on_from_there() -> None:
    """A clip of queries and keys does so after a step."""
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(6, 8))
    twin = nn.Parameter(W.detach().clone())
    options = {"constraint": "row_magnitude", "weight_decay": 0.0}
    one, other = (Muon([p], lr=0.01, **options) for p in (W, twin))
    for seed, clipped in enumerate((False, True, False)):
        for p, optimizer in ((W, one), (twin, other)):
            p.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        if clipped:
            W.data[0] *= 0.5
    ratio = W.detach().norm(dim=1) / twin.detach().norm(dim=1)
    assert float(ratio[0]) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(ratio[1:], torch.ones(5), rtol=0.05, atol=0)
    torch.testing.assert_close(one.state[W]["row_magnitude"][:, 0], W.detach().norm(dim=1))


def test_a_magnitude_may_become_negative_and_keeps_its_direction() -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.full((1, 8), 0.01))
    optimizer = Muon([W], lr=0.02, constraint="row_magnitude", weight_decay=0.0, rms=1e-6)
    for _ in range(3):  # Adam goes by lr
        W.grad = torch.ones(1, 8)
        optimizer.step()
    g = float(optimizer.state[W]["row_magnitude"])
    assert g == pytest.approx(0.01 * 8**0.5 - 0.06, abs=1e-4)
    assert float(W.detach().mean()) == pytest.approx(g / 8**0.5, abs=1e-4)
    assert g < 0
